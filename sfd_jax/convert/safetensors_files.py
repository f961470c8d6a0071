"""Read .safetensors files; the library checks their header."""

import contextlib
import os
from pathlib import Path

import ml_dtypes
import numpy as np

from sfd_jax.convert.lazy_array import LazyArray, checked_shape
from sfd_jax.errors import SfdError

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


def read_safetensors(path: str | os.PathLike) -> dict[str, LazyArray]:
    """Read a .safetensors file's header; each array is read when asked for.

    Args:
      path: the file, of any name.

    Returns:
      Its arrays by key.

    Raises:
      SfdError: no such file, no complete safetensors file, or an array of an unsupported type.
    """
    import safetensors

    path = Path(path)

    @contextlib.contextmanager
    def opened():
        try:
            with safetensors.safe_open(path, "numpy") as file:
                yield file
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise SfdError(
                f"'{path}' is no complete safetensors file ({error!s:.200}); copy or download it again"
            ) from error

    def lazy(file, key) -> LazyArray:
        part = file.get_slice(key)
        dtype = _DTYPES.get(part.get_dtype())
        if dtype is None:
            raise SfdError(f"'{path}': {key[:100]} is of type {part.get_dtype()}, which is not supported")
        shape, _ = checked_shape(part.get_shape(), dtype)

        def load() -> np.ndarray:
            with opened() as file:
                array = file.get_tensor(key)
            if array.shape != shape or array.dtype != dtype:
                raise SfdError(f"'{path}' changed while it was being read; start again once it is complete")
            return array

        return LazyArray(shape, dtype, load)

    with opened() as file:
        return {key: lazy(file, key) for key in file.keys()}
