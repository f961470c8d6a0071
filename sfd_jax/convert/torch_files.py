"""Read and write PyTorch's own files (.pt, .pth, .ckpt); reading runs no code and needs no torch.

Two containers are read: the zip archive (torch 1.6 and later) and the older stream (which
pytorch-fid's Inception weights still use). Both hold a pickle, which `pickles.py` reads as data, and
storages: flat arrays that tensors are views of. A tensor is read when it is loaded, and only from the
part of the storage that it covers, so that many views of one storage cost no more than one
array each. Only `write_torch_file` needs torch.
"""

import contextlib
import dataclasses
import io
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from sfd_jax.budget import Budget
from sfd_jax.convert.lazy_array import LazyArray, Unchanged, checked_shape
from sfd_jax.convert.pickles import Name, Record, plain, refusal, unpickle
from sfd_jax.errors import SfdError, damage_explained, needs_extra


def read_torch_file(path: str | os.PathLike) -> Any:
    """Read a file that `torch.save` wrote, without running any code from it.

    Args:
      path: a .pt, .pth or .ckpt file of either container.

    Returns:
      The saved tree of dicts, lists, tuples and scalars, with `LazyArray` leaves for tensors; an
      OmegaConf config is a plain dict, objects of other classes are `Record`s.

    Raises:
      SfdError: no such file, not a PyTorch file, damaged or truncated, more memory than `budget.py`
        allows, or a name that would be called (the message gives it).
    """
    path = Path(path)
    if not path.is_file():
        raise SfdError(f"no file '{path}'")
    with _damage_explained(path):
        with path.open("rb") as stream:
            start = stream.read(len(_LEGACY_MAGIC))
        if start == _LEGACY_MAGIC:
            return _read_legacy(path)
        if zipfile.is_zipfile(path):
            return _read_zip(path)
    if start[:4] == b"PK\x03\x04":
        raise SfdError(f"'{path}' is cut short: its zip directory, at the end, is missing; copy or download it again")
    raise SfdError(
        f"'{path}' is not a PyTorch file: neither the zip archive nor the older stream "
        "(files from before torch 0.1.10 have to be saved again with a newer torch)"
    )


def write_torch_file(path: str | os.PathLike, tree: Any) -> None:
    """Write a tree of dicts, lists and scalars with NumPy leaves as PyTorch writes it.

    Raises:
      SfdError: torch is not installed.
    """
    with needs_extra("torch", f"writing '{path}' (to a name that ends in .safetensors it would not)"):
        import torch

    def tensors(node):
        if isinstance(node, dict):
            return {key: tensors(value) for key, value in node.items()}
        if isinstance(node, (list, tuple)):
            return type(node)(tensors(value) for value in node)
        if isinstance(node, np.ndarray):
            array = np.array(node, order="C")  # a writable copy that torch may own; keeps rank 0
            if array.dtype == ml_dtypes.bfloat16:  # torch takes no bfloat16 from NumPy
                return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
            return torch.from_numpy(array)
        return node

    torch.save(tensors(tree), path)


# --- Storages and tensors ----------------------------------------------------------------------------

_STORAGE_DTYPES = {
    f"{name}Storage": np.dtype(dtype)
    for name, dtype in {
        **{"Double": "f8", "Float": "f4", "Half": "f2", "BFloat16": ml_dtypes.bfloat16, "Untyped": "u1"},
        **{"Long": "i8", "Int": "i4", "Short": "i2", "Char": "i1", "Byte": "u1", "Bool": "?"},
        **{"ComplexFloat": "c8", "ComplexDouble": "c16"},
    }.items()
}
# Types without a storage class of their own: `_rebuild_tensor_v3` names them beside an UntypedStorage.
_FLOATS = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")
_TENSOR_DTYPES = {f"torch.{name}": np.dtype(name) for name in ("uint16", "uint32", "uint64")}
_TENSOR_DTYPES |= {f"torch.{name}": np.dtype(getattr(ml_dtypes, name)) for name in _FLOATS}
_CHUNK = 2**22  # bytes read at a time where only their checksum is needed


class _File:
    """The file that is being read, and its memory budget."""

    def __init__(self, path: Path):
        self.path, self.budget, self.unchanged = path, Budget(path), Unchanged(path)


class _Bytes:
    """A range of bytes in a file, read in parts.

    Args:
      file: the file.
      start: where in the file.
      size: how many, unpacked.
      crc: CRC32 of all of them, compared when they are first read; None where the container has none.
      packed: how many in the file, where they are compressed (deflate).
    """

    def __init__(self, file: _File, start: int, size: int, crc: int | None = None, packed: int | None = None):
        self.file, self.start, self.size, self.crc, self.packed = file, start, size, crc, packed
        self._all: np.ndarray | None = None
        file.budget.take(0 if packed is None else size)

    def read(self, first: int, last: int, wanted: int) -> np.ndarray:
        """Return the bytes first..last, of which `wanted` will be used."""
        sparse = self.packed is not None or last - first > 4 * wanted
        if self._all is None and (first, last) != (0, self.size) and sparse:
            # A view of every hundredth number is one of a hundred such views: keep all bytes in memory then.
            self.file.budget.take(self.size)
            self._all = self.read(0, self.size, self.size)
        if self._all is not None:
            return self._all[first:last]
        with _damage_explained(self.file.path), self.file.path.open("rb") as stream:
            self.file.unchanged.check(stream)
            if self.packed is not None:
                packed = _read_exactly(stream, self.start, self.packed)
                data = np.frombuffer(zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, self.size), np.uint8)
            else:
                if self.crc is not None and (first, last) != (0, self.size):
                    crc = 0
                    for start in range(0, self.size, _CHUNK):
                        part = _read_exactly(stream, self.start + start, min(_CHUNK, self.size - start))
                        crc = zlib.crc32(part, crc)
                    self._compare(crc)
                data = _read_exactly(stream, self.start + first, last - first)
            if len(data) != last - first:
                raise ValueError("a storage is shorter than it should be")
            if self.crc is not None:
                self._compare(zlib.crc32(data))
            return data

    def _compare(self, crc: int) -> None:
        if crc != self.crc:
            raise ValueError("the checksum of a storage is wrong")
        self.crc = None


def _read_exactly(stream, start: int, size: int) -> np.ndarray:
    stream.seek(start)
    data = np.fromfile(stream, np.uint8, size)
    if len(data) != size:
        raise ValueError(f"{size - len(data):,} bytes are missing")
    return data


@dataclasses.dataclass(frozen=True)
class _Storage:
    """A flat array: `length` numbers of `dtype`, the first at byte `start` of `data`."""

    dtype: np.dtype
    length: int
    data: _Bytes
    start: int = 0


def _builders(file: _File) -> dict[str, Callable]:
    """Return replacements for torch's functions that make tensors and parameters."""

    def tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> LazyArray:
        if not isinstance(storage, _Storage):
            raise ValueError("a tensor without storage")
        dtype = storage.dtype
        shape, size = checked_shape(shape, dtype)
        file.budget.take(size)
        if not isinstance(strides, (list, tuple)) or len(strides) != len(shape):
            raise ValueError("a tensor without strides")
        if not all(type(number) is int and number >= 0 for number in (offset, *strides)):
            raise ValueError("a tensor with a negative stride")
        # The stride of an axis of length 1 is arbitrary.
        strides = [stride if length > 1 else 0 for length, stride in zip(shape, strides, strict=True)]
        last = offset + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
        if size and last >= storage.length:
            raise ValueError("a tensor larger than its storage")

        def load() -> np.ndarray:
            if not size:
                return np.zeros(shape, dtype)
            width = dtype.itemsize
            data = storage.data.read(storage.start + offset * width, storage.start + (last + 1) * width, size)
            # ndarray() checks the strides against the buffer once more; as_strided would not.
            return np.ndarray(shape, dtype, data, 0, [stride * width for stride in strides])

        return LazyArray(shape, dtype, load)

    def tensor_v3(storage, offset, shape, strides, _requires_grad, _hooks, dtype, *_) -> LazyArray:
        kind = _TENSOR_DTYPES.get(dtype.name if isinstance(dtype, Name) else "")
        if kind is None:
            raise SfdError(f"refused: '{file.path}' holds a tensor of {dtype!r:.100}, which is not supported")
        if not isinstance(storage, _Storage):
            raise ValueError("a tensor without storage")
        length = storage.length * storage.dtype.itemsize // kind.itemsize
        return tensor(_Storage(kind, length, storage.data, storage.start), offset, shape, strides)

    parameters = ("_utils._rebuild_parameter", "_utils._rebuild_parameter_with_state", "nn.parameter.Parameter")
    return {f"torch.{name}": lambda tensor=None, *_: tensor for name in (*parameters, "nn.parameter.Buffer")} | {
        "torch._utils._rebuild_tensor": tensor,
        "torch._utils._rebuild_tensor_v2": tensor,
        "torch._utils._rebuild_tensor_v3": tensor_v3,
    }


def _persistent(file: _File, storage: Callable) -> Callable:
    """Return a function that resolves a pickle's persistent ids by `storage(dtype, key, length, view)`."""

    def load(persistent_id: Any) -> _Storage:
        kind, storage_type, key, _, length, *view = persistent_id
        if kind != "storage" or not isinstance(storage_type, Name):
            raise SfdError(
                f"refused: '{file.path}' holds a pickled {kind!s:.20}, not only weights; "
                "load it with torch and save its state dict"
            )
        dtype = _STORAGE_DTYPES.get(storage_type.name.rpartition(".")[2])
        if dtype is None:
            raise SfdError(
                f"refused: '{file.path}' holds numbers of {storage_type.name[:100]}, which is not supported; "
                "load it with torch and save ordinary tensors"
            )
        if type(length) is not int or length < 0 or not isinstance(key, (str, int)):
            raise ValueError("a storage of unknown size")
        return storage(dtype, str(key), length, view[0] if view else None)

    return load


def _tree(read: Any, file: _File) -> Any:
    tree = plain(read, file.budget)
    if isinstance(tree, Record):  # a whole module, or an attack
        raise refusal(file.path, tree.name)
    return tree


# --- The two containers ------------------------------------------------------------------------------


def _read_zip(path: Path) -> Any:
    """Read torch's zip archive: `NAME/data.pkl` and one member a storage, `NAME/data/KEY`."""
    file = _File(path)
    with path.open("rb") as stream, zipfile.ZipFile(stream) as archive:
        listed = archive.infolist()
        members = {member.filename: member for member in listed}
        if len(members) != len(listed):
            raise ValueError("two members of one name")
        pickles = [name for name in members if name.split("/")[1:] == ["data.pkl"]]
        if len(pickles) != 1:
            raise SfdError(f"'{path}' is a zip archive but not a PyTorch file of weights (it has no data.pkl)")
        root = pickles[0].removesuffix("data.pkl")
        if f"{root}constants.pkl" in members:
            raise SfdError(f"refused: '{path}' is a TorchScript program, not a file of weights")
        # With torch.serialization.set_crc32_options(False) torch writes no checksums, and all are 0.
        summed = members[pickles[0]].CRC != 0
        found: dict[str, _Bytes] = {}

        def member(name: str) -> _Bytes:
            """Find a member's bytes; zipfile's own reader neither seeks nor bounds what it unpacks."""
            if name not in found:
                info = members[name]
                if info.flag_bits & 1:
                    raise SfdError(f"'{path}' is encrypted ({name}); unpack it and zip it again without a password")
                if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise SfdError(f"'{path}' is compressed by an unusual method ({name}); save it again with torch")
                stream.seek(info.header_offset)
                signature, name_length, extra_length = struct.unpack("<4s22xHH", stream.read(30))
                start = stream.tell() + name_length + extra_length
                if signature != b"PK\x03\x04" or start + info.compress_size > file.budget.size:
                    raise ValueError(f"{name} is not where it should be")
                stored = info.compress_type == zipfile.ZIP_STORED
                if stored and info.compress_size != info.file_size:
                    raise ValueError(f"{name} is of the wrong size")
                packed = None if stored else info.compress_size
                found[name] = _Bytes(file, start, info.file_size, info.CRC if summed else None, packed)
            return found[name]

        def content(name: str) -> bytes:
            data = member(name)
            file.budget.take(data.size)
            return data.read(0, data.size, data.size).tobytes()

        def storage(dtype: np.dtype, key: str, length: int, view: None) -> _Storage:
            name = f"{root}data/{key}"
            if name not in members or members[name].file_size != length * dtype.itemsize:
                raise ValueError(f"storage {key} is missing or of the wrong size")
            return _Storage(dtype, length, member(name))

        if f"{root}byteorder" in members and content(f"{root}byteorder") != b"little":
            raise SfdError(f"'{path}' was written on a big-endian machine, which is not supported")
        pickled = io.BytesIO(content(pickles[0]))
        return _tree(unpickle(pickled, file.budget, _builders(file), _persistent(file, storage)), file)


# torch's first pickle of the older stream: the integer 0x1950a86a20f9469cfc6c under protocol 2.
_LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


class _Stream:
    """A file whose `read` allocates no more than the file holds, whatever a pickle asks for."""

    def __init__(self, stream, size: int):
        self.readline, self._stream, self._size = stream.readline, stream, size

    def read(self, count: int) -> bytes:
        return self._stream.read(count if count < 2**16 else min(count, self._size - self._stream.tell()))


def _read_legacy(path: Path) -> Any:
    """Read the stream: magic, version, system, tree, storage keys (all pickles), storages."""
    file = _File(path)
    storages: dict[str, _Storage] = {}

    def storage(dtype: np.dtype, key: str, length: int, view: Any) -> _Storage:
        if key not in storages:
            storages[key] = _Storage(dtype, length, _Bytes(file, 0, length * dtype.itemsize))
        whole = storages[key]
        if (whole.dtype, whole.length) != (dtype, length):
            raise ValueError(f"storage {key} is of two types")
        if view is None:
            return whole
        _, start, size = view  # a storage that is a view of another
        if not (type(start) is type(size) is int and 0 <= start <= start + size <= length):
            raise ValueError(f"a view beyond storage {key}")
        return _Storage(dtype, size, whole.data, start * dtype.itemsize)

    with path.open("rb") as stream:
        reader = _Stream(stream, file.budget.size)
        for _ in range(2):  # magic number, protocol version
            unpickle(reader, file.budget)
        system = unpickle(reader, file.budget)
        if not system.get("little_endian", True):
            raise SfdError(f"'{path}' was written on a big-endian machine, which is not supported")
        tree = _tree(unpickle(reader, file.budget, _builders(file), _persistent(file, storage)), file)
        keys = [str(key) for key in unpickle(reader, file.budget) if isinstance(key, (str, int))]
        if sorted(keys) != sorted(storages):
            raise ValueError("storages are missing")
        for key in keys:
            length = int.from_bytes(stream.read(8), "little")
            data = storages[key].data
            data.start = stream.tell()
            if length != storages[key].length or data.start + data.size > file.budget.size:
                raise ValueError(f"storage {key} is missing or of the wrong size")
            stream.seek(data.size, os.SEEK_CUR)
        return tree


def _damage_explained(path: Path) -> contextlib.AbstractContextManager:
    return damage_explained(lambda reason: f"'{path}' is damaged or cut short ({reason}); copy or download it again")
