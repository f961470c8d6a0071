"""Mean and covariance of features, stored with their extractor.

Statistics of different extractors cannot be compared, and their arrays do not show which one made them. So
each file stores a hash of the extractor's weights, and is refused with another extractor.
"""

import dataclasses
from pathlib import Path

import numpy as np

from sfd_jax.errors import SfdError
from sfd_jax.evaluation.metrics import check_gaussian
from sfd_jax.evaluation.npz import read_npz
from sfd_jax.files import atomic_write

# Names of mean and covariance in a file, by feature: those of the ADM reference batches.
FILE_NAMES = {"features": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


@dataclasses.dataclass(frozen=True)
class FeatureStatistics:
    """Statistics of a set of images.

    Attributes:
      extractor: name of the feature extractor.
      extractor_hash: hash of the extractor's weights and settings; "" if unknown.
      count: number of images; 0 if unknown.
      gaussians: feature name ("features", "spatial") -> (mean (D,), covariance (D, D)), float64.
      source: hash of the images, or "".
      features: the "features" (N, D) float32 of all images, or None; precision, recall and KID need them.
    """

    extractor: str
    extractor_hash: str
    count: int
    gaussians: dict[str, tuple[np.ndarray, np.ndarray]]
    source: str = ""
    features: np.ndarray | None = None

    def check_extractor(self, name: str, hash: str, where: str) -> None:
        """Refuse an extractor that did not make these statistics.

        Raises:
          SfdError: name or hash differ.
        """
        if (self.extractor, self.extractor_hash or hash) != (name, hash):
            raise SfdError(
                f"{where}: statistics of extractor '{self.extractor}' ({self.extractor_hash[:12]}), but "
                f"features come from '{name}' ({hash[:12]}); make the statistics again with this one"
            )


def save_statistics(path: str | Path, statistics: FeatureStatistics) -> None:
    """Write statistics atomically as an npz; other evaluators can read its `mu`, `sigma`, `mu_s`, `sigma_s`."""
    arrays = {
        "extractor": np.array(statistics.extractor),
        "extractor_hash": np.array(statistics.extractor_hash),
        "count": np.array(statistics.count),
        "source": np.array(statistics.source),
    }
    for feature, (mean, covariance) in statistics.gaussians.items():
        arrays.update(zip(FILE_NAMES[feature], (mean, covariance), strict=True))
    if statistics.features is not None:
        arrays["features"] = np.asarray(statistics.features, np.float32)
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as part, open(part, "wb") as file:
            np.savez(file, **arrays)
    except OSError as error:
        raise SfdError(f"cannot write statistics {path}: {error}") from error


def load_statistics(path: str | Path) -> FeatureStatistics:
    """Read statistics that `save_statistics`, the ADM suite or another tool (pytorch-fid, clean-fid) wrote.

    Raises:
      SfdError: the file is missing, damaged or lacks `mu` and `sigma`; their values cannot be those of features (see
        `metrics.check_gaussian`); the count is below 2; or the features are not those of `mu` and `sigma`.
    """
    gaussian_names = tuple(name for pair in FILE_NAMES.values() for name in pair)
    arrays = read_npz(Path(path), (*gaussian_names, "extractor", "extractor_hash", "count", "source", "features"))
    gaussians = {}
    for feature, (mean, covariance) in FILE_NAMES.items():
        if (mean in arrays) != (covariance in arrays):
            raise SfdError(f"{path} holds only one of `{mean}` and `{covariance}`; statistics have both")
        if mean in arrays:
            gaussians[feature] = check_gaussian(arrays[mean], arrays[covariance], f"{path}: {mean}, {covariance}")
    if "features" not in gaussians:
        raise SfdError(f"{path} holds no statistics: expected arrays `mu` (D,) and `sigma` (D, D)")
    for name in ("extractor", "extractor_hash", "source"):
        if name in arrays and (arrays[name].shape != () or arrays[name].dtype.kind != "U"):
            raise SfdError(f"{path}: `{name}` is {arrays[name].dtype} {arrays[name].shape}; expected a string")
    count = _count(arrays["count"], path) if "count" in arrays else 0
    features = arrays.get("features")
    if features is not None:
        _check_features(features, count, *gaussians["features"], path)
    return FeatureStatistics(
        extractor=str(arrays.get("extractor", "inception")),  # ADM's files are all of Inception
        extractor_hash=str(arrays.get("extractor_hash", "")),
        count=count,
        gaussians=gaussians,
        source=str(arrays.get("source", "")),
        features=features,
    )


def _count(stored: np.ndarray, path) -> int:
    """Return a file's number of images, a scalar or an array of one number."""
    number = stored.reshape(-1)[0] if stored.size == 1 and stored.dtype.kind in "fiu" else np.nan
    if not (np.isfinite(number) and number == int(number) and number >= 2):
        raise SfdError(f"{path}: `count` is {stored.tolist()}; expected the number of images, an integer above 1")
    return int(number)


def _check_features(features: np.ndarray, count: int, mean: np.ndarray, covariance: np.ndarray, path) -> None:
    """Raise SfdError unless features have the stored mean and variances, to 1e-3 of the largest."""
    rows = count or len(features) if features.ndim else 0
    if features.dtype.kind != "f" or features.shape != (rows, len(mean)) or rows < 2:
        raise SfdError(
            f"{path}: `features` are {features.dtype} {features.shape}; expected floats ({count or 'N'}, {len(mean)})"
        )
    sums, squares, variances = np.zeros(len(mean)), np.zeros(len(mean)), np.diagonal(covariance)
    for start in range(0, rows, 4096):
        centred = features[start : start + 4096].astype(np.float64) - mean
        sums += centred.sum(axis=0)
        squares += np.square(centred).sum(axis=0)
    off, largest = np.abs(sums).max() / rows, variances.max()
    is_mean = off <= 1e-3 * (np.abs(mean).max() + np.sqrt(largest))
    if not (is_mean and np.abs(squares / (rows - 1) - variances).max() <= 1e-3 * largest):
        raise SfdError(
            f"{path}: `mu` and `sigma` are not those of the `features` beside them; make the statistics again"
        )
