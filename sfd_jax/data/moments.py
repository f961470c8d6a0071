"""Mean and variance or covariance in float64, accumulated in parts.

Each image's moments are computed separately and merged by Chan's formula, so the result does not
depend on how images were batched.
"""

import dataclasses

import numpy as np

from sfd_jax.errors import SfdError


@dataclasses.dataclass(frozen=True)
class Moments:
    """Moments of some values per channel.

    Attributes:
      count: values a channel.
      mean: float64 (C,).
      squares: float64 (C,), sum of squared differences from the mean.
    """

    count: int
    mean: np.ndarray
    squares: np.ndarray

    @property
    def std(self) -> np.ndarray:
        """Standard deviation, float64 (C,), of the population (divided by the count)."""
        return np.sqrt(self.squares / self.count)

    @classmethod
    def of(cls, values: np.ndarray) -> "Moments":
        """Return the moments of values (..., C) of any dtype."""
        values = np.asarray(values).astype(np.float64)
        values = values.reshape(-1, values.shape[-1]) if values.size else values.reshape(1, 0)
        mean = values.mean(axis=0)
        return cls(len(values), mean, np.square(values - mean).sum(axis=0))

    @classmethod
    def merge(cls, parts: list["Moments"], like: int = 0) -> "Moments":
        """Merge moments of disjoint sets; without parts return the moments of an empty set.

        Args:
          parts: to be merged.
          like: number of channels, needed only where there may be no parts.

        Source: Chan, Golub and LeVeque, 1979, for many sets at once.
        """
        parts = [part for part in parts if part.count]
        if not parts:
            return cls(0, np.zeros(like), np.zeros(like))
        counts = np.array([part.count for part in parts], np.float64)
        means = np.stack([part.mean for part in parts])
        mean = counts @ means / counts.sum()
        between = counts @ np.square(means - mean)
        within = np.stack([part.squares for part in parts]).sum(axis=0)
        return cls(int(counts.sum()), mean, within + between)

    def to_dict(self) -> dict:
        return {"count": self.count, "mean": self.mean.tolist(), "squares": self.squares.tolist()}

    @classmethod
    def from_dict(cls, values: dict) -> "Moments":
        return cls(values["count"], np.array(values["mean"]), np.array(values["squares"]))


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
        self.scatter = np.zeros((dimension, dimension))

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
        centred, difference = rows - mean, mean - self.mean
        total = self.count + len(rows)
        self.scatter += centred.T @ centred
        self.scatter += np.outer(difference, difference * (self.count * len(rows) / total))
        self.mean = self.mean + difference * (len(rows) / total)
        self.count = total

    @property
    def covariance(self) -> np.ndarray:
        """Covariance (D, D) with divisor count - 1, as `numpy.cov`."""
        if self.count < 2:
            raise SfdError(f"a covariance needs at least 2 images, got {self.count}")
        return self.scatter / (self.count - 1)
