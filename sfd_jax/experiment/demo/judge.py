"""Judges that use none of the project's networks.

For digits and MNIST: a support vector classifier on the original grey levels. For any images: the nearest training
image.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from sfd_jax.data.digits import digits_8x8
from sfd_jax.data.mnist import BORDER, SIDE, mnist_28x28
from sfd_jax.errors import needs_extra

if TYPE_CHECKING:
    from sklearn.svm import SVC


# (images uint8 (B,H,W,3), labels (B,)) -> fraction that the judge classifies as their label
Accuracy = Callable[[np.ndarray, np.ndarray], float]


def open_judge(kind: str) -> tuple[Accuracy, str]:
    """Fit the judge of a data set on its training images.

    Args:
      kind: "digits" or "mnist", the images as `data.images` makes them, at 32 px.

    Returns:
      The judge, and its description.
    """
    about = "fraction that a support vector classifier of {} training digits assigns to their label"
    if kind == "digits":
        reader = train_judge(*digits_8x8("train"))
        return lambda images, labels: accuracy(reader, images, labels), about.format("8x8")
    with needs_extra("demo", "the judge of samples"):
        from sklearn.svm import SVC

    flat = lambda images: images.reshape(len(images), -1) / 255
    pixels, of_pixels = mnist_28x28("train")
    reader = SVC(C=10.0).fit(flat(pixels), of_pixels)
    inner = slice(BORDER, BORDER + SIDE)
    read = lambda images: reader.predict(flat(images[:, inner, inner].mean(axis=-1)))
    return lambda images, labels: float(np.mean(read(images) == labels)), about.format("28x28")


def shrink_to_8x8(images: np.ndarray) -> np.ndarray:
    """Scale images down by area mean to the 8x8 grey levels that scikit-learn ships.

    Args:
      images: (B, H, W, 3) uint8, H and W multiples of 8.

    Returns:
      (B, 64) float64 in [0, 16].
    """
    grey = images.astype(np.float64).mean(axis=-1, keepdims=True) / 255 * 16
    return area_mean(grey, 8).reshape(len(images), 64)


def area_mean(images: np.ndarray, side: int) -> np.ndarray:
    """Scale images (B, H, W, C) down to (B, side, side, C) by area mean; `side` divides H and W."""
    batch, height, width, channels = images.shape
    blocks = images.reshape(batch, side, height // side, side, width // side, channels)
    return blocks.mean(axis=(2, 4))


def nearest_images(images: np.ndarray, among: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find the image in `among` nearest to each image, by root mean square difference of colours at 16x16 pixels.

    At this size a slightly blurred copy is still near.

    Args:
      images: uint8 (N, H, W, 3).
      among: uint8 (M, H, W, 3), M > 0.

    Returns:
      Its index, int (N,), and its distance, float64 (N,) from 0 to 1.
    """
    pieces = lambda each: np.array_split(each, len(each) // 1000 + 1)  # as floats they are eight times as large
    small = lambda each: np.concatenate([area_mean(part / 255, 16) for part in pieces(each)]).reshape(len(each), 768)
    ours, theirs = small(images), small(among)
    squares = np.sum(ours**2, axis=1)[:, None] + np.sum(theirs**2, axis=1) - 2 * ours @ theirs.T
    nearest = np.argmin(squares, axis=1)
    return nearest, np.sqrt(np.mean((ours - theirs[nearest]) ** 2, axis=1))


def train_judge(images_8x8: np.ndarray, labels: np.ndarray) -> "SVC":
    """Fit the classifier of digits.

    Args:
      images_8x8: (B, 8, 8) grey levels 0..16, as shipped.
      labels: (B,) int.

    Returns:
      A fitted sklearn.svm.SVC over (B, 64) inputs.

    Source: the RBF width 0.001 is the one of scikit-learn's own digits example.
    """
    from sklearn.svm import SVC

    return SVC(gamma=0.001, C=10.0).fit(images_8x8.reshape(len(images_8x8), 64), labels)


def accuracy(judge: "SVC", images: np.ndarray, labels: np.ndarray) -> float:
    """Return the fraction of images, (B, H, W, 3) uint8, that the judge classifies as their label."""
    return float(np.mean(judge.predict(shrink_to_8x8(images)) == labels))
