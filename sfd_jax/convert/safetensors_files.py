"""Read .safetensors files; the safetensors library checks their header."""

import json
import os
from pathlib import Path

import ml_dtypes
import numpy as np

from sfd_jax.convert.lazy_array import LazyArray, Unchanged, checked_shape
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
    """Read a .safetensors file's header; each array is read when needed.

    Args:
      path: the file, of any name.

    Returns:
      Its arrays by key.

    Raises:
      SfdError: no such file, not a complete safetensors file, or an array of an unsupported type.
    """
    import safetensors

    path = Path(path)

    def lazy(file, key) -> LazyArray:
        part = file.get_slice(key)
        dtype = _DTYPES.get(part.get_dtype())
        if dtype is None:
            raise SfdError(f"'{path}': {key[:100]} is of type {part.get_dtype()}, which is not supported")
        shape, _ = checked_shape(part.get_shape(), dtype)

        def load() -> np.ndarray:  # not by the library, which would read the whole header for each array
            start, end = places[key]["data_offsets"]
            try:
                with path.open("rb") as stream:
                    unchanged.check(stream)
                    stream.seek(data + start)
                    return np.fromfile(stream, np.uint8, end - start).view(dtype).reshape(shape)
            except (OSError, ValueError) as error:
                raise SfdError(f"'{path}' cannot be read any more ({error})") from error

        return LazyArray(shape, dtype, load)

    try:
        unchanged = Unchanged(path)
        # The library first: it refuses an impossible header length.
        with safetensors.safe_open(path, "numpy") as file, path.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            data, places = 8 + size, json.loads(stream.read(size))
            return {key: lazy(file, key) for key in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, ValueError, MemoryError, RecursionError) as error:
        raise SfdError(
            f"'{path}' is not a complete safetensors file ({error!s:.200}); copy or download it again"
        ) from error
