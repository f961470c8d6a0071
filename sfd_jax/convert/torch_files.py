"""Read and write PyTorch's own files (.pt, .pth, .ckpt); reading runs no code and needs no torch.

Such a file is a pickle, and a pickle can name any function and have it called. Here a name is
looked up in a short list only; what it stands for is a recorder that keeps its arguments and does
nothing with them (tensors, OmegaConf configs, optimizer odds and ends). Any other name is refused,
and the error says which. So nothing of the file is ever imported or called.

Two containers are understood: the zip archive (torch 1.6 and later) and the stream before it
(which pytorch-fid's Inception weights still use). Only `write_torch_file` needs torch.
"""

import contextlib
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from sfd_jax.convert.lazy_array import LazyArray
from sfd_jax.errors import SfdError


def read_torch_file(path: str | os.PathLike) -> Any:
    """Read a file that `torch.save` wrote, running nothing of it.

    Args:
      path: a .pt, .pth or .ckpt file of either container.

    Returns:
      The saved tree of dicts, lists, tuples and scalars, with `LazyArray` leaves for tensors; an
      OmegaConf config is a plain dict, other objects are `Record`s.

    Raises:
      SfdError: no such file, not such a file, damaged or cut short, or it names something that is
        not on the list (the message gives the name).
    """
    path = Path(path)
    if not path.is_file():
        raise SfdError(f"no file '{path}'")
    with _damage_explained(path):
        if zipfile.is_zipfile(path):
            return _read_zip(path)
        with path.open("rb") as stream:
            start = stream.read(len(_LEGACY_MAGIC))
        if start == _LEGACY_MAGIC:
            return _read_legacy(path)
    if start[:4] == b"PK\x03\x04":
        raise SfdError(
            f"'{path}' is cut short: its zip directory, which stands at the end, is missing; "
            "copy or download it again"
        )
    raise SfdError(
        f"'{path}' is not a PyTorch file: neither the zip archive nor the older stream "
        "(files from before torch 0.1.10 have to be saved again with a newer torch)"
    )


def write_torch_file(path: str | os.PathLike, tree: Any) -> None:
    """Write a tree of dicts, lists and scalars with NumPy leaves as PyTorch writes it.

    Raises:
      SfdError: torch is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise SfdError(
            f"writing '{path}' needs PyTorch, an optional extra: install sfd_jax[torch] "
            "(a CPU build is enough), or export to a name that ends in .safetensors"
        ) from error

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

    path = Path(path)
    unfinished = path.with_name(path.name + ".unfinished")
    torch.save(tensors(tree), unfinished)
    unfinished.rename(path)


class _Sealed(type):
    """Forbid changing the recorders: a pickle can set attributes on whatever it was handed."""

    def __setattr__(cls, name, value):
        raise SfdError(f"refused: it tries to change {cls.__name__}")


class Record(metaclass=_Sealed):
    """Keep the name, arguments and state of an object that was not built."""

    name = ""

    def __init__(self, *args, **kwargs):
        self.args, self.state = args, None

    def __setstate__(self, state):
        self.state = state

    def __repr__(self):
        return f"<{self.name}>"


class _Dict(dict, metaclass=_Sealed):
    """Stand for OrderedDict and defaultdict; what else they carry (`_metadata`) is dropped."""

    def __init__(self, *args):
        super().__init__(args[0] if args and isinstance(args[0], list) else ())

    def __setstate__(self, state):
        pass


# Names whose recorder is inert. The list is what training scripts of this field leave behind in
# their checkpoints; only names that are types or plain constructors belong here.
_INERT = {
    "builtins": "dict list tuple set frozenset int float complex bool str bytes long unicode",
    "typing": "Any Union Optional Dict List Tuple",
    "collections": "Counter deque",
    "argparse": "Namespace",
    "pathlib": "Path PosixPath PurePosixPath WindowsPath PureWindowsPath",
    "_codecs": "encode",  # how Python 3 stores bytes for Python 2
    "numpy": "dtype ndarray",
    "numpy.core.multiarray": "scalar _reconstruct",
    "numpy._core.multiarray": "scalar _reconstruct",
    "torch": "Size device float16 float32 float64 bfloat16 int8 int16 int32 int64 uint8 bool",
    "torch.nn.parameter": "Parameter",
    "omegaconf.dictconfig": "DictConfig",
    "omegaconf.listconfig": "ListConfig",
    "omegaconf.base": "ContainerMetadata Metadata SCMode",
    "omegaconf.nodes": "AnyNode StringNode IntegerNode FloatNode BooleanNode EnumNode BytesNode "
    "PathNode",
    "pytorch_lightning.callbacks.model_checkpoint": "ModelCheckpoint",
    "pytorch_lightning.callbacks.early_stopping": "EarlyStopping",
    "pytorch_lightning.utilities.parsing": "AttributeDict",
}
_INERT = {module: frozenset(names.split()) for module, names in _INERT.items()}

_STORAGE_DTYPES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}


class _Storage:
    """A flat run of numbers in the file; `read` returns its bytes."""

    def __init__(self, dtype: np.dtype, length: int, read: Callable[[], bytes]):
        self.dtype, self.length, self.read = dtype, length, read

    def __setstate__(self, state):
        raise ValueError("a storage with a state")  # or a pickle could set `length` as it likes


class _Tensor(metaclass=_Sealed):
    """Answer torch._utils._rebuild_tensor_v2: a strided view of a storage, not yet read."""

    def __new__(cls, storage, offset, shape, strides, *_) -> LazyArray:
        shape, strides = tuple(shape), tuple(strides)
        numbers = (offset, *shape, *strides)
        if not isinstance(storage, _Storage) or len(shape) != len(strides):
            raise ValueError("a tensor without storage")
        if not all(isinstance(number, int) and number >= 0 for number in numbers):
            raise ValueError("a tensor with a negative size")
        empty = 0 in shape
        last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides))
        if not empty and last >= storage.length:
            raise ValueError("a tensor larger than its storage")

        def load() -> np.ndarray:
            if empty:
                return np.zeros(shape, storage.dtype)
            # ndarray() checks the strides against the buffer once more; as_strided would not.
            width = storage.dtype.itemsize
            steps = tuple(stride * width for stride in strides)
            return np.ndarray(shape, storage.dtype, storage.read(), offset * width, steps)

        return LazyArray(shape, storage.dtype, load)


class _Parameter(metaclass=_Sealed):
    """Answer torch._utils._rebuild_parameter: the tensor itself."""

    def __new__(cls, tensor, *_):
        return tensor


# The recorders, made once; find_class below hands out nothing else.
_RECORDERS = {
    "collections.OrderedDict": _Dict,
    "collections.defaultdict": _Dict,
    "torch._utils._rebuild_tensor": _Tensor,
    "torch._utils._rebuild_tensor_v2": _Tensor,
    "torch._utils._rebuild_parameter": _Parameter,
} | {
    f"{module}.{name}": _Sealed(name, (Record,), {"name": f"{module}.{name}"})
    for module, names in (_INERT | {"torch": _INERT["torch"] | set(_STORAGE_DTYPES)}).items()
    for name in names
}


class _Unpickler(pickle.Unpickler):
    """Unpickle with recorders in place of every name; `storage` answers persistent ids."""

    def __init__(self, stream: BinaryIO, path: Path, storage: Callable | None = None):
        super().__init__(stream, encoding="utf-8")
        self._path, self._storage = path, storage

    def find_class(self, module: str, name: str) -> Any:
        module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
        recorder = _RECORDERS.get(f"{module}.{name}")
        if recorder is None:
            raise SfdError(
                f"refused: '{self._path}' asks for {module}.{name}, which is not on the list of "
                "harmless names; no code is run from a checkpoint, and nothing of it was loaded "
                "(if you trust the file, load it with torch and save its state dict alone)"
            )
        return recorder

    def persistent_load(self, persistent_id: Any) -> _Storage:
        kind, storage_type, key, _, length, *view = persistent_id
        if kind != "storage" or self._storage is None:
            raise SfdError(
                f"refused: '{self._path}' holds a pickled {kind}, not weights alone; "
                "load it with torch and save its state dict"
            )
        dtype = _STORAGE_DTYPES.get(storage_type.name.removeprefix("torch."))
        if dtype is None or not isinstance(length, int) or length < 0:
            raise ValueError("a storage of unknown type")
        return self._storage(dtype, str(key), length, view[0] if view else None)


def _read_zip(path: Path) -> Any:
    """Read torch's zip archive: `NAME/data.pkl` and one member a storage, `NAME/data/KEY`."""
    with zipfile.ZipFile(path) as archive:
        members = {member.filename: member for member in archive.infolist()}
        pickles = [name for name in members if name.split("/")[1:] == ["data.pkl"]]
        if len(pickles) != 1:
            raise SfdError(
                f"'{path}' is a zip archive but not a PyTorch file of weights (it has no data.pkl)"
            )
        root = pickles[0].removesuffix("data.pkl")
        if f"{root}constants.pkl" in members:
            raise SfdError(f"refused: '{path}' is a TorchScript program, not a file of weights")
        if f"{root}byteorder" in members and archive.read(f"{root}byteorder") != b"little":
            raise SfdError(f"'{path}' was written on a big-endian machine, which is not supported")

        def storage(dtype: np.dtype, key: str, length: int, view: None) -> _Storage:
            member = members.get(f"{root}data/{key}")
            if member is None or member.file_size != length * dtype.itemsize:
                raise ValueError(f"storage {key} is missing or of the wrong size")

            def read() -> bytes:
                # Through zipfile, which checks the member's CRC.
                with _damage_explained(path), zipfile.ZipFile(path) as archive:
                    return archive.read(member)

            return _Storage(dtype, length, read)

        with archive.open(pickles[0]) as stream:
            return _plain(_Unpickler(stream, path, storage).load())


# torch's first pickle of the older stream: the integer 0x1950a86a20f9469cfc6c under protocol 2.
_LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


def _read_legacy(path: Path) -> Any:
    """Read the stream: magic, version, system, tree, storage keys (all pickles), storages."""
    storages, offsets = {}, {}

    def storage(dtype: np.dtype, key: str, length: int, view: tuple | None) -> _Storage:
        def read() -> bytes:
            with _damage_explained(path), path.open("rb") as stream:
                stream.seek(offsets[key])
                data = stream.read(length * dtype.itemsize)
            if len(data) != length * dtype.itemsize:
                raise SfdError(f"'{path}' is cut short; copy or download it again")
            return data

        whole = storages.setdefault(key, _Storage(dtype, length, read))
        if view is None:
            return whole
        _, start, size = view  # a storage that looks at a part of another

        def read_part() -> bytes:
            return whole.read()[start * dtype.itemsize : (start + size) * dtype.itemsize]

        return _Storage(dtype, size, read_part)

    with path.open("rb") as stream:
        for _ in range(2):  # magic number, protocol version
            _Unpickler(stream, path).load()
        system = _Unpickler(stream, path).load()
        if not system.get("little_endian", True):
            raise SfdError(f"'{path}' was written on a big-endian machine, which is not supported")
        tree = _plain(_Unpickler(stream, path, storage).load())
        end = path.stat().st_size
        for key in map(str, _Unpickler(stream, path).load()):
            length = int.from_bytes(stream.read(8), "little")
            offsets[key] = stream.tell()
            stream.seek(length * storages[key].dtype.itemsize, os.SEEK_CUR)
            if length != storages[key].length or stream.tell() > end:
                raise ValueError(f"storage {key} is missing or of the wrong size")
        if storages.keys() - offsets.keys():
            raise ValueError("storages are missing")
        return tree


def _plain(tree: Any) -> Any:
    """Turn recorders into plain containers: OmegaConf nodes into what they hold."""
    seen: dict[int, Any] = {}  # one result an object, so that shared parts cost nothing

    def walk(node):
        if id(node) in seen:
            return seen[id(node)]
        if isinstance(node, dict):
            result = seen[id(node)] = {}
            result.update((_key(key), walk(value)) for key, value in node.items())
            return result
        if isinstance(node, (list, tuple)):
            result = type(node)(walk(value) for value in node)
        elif isinstance(node, Record) and isinstance(node.state, dict):
            if "_content" in node.state:
                result = walk(node.state["_content"])
            elif "_val" in node.state:
                result = walk(node.state["_val"])
            elif node.name == "argparse.Namespace":
                result = walk(node.state)
            else:
                result = node
        elif isinstance(node, Record) and node.name == "torch.Size":
            result = tuple(node.args[0])
        else:
            result = node
        seen[id(node)] = result
        return result

    return walk(tree)


def _key(key: Any) -> Any:
    return key if isinstance(key, (str, int, float, bool, tuple)) else repr(key)


@contextlib.contextmanager
def _damage_explained(path: Path):
    """Turn whatever a damaged file makes the readers raise into one clear error."""
    try:
        yield
    except SfdError:
        raise
    except FileNotFoundError as error:
        raise SfdError(f"no file '{path}'") from error
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise SfdError(
            f"'{path}' is damaged or cut short ({reason}); copy or download it again"
        ) from error
