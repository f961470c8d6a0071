"""The 1,797 real handwritten digits that ship inside scikit-learn, with a fixed split.

They come from the "Optical Recognition of Handwritten Digits" set: 8x8 grey levels 0..16. As a
dataset of `images.py` they are 8x8 bytes 0..255, which its crop resizes bicubic to the asked size.
"""

import numpy as np

from sfd_jax.errors import SfdError, nearest, needs_extra

HELD_OUT_PER_CLASS = 36  # 360 held out, 1,437 for training
SPLITS = ("train", "held_out", "all")


class Digits:
    """(image, label) pairs of one split; the images are uint8 (8,8), white on black.

    Raises:
      SfdError: an unknown split.
    """

    class_names = [str(digit) for digit in range(10)]

    def __init__(self, split: str):
        levels, self.labels = digits_8x8(split)
        self.images = np.round(levels * (255 / 16)).astype(np.uint8)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.images[index], int(self.labels[index])


def digits_8x8(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the digits as they are stored.

    Args:
      split: "train", "held_out", or "all"; the first two share no image, are the same in every run
        whatever its seed, and the held-out one has equally many of each class.

    Returns:
      Grey levels 0..16, float64 (N,8,8), and labels 0..9, int64 (N,).

    Raises:
      SfdError: an unknown split, or scikit-learn is missing.
    """
    with needs_extra("demo", "data.kind=digits, handwritten digits that scikit-learn ships,"):
        from sklearn.datasets import load_digits
    if split not in SPLITS:
        raise SfdError(f"the digits have no split '{split}'; {nearest(split, SPLITS)}")
    digits = load_digits()
    keep = split_by_class(digits.target, HELD_OUT_PER_CLASS, split)
    return digits.images[keep], digits.target[keep]


def split_by_class(labels: np.ndarray, held_out_per_class: int, split: str) -> np.ndarray:
    """Return which images belong to a split, the same in every run.

    Args:
      labels: int (N,), 0..9.
      held_out_per_class: images of each class that are held out.
      split: "train", "held_out" or "all".

    Returns:
      bool (N,).
    """
    held_out = np.zeros(len(labels), bool)
    # RandomState's stream is frozen by numpy's compatibility policy, so the split is too.
    random = np.random.RandomState(0)
    for label in range(10):
        members = np.flatnonzero(labels == label)
        held_out[random.permutation(members)[:held_out_per_class]] = True
    return {"train": ~held_out, "held_out": held_out, "all": np.ones_like(held_out)}[split]
