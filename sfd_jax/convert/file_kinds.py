"""Identify a file or folder of weights by its content, and by its name only where the content is ambiguous.

Two kinds are read: PyTorch files and safetensors, single or sharded. Other common kinds are listed
with advice on what to do. To add a kind, add a line to a table.
"""

import codecs
import fnmatch
import json
import os
import re
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from sfd_jax.errors import SfdError


class Kind(NamedTuple):
    """What a file or folder is, and what to do if it cannot be read."""

    what: str
    advice: str = ""


TORCH, SAFETENSORS, SHARDED = map(Kind, ("a PyTorch file", "a safetensors file", "sharded weights"))
NPZ = "a NumPy archive (npz)"

_AGAIN = "download or copy the file itself again"
_UNPACK = "unpack it and give the file inside"
_EXPORT = "only PyTorch files and safetensors are read: export one of them with the program that wrote this"


def _begins(*marks: bytes) -> Callable[[bytes], bool]:
    return lambda head: head.startswith(marks)


def _is_safetensors(head: bytes) -> bool:
    # Eight bytes of header length, below 2^32 in practice, then JSON.
    return head[4:9] == b"\0\0\0\0{" and any(head[:4])


# First bytes of a file -> what it is.
_FILES: tuple[tuple[Callable[[bytes], Any], Kind], ...] = (
    (lambda head: not head, Kind("an empty file", _AGAIN)),
    (lambda head: not any(head), Kind("zeros from its beginning, as an unfinished download leaves it", _AGAIN)),
    (
        _begins(b"version https://git-lfs", b"version https://hawser", b"# xet version"),
        Kind("a Git LFS pointer, not the file itself", f"run `git lfs pull` in its clone, or {_AGAIN}"),
    ),
    (lambda head: b"annex/objects/" in head[:200], Kind("a git-annex pointer", "run `git annex get` on it")),
    (
        lambda head: re.match(rb"(\xef\xbb\xbf)?\s*<(!doctype|html|head|body|script|!--|\?xml)", head, re.I),
        Kind("a web page, such as a log-in or a download warning", _AGAIN),
    ),
    (_is_safetensors, SAFETENSORS),
    (_begins(b"\x1f\x8b"), Kind("compressed with gzip", "unpack it with gunzip first")),
    (_begins(b"\x28\xb5\x2f\xfd"), Kind("compressed with zstd", "unpack it with `zstd -d` first")),
    (_begins(b"\xfd7zXZ\0"), Kind("compressed with xz", "unpack it with unxz first")),
    (_begins(b"BZh"), Kind("compressed with bzip2", "unpack it with bunzip2 first")),
    (_begins(b"\x04\x22\x4d\x18"), Kind("compressed with lz4", "unpack it with unlz4 first")),
    (_begins(b"7z\xbc\xaf\x27\x1c", b"Rar!"), Kind("a 7z or RAR archive", _UNPACK)),
    (lambda head: head[257:262] == b"ustar", Kind("a tar archive", _UNPACK)),
    (_begins(b"\x89HDF\r\n\x1a\n"), Kind("an HDF5 file (Keras, MATLAB)", _EXPORT)),
    (_begins(b"GGUF", b"ggml", b"lmgg", b"tjgg"), Kind("a GGUF file of quantized weights", _EXPORT)),
    (_begins(b"\x93NUMPY"), Kind("a single NumPy array (npy)", _EXPORT)),
    (lambda head: head[4:8] == b"TFL3", Kind("a TensorFlow Lite model", _EXPORT)),
    (
        lambda head: head[0] == 8 and any(name in head[:64] for name in (b"pytorch", b"onnx")),
        Kind("an ONNX model", _EXPORT),
    ),
    (lambda head: re.match(rb"[\x81-\x8f][\xa0-\xbf]", head), Kind("a msgpack file (Flax)", _EXPORT)),
    (_begins(b"PAR1"), Kind("a Parquet table", _EXPORT)),
    (_begins(b"\x89PNG", b"\xff\xd8\xff", b"GIF8"), Kind("an image", "give the file of weights")),
    (
        # torch.save's older stream begins with torch's magic number as a pickle.
        lambda head: re.match(rb"\x80[\x02-\x05](?!(\x95.{8})?\x8a\nl\xfc\x9cF)", head, re.DOTALL),
        Kind("a Python pickle that torch.save did not write", _EXPORT),
    ),
)

# Kinds that only their names identify.
_NAMES = {
    "*.distcp": Kind("one part of a PyTorch distributed checkpoint (DCP)", "give its folder, for advice"),
    "*.data-?????-of-?????": Kind("one part of a TensorFlow checkpoint", _EXPORT),
}

_GATHER_DCP = "gather it with `python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE.pt`"
_GATHER_ZERO = "gather it with DeepSpeed's zero_to_fp32.py in the checkpoint's folder"

# Names inside a folder, all of which must exist -> what it is.
_OURS = "sampling and evaluation read it as it is, --export=FILE writes it in the released format"
_FOLDERS: tuple[tuple[tuple[str, ...], Kind], ...] = (
    (("metadata/metadata", "params/*"), Kind("already a checkpoint of sfd_jax", _OURS)),
    (("*/metadata/metadata", "*/params/*"), Kind("a folder of checkpoints of sfd_jax", _OURS)),
    (("checkpoints/*/params/*",), Kind("a training run of sfd_jax", _OURS)),
    ((".metadata", "*.distcp"), Kind("a PyTorch distributed checkpoint (DCP)", _GATHER_DCP)),
    (("*.distcp",), Kind("a PyTorch distributed checkpoint (DCP) without its .metadata", "copy the whole folder")),
    (("*/.metadata", "*/*.distcp"), Kind("a folder around a PyTorch distributed checkpoint (DCP)", _GATHER_DCP)),
    (("zero_to_fp32.py",), Kind("a DeepSpeed checkpoint", _GATHER_ZERO)),
    (("global_step*/*_states.pt",), Kind("a DeepSpeed checkpoint", _GATHER_ZERO)),
    (("*_model_states.pt",), Kind("part of a DeepSpeed checkpoint", _GATHER_ZERO)),
    (("*.data-?????-of-?????",), Kind("a TensorFlow checkpoint", _EXPORT)),
    (("saved_model.pb",), Kind("a TensorFlow SavedModel", _EXPORT)),
    (("_CHECKPOINT_METADATA",), Kind("an Orbax checkpoint of another program", _EXPORT)),
    (("_METADATA",), Kind("an Orbax checkpoint of another program", _EXPORT)),
    (("manifest.ocdbt",), Kind("an Orbax checkpoint of another program", _EXPORT)),
    (("*/_METADATA",), Kind("a folder of Orbax checkpoints of another program", _EXPORT)),
    (("model_index.json",), Kind("a Diffusers pipeline of several networks", "give the folder of one of them")),
)

_WEIGHTS = ("*.safetensors", "*.pt", "*.pth", "*.ckpt", "*.bin")
# Files that trainers write beside the weights.
_BESIDE = ("optimizer*", "scheduler*", "scaler*", "sampler*", "dl_state*", "rng_state*", "random*", "training_args*")
_HEAD = 4096
_SHARD = re.compile(r"-(\d{5,})-of-(\d{5,})\.(safetensors|bin|pt)$")


def fits(name: str, patterns: Iterable[str]) -> bool:
    """Tell whether a name fits one of several patterns of `fnmatch`."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def find_weights(path: str | os.PathLike, whole: bool = True) -> tuple[Path, Kind]:
    """Find the file of weights that a user's path means, and its kind.

    Args:
      path: a file, or a folder that holds one file of weights or one index of shards.
      whole: refuse a single shard of several.

    Returns:
      The file, and TORCH, SAFETENSORS or SHARDED (then the file is the index).

    Raises:
      SfdError: no such path, or it is something else; the message says what it is and what to do.
    """
    path = Path(path)
    if path.is_dir():
        path = _only_file(path)
    kind = kind_of(path)
    if kind.advice:
        raise SfdError(f"'{path}' is {kind.what}; {kind.advice}")
    if whole and kind != SHARDED and (shard := _SHARD.search(path.name)) and int(shard[2]) > 1:
        raise SfdError(
            f"'{path}' is shard {int(shard[1])} of {int(shard[2])}: give the folder that holds all of them "
            "and their *.index.json"
        )
    return path, kind


def kind_of(path: Path) -> Kind:
    """Return the kind of a file: TORCH, SAFETENSORS, SHARDED (an index), or one that is not read, with advice.

    Where the first bytes are ambiguous the suffix decides, and the reader of that kind reports what is wrong.

    Raises:
      SfdError: there is no such file, or it cannot be read.
    """
    if not path.is_file():
        raise SfdError(f"'{path}' is neither a file nor a folder" if path.exists() else f"no file '{path}'")
    try:
        with path.open("rb") as stream:
            head = stream.read(_HEAD)
    except OSError as error:
        raise SfdError(f"'{path}' cannot be read: {error.strerror or error}") from error
    for pattern, kind in _NAMES.items():
        if fits(path.name, (pattern,)):
            return kind
    for test, kind in _FILES:
        if test(head):
            return kind
    if head.startswith(b"PK"):
        return _zip_kind(path)
    if _is_text(head):
        if b'"weight_map"' in head:
            return SHARDED
        beginning = repr(" ".join(head.decode("utf-8", "replace").split())[:60])
        return Kind(f"text that begins with {beginning}", f"give the file of weights, or {_AGAIN}")
    return SAFETENSORS if path.suffix == ".safetensors" and head[:1] != b"\x80" else TORCH


def _zip_kind(path: Path) -> Kind:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return TORCH  # a truncated zip; the reader reports it
    if any(name.endswith("data.pkl") for name in names):
        return TORCH
    held = ", ".join(repr(name.removesuffix(".npy")) for name in names[:4]) or "nothing"
    if names and all(name.endswith(".npy") for name in names):
        return Kind(f"{NPZ} of {held}", _EXPORT)
    return Kind(f"a zip archive that holds {held}", _UNPACK)


def _only_file(folder: Path) -> Path:
    """Return the one file of weights or index of shards in a folder.

    Raises:
      SfdError: the folder is of a kind that is not read, or holds no such file or several.
    """
    for names, kind in _FOLDERS:
        if all(next(folder.glob(name), None) for name in names):
            raise SfdError(f"'{folder}' is {kind.what}; {kind.advice}")
    files = sorted(path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    indices = [name for name in files if name.endswith(".index.json")]
    shards = [name for name in files if (match := _SHARD.search(name)) and int(match[2]) > 1]
    if shards and not indices:
        raise SfdError(f"'{folder}' holds shards ({shards[0]} ...) but not their *.index.json; copy it there too")
    weights = [name for name in files if fits(name, _WEIGHTS) and not fits(name, _BESIDE) and name not in shards]
    found = indices + weights
    if len(found) == 1:
        return folder / found[0]
    if found:
        raise SfdError(f"'{folder}' holds several files of weights; give one of them: {', '.join(found)}")
    held = ", ".join(sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())[:8]) or "nothing"
    raise SfdError(f"'{folder}' is a folder without a file of weights (it holds {held}); give the file")


def shards_of(index: Path) -> dict[str, list[str]]:
    """Read an index of shards: the arrays that each shard must hold, by the shard's file name.

    Raises:
      SfdError: no such index, or missing shards, all of which are named.
    """
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        pairs = [(str(key), os.fspath(name)) for key, name in weight_map.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SfdError(f"'{index}' is not an index of shards (it needs 'weight_map', file names by array)") from error
    shards: dict[str, list[str]] = {}
    for key, name in pairs:
        if name != Path(name).name or name in ("", ".."):
            raise SfdError(f"'{index}' points at '{name}', which is not a file beside it")
        shards.setdefault(name, []).append(key)
    missing = [name for name in shards if not (index.parent / name).is_file()]
    if missing or not shards:
        raise SfdError(f"'{index}': missing shards {', '.join(missing) or '(it names none)'}; copy them beside it")
    return shards


def _is_text(head: bytes) -> bool:
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)  # the last character may be cut
    except UnicodeDecodeError:
        return False
    return all(char.isprintable() or char in "\r\n\t" for char in text.removeprefix("\ufeff"))
