"""A judge outside the project's own networks: a support vector classifier on the original 8x8 digits."""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from sklearn.svm import SVC


def shrink_to_8x8(images: np.ndarray) -> np.ndarray:
    """Scale images down by area mean to the 8x8 grey levels that scikit-learn ships.

    Args:
      images: (B, H, W, 3) uint8, H and W multiples of 8.

    Returns:
      (B, 64) float64 in [0, 16].
    """
    batch, height, width, _ = images.shape
    grey = images.astype(np.float64).mean(axis=-1) / 255 * 16
    blocks = grey.reshape(batch, 8, height // 8, 8, width // 8)
    return blocks.mean(axis=(2, 4)).reshape(batch, 64)


def train_judge(images_8x8: np.ndarray, labels: np.ndarray) -> "SVC":
    """Fit the classifier.

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
    """Return the fraction of images, (B, H, W, 3) uint8, that the judge reads as their label."""
    return float(np.mean(judge.predict(shrink_to_8x8(images)) == labels))
