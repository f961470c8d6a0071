"""Read untrusted npz files: arrays of numbers and text, whose headers are checked against the file's size."""

import contextlib
import math
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from sfd_jax.budget import Budget
from sfd_jax.errors import damage_explained


def read_npz(path: Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Read the named arrays that exist in a file.

    Raises:
      SfdError: the file is damaged or not an npz, or an array holds objects or exceeds `budget.py`.
    """
    arrays = {}
    held, budget = npz_names(path), Budget(path)
    for name in set(names) & set(held):
        with open_array(path, name) as (shape, dtype, fortran, file):
            size = math.prod(shape) * dtype.itemsize
            budget.take(size)
            # Reading to the end of a member checks its checksum.
            data = file.read(size)
            arrays[name] = np.ndarray(shape, dtype, data, order="F" if fortran else "C")
    return arrays


def npz_names(path: Path) -> list[str]:
    """Return the names of the arrays in a file.

    Raises:
      SfdError: it is not an npz.
    """
    with _damage_explained(path), zipfile.ZipFile(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


@contextlib.contextmanager
def open_array(path: Path, name: str) -> Iterator[tuple[tuple[int, ...], np.dtype, bool, IO[bytes]]]:
    """Open an array to read it in parts.

    Yields:
      Its shape, dtype, whether it is in Fortran order, and the stream of its data.

    Raises:
      SfdError: the array is missing, damaged, or holds objects.
    """
    with _damage_explained(path), zipfile.ZipFile(path) as archive:
        info = archive.getinfo(f"{name}.npy")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{name} is compressed by an unusual method")
        with archive.open(info) as file:
            version = np.lib.format.read_magic(file)
            readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            if version not in readers:
                raise ValueError(f"npy format {version} is unknown")
            shape, fortran, dtype = readers[version](file)
            if dtype.hasobject or not all(0 <= size < 2**62 for size in shape) or len(shape) > 64:
                raise ValueError(f"{name} is not an array of numbers: {dtype} {shape}")
            if math.prod(shape) * dtype.itemsize != info.file_size - file.tell():
                raise ValueError(f"the size of {name} does not match its header: {dtype} {shape}")
            yield shape, dtype, fortran, file


def _damage_explained(path: Path) -> contextlib.AbstractContextManager:
    return damage_explained(lambda reason: f"cannot read {path}: it is damaged, or not an npz of arrays ({reason})")
