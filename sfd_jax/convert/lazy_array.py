"""An array with known shape and dtype that is read from its file only when needed.

A released checkpoint holds weights, their average and two optimizer moments; a conversion needs a
quarter of it. Readers of this package return trees with `LazyArray` leaves, the engine loads one at a
time, and `sfd convert --inspect` loads none.
"""

import dataclasses
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from sfd_jax.errors import SfdError

MAX_RANK = 64  # of a NumPy array


@dataclasses.dataclass(frozen=True)
class LazyArray:
    """Stand for an array that `load()` reads.

    Args:
      shape: shape of what `load` returns.
      dtype: its dtype; bfloat16 and float8 types are those of ml_dtypes.
      load: reads the array; raises SfdError where the file is damaged.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    load: Callable[[], np.ndarray] = dataclasses.field(repr=False, compare=False)

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self.load(), dtype=dtype)


def is_float(dtype: np.dtype) -> bool:
    """Tell whether weights may have a dtype: real floats of two bytes or more."""
    return np.dtype(dtype).name in ("float16", "bfloat16", "float32", "float64")


def checked_shape(shape: Any, dtype: np.dtype) -> tuple[tuple[int, ...], int]:
    """Return a shape that a file gives and the bytes that such an array takes.

    Raises:
      ValueError: NumPy has no array of this shape.
    """
    shape = tuple(shape[: MAX_RANK + 1]) if isinstance(shape, (list, tuple)) else (-1,)
    if len(shape) > MAX_RANK or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"an array of {len(shape)} dimensions or a negative size")
    if math.prod(max(size, 1) for size in shape) * dtype.itemsize >= 2**63:
        raise ValueError("an array larger than any memory")
    return shape, math.prod(shape) * dtype.itemsize


class Unchanged:
    """Check that a file is still the one whose header was read."""

    def __init__(self, path: Path):
        self.path, self._stamp = path, _stamp(os.stat(path))

    def check(self, stream: BinaryIO) -> None:
        """Raise SfdError where an open file was replaced or written to."""
        if _stamp(os.fstat(stream.fileno())) != self._stamp:
            raise SfdError(f"'{self.path}' changed while it was being read; start again once it is complete")


def _stamp(stat: os.stat_result) -> tuple[int, ...]:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns
