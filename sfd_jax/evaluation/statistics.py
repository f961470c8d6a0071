"""Mean and covariance of features: gathered in float64 as they stream by, kept with their extractor.

Statistics of one extractor say nothing about another's features, and a file of them does not show it:
so each file names the extractor that made it by a hash of its weights, and is refused with another.
"""

import dataclasses
from pathlib import Path

import numpy as np

from sfd_jax.errors import SfdError
from sfd_jax.evaluation.npz import read_npz
from sfd_jax.files import appearing

# Names of mean and covariance in a file, by feature: those of the ADM reference batches.
FILE_NAMES = {"features": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


class RunningMoments:
    """Count, mean and covariance of rows that arrive in pieces, in float64.

    The result depends on the rows alone up to rounding (about 1e-15 relative), not on the pieces.

    Args:
      dimension: D, features in a row.

    Source: Chan, Golub and LeVeque 1979, the pairwise update of mean and scatter.
    """

    def __init__(self, dimension: int):
        self.count = 0
        self.mean = np.zeros(dimension)
        self._scatter = np.zeros((dimension, dimension))

    def add(self, rows: np.ndarray) -> None:
        """Count rows (n, D) in.

        Raises:
          SfdError: a value is not finite; nothing is counted then.
        """
        if not len(rows):
            return
        rows = np.asarray(rows, np.float64)
        mean = rows.mean(axis=0)
        if not np.isfinite(mean).all():
            raise SfdError("statistics: a feature is not finite (NaN or infinity)")
        centred = rows - mean
        self._merge(len(rows), mean, centred.T @ centred)

    def merge(self, other: "RunningMoments") -> None:
        """Count in all that `other` has counted."""
        if other.count:
            self._merge(other.count, other.mean, other._scatter)

    @property
    def covariance(self) -> np.ndarray:
        """Covariance (D, D) with divisor count - 1, as `numpy.cov`."""
        if self.count < 2:
            raise SfdError(f"a covariance needs at least 2 images, got {self.count}")
        return self._scatter / (self.count - 1)

    def _merge(self, count: int, mean: np.ndarray, scatter: np.ndarray) -> None:
        total = self.count + count
        difference = mean - self.mean
        self._scatter += scatter
        self._scatter += np.outer(difference, difference * (self.count * count / total))
        self.mean = self.mean + difference * (count / total)
        self.count = total


@dataclasses.dataclass(frozen=True)
class FeatureStatistics:
    """What is kept of a set of images.

    Attributes:
      extractor: name of the feature extractor.
      extractor_hash: hash of the extractor's weights and settings; "" where the file does not tell.
      count: number of images; 0 where the file does not tell.
      gaussians: feature name ("features", "spatial") -> (mean (D,), covariance (D, D)), float64.
      source: hash of the images, or "".
      features: all images' "features" (N, D) float32, or None; precision, recall and KID need them.
    """

    extractor: str
    extractor_hash: str
    count: int
    gaussians: dict[str, tuple[np.ndarray, np.ndarray]]
    source: str = ""
    features: np.ndarray | None = None

    def check_extractor(self, name: str, hash: str, where: str) -> None:
        """Refuse another extractor than the one that made these statistics.

        Raises:
          SfdError: name or hash differ.
        """
        if (self.extractor, self.extractor_hash or hash) != (name, hash):
            raise SfdError(
                f"{where}: statistics of extractor '{self.extractor}' ({self.extractor_hash[:12]}), but "
                f"features come from '{name}' ({hash[:12]}); make the statistics again with this one"
            )


def save_statistics(path: str | Path, statistics: FeatureStatistics) -> None:
    """Write statistics as an npz, whose `mu`, `sigma`, `mu_s`, `sigma_s` other evaluators read too.

    The file appears when it is complete.
    """
    arrays = {
        "extractor": np.array(statistics.extractor),
        "extractor_hash": np.array(statistics.extractor_hash),
        "count": np.array(statistics.count),
        "source": np.array(statistics.source),
    }
    for feature, (mean, covariance) in statistics.gaussians.items():
        arrays.update(zip(FILE_NAMES[feature], (mean, covariance)))
    if statistics.features is not None:
        arrays["features"] = np.asarray(statistics.features, np.float32)
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with appearing(path) as part, open(part, "wb") as file:
            np.savez(file, **arrays)
    except OSError as error:
        raise SfdError(f"cannot write statistics {path}: {error}") from error


def load_statistics(path: str | Path) -> FeatureStatistics:
    """Read statistics that `save_statistics` or the ADM suite wrote.

    Raises:
      SfdError: no such file, damaged, or without `mu` and `sigma`.
    """
    gaussian_names = tuple(name for pair in FILE_NAMES.values() for name in pair)
    arrays = read_npz(Path(path), (*gaussian_names, "extractor", "extractor_hash", "count", "source", "features"))
    gaussians = {}
    for feature, (mean, covariance) in FILE_NAMES.items():
        if mean in arrays and covariance in arrays:
            gaussians[feature] = _checked(arrays[mean], arrays[covariance], f"{path}: {mean}, {covariance}")
    if "features" not in gaussians:
        raise SfdError(f"{path} holds no statistics: expected arrays `mu` (D,) and `sigma` (D, D)")
    return FeatureStatistics(
        extractor=str(arrays.get("extractor", "inception")),  # ADM's files are all of Inception
        extractor_hash=str(arrays.get("extractor_hash", "")),
        count=int(arrays.get("count", 0)),
        gaussians=gaussians,
        source=str(arrays.get("source", "")),
        features=arrays.get("features"),
    )


def _checked(mean: np.ndarray, covariance: np.ndarray, where: str) -> tuple[np.ndarray, np.ndarray]:
    mean, covariance = np.asarray(mean, np.float64), np.asarray(covariance, np.float64)
    if mean.ndim != 1 or covariance.shape != mean.shape * 2:
        raise SfdError(f"{where}: expected (D,) and (D, D), found {mean.shape} and {covariance.shape}")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise SfdError(f"{where}: a value is not finite")
    return mean, covariance
