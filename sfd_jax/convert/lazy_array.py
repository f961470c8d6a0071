"""An array that is known by shape and dtype and read from its file only when asked for.

A released checkpoint holds weights, their average and two optimizer moments; a conversion wants a
quarter of it. Readers of this room return trees with `LazyArray` leaves, the engine loads one at a
time, and a dry look (`sfd convert --inspect`) loads none.
"""

import dataclasses
from collections.abc import Callable

import numpy as np


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

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self.load(), dtype=dtype)

    def __setstate__(self, state):
        # Unpickling fills this in for torch tensors; a hostile pickle could otherwise set fields.
        raise TypeError("a LazyArray is made by a reader, never unpickled")
