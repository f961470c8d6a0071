"""Principal components of visual features: the semantic latents of ReDi, fitted in one pass."""

import os
from collections.abc import Iterable

import numpy as np

from sfd_jax.data.moments import RunningMoments
from sfd_jax.errors import SfdError
from sfd_jax.files import atomic_write


def fit_pca(features: Iterable[np.ndarray], channels: int) -> dict[str, np.ndarray]:
    """Fit the directions of largest variance.

    Args:
      features: arrays (..., F), each with any number of tokens; summed in float64 in their order.
      channels: number of directions.

    Returns:
      `mean` (F,), `components` (F, channels), orthonormal, largest variance first, each with its
      largest entry positive; `explained` (channels,), shares of the whole variance. All float32.

    Raises:
      SfdError: no features, or fewer than `channels` of them.
    """
    moments = RunningMoments(0)
    for part in features:
        moments = moments if moments.count else RunningMoments(part.shape[-1])
        moments.add(part.reshape(-1, part.shape[-1]))
    if channels > len(moments.mean):
        raise SfdError(
            f"{channels} principal components of features of width {len(moments.mean)}: give at most that many"
        )
    values, vectors = np.linalg.eigh(moments.scatter)
    components = vectors[:, ::-1][:, :channels]
    # The sign of an eigenvector is arbitrary; fixed here so that a second fit agrees.
    components = components * np.sign(components[np.abs(components).argmax(axis=0), np.arange(channels)])
    explained = values[::-1][:channels] / values.sum()
    arrays = {"mean": moments.mean, "components": components, "explained": explained}
    return {name: values.astype(np.float32) for name, values in arrays.items()}


def save_pca(path: str | os.PathLike, pca: dict[str, np.ndarray]) -> None:
    """Write a fit atomically."""
    with atomic_write(path) as part, open(part, "wb") as file:
        np.savez(file, **pca)


def load_pca(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Read what `save_pca` wrote.

    Raises:
      SfdError: it is damaged.
    """
    try:
        with np.load(path) as file:
            return {name: file[name] for name in ("mean", "components", "explained")}
    except Exception as error:  # numpy raises many types for a damaged file
        raise SfdError(f"{path} is damaged ({error}); delete it to fit it again") from error
