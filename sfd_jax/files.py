"""Atomic writes, paths as users give them, and the comparison of a folder's records with those of a run."""

import contextlib
import errno
import hashlib
import json
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sfd_jax.errors import SfdError

PART = ".part"  # what a file is called while it is being written


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike, *, shared: bool = False) -> Iterator[Path]:
    """Yield a temporary path to write to; at the end of the block sync it and rename it to `path`.

    A block that fails leaves no temporary file and does not change an existing `path`. A killed
    process leaves NAME.part, which the next writer of the file overwrites.

    Args:
      path: local file to be made or replaced; its folder exists.
      shared: several hosts may write the file at once, so each uses its own temporary name.

    Raises:
      OSError: as the block or the disk raises it.
    """
    path = Path(path)
    owner = f".{socket.gethostname()}-{os.getpid()}" if shared else ""
    part = path.with_name(f"{path.name}{owner}{PART}")
    try:
        yield part
        sync(part)
        os.replace(part, path)
        sync(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = os.fspath(path)  # a failed write does not know it
        raise


def disk_fault(error: BaseException | None) -> str | None:
    """Return a sentence where an error or its cause is that a disk is full or read-only; else None."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG):
            return (
                f"cannot write {error.filename or 'a file or the output'}: {os.strerror(error.errno)}; make room or "
                "choose another folder, then run the same command again"
            )
        error = error.__cause__ or error.__context__
    return None


def write_new(path: str | os.PathLike, text: str) -> None:
    """Write a new text file atomically; never replace an existing one.

    An empty file reserves the name first, which works without hard links and on FUSE mounts of buckets too.

    Raises:
      OSError: as the disk raises it; FileExistsError where the name is taken.
    """
    with atomic_write(path, shared=True) as part:
        part.write_text(text)
        open(path, "x").close()


def file_sha256(path: str | os.PathLike) -> str:
    """Return the SHA-256 of a file, as hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: str | os.PathLike, text: str, *, shared: bool = False) -> None:
    """Write a text file atomically; see `atomic_write`."""
    with atomic_write(path, shared=shared) as part:
        part.write_text(text)


def write_json(path: str | os.PathLike, value: Any, *, shared: bool = False) -> None:
    """Write a JSON file atomically, keys in their order; see `atomic_write`."""
    write_text(path, json.dumps(value, indent=1) + "\n", shared=shared)


def write_anywhere(path: str | os.PathLike, content: str | bytes) -> None:
    """Write a file atomically, on a local disk or in a bucket (gs://).

    Args:
      path: its folder is made where needed.
      content: its text or bytes.

    Raises:
      OSError: as the disk or the bucket raises it.
    """
    from etils import epath

    path, data = epath.Path(path), content.encode() if isinstance(content, str) else content
    if "://" in str(path):
        path.write_bytes(data)  # an object appears when it is complete
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as part:
        part.write_bytes(data)


def copy_files(source: Path, target: Any) -> None:
    """Copy the files below a local folder to another one, local or an `epath.Path` in a bucket."""
    for file in filter(Path.is_file, source.rglob("*")):
        path = target / file.relative_to(source).as_posix()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file.read_bytes())


def user_path(path: str | os.PathLike, *, local: bool = False) -> str:
    """Return a path as the user means it: `~` expanded, in a bucket as gs://BUCKET/FOLDER.

    Args:
      path: as it was given.
      local: it must not lie in a bucket.

    Raises:
      SfdError: an empty path; blanks or quotes around it, or line ends in it; a misspelt bucket; another scheme.
    """
    text = os.fspath(path)
    if not text:
        raise SfdError("an empty path: give one, or leave the setting out")
    if text != text.strip() or re.search("[\x00-\x1f]", text) or text[0] in "'\"" or text[-1] in "'\"":
        raise SfdError(f"path {text!r} has blanks or quotes at its ends, or line ends in it; take them out")
    scheme, rest = re.match(r"(?:([A-Za-z][A-Za-z0-9+.-]*):(?=/))?(.*)", text).groups()
    if scheme or text.lower().startswith("gs:"):
        if text.lower().startswith("gs:") and not re.match(r"gs://[^/]", text):
            raise SfdError(f"path {text}: a bucket is written gs://BUCKET/FOLDER, small letters and two slashes")
        if text.lower().startswith("file:"):
            raise SfdError(f"path {text}: leave '{scheme}:' out, /{rest.lstrip('/')}")
        if scheme != "gs":
            raise SfdError(f"path {text}: '{scheme}:' cannot be read; give a local path or gs://BUCKET/FOLDER")
        if local:
            raise SfdError(
                f"path {text}: only --workdir and checkpoints may lie in a bucket; give a local path, or mount the "
                "bucket"
            )
        return text
    expanded = os.path.expanduser(text)
    if expanded.startswith("~") and not os.path.lexists(expanded):
        raise SfdError(f"path {text}: there is no such user; a name that begins with ~ is written ./{text}")
    return expanded


def must_be_local(flag: str, path: str | None) -> None:
    """Raise SfdError for a path that is not local; see `user_path`."""
    if path:
        try:
            user_path(path, local=True)
        except SfdError as error:
            raise SfdError(f"{flag}: {error}") from None


def differences(found: Any, wanted: Any) -> dict[tuple[str, ...], str]:
    """Compare two JSON-able records.

    Args:
      found: nested dicts, e.g. read from a folder.
      wanted: nested dicts, e.g. of this run.

    Returns:
      Path of keys -> "a.b: there 1, here 2", for each leaf that differs, in order.
    """
    found, wanted = _leaves(json.loads(json.dumps(found))), _leaves(json.loads(json.dumps(wanted)))
    return {
        path: f"{'.'.join(path)}: there {_short(found, path)}, here {_short(wanted, path)}"
        for path in sorted(found.keys() | wanted.keys())
        if path not in found or path not in wanted or found[path] != wanted[path]
    }


def _leaves(tree: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    if not isinstance(tree, dict):
        return {path: tree}
    return {key: leaf for name, child in tree.items() for key, leaf in _leaves(child, (*path, name)).items()}


def _short(leaves: dict, path: tuple[str, ...]) -> str:
    text = json.dumps(leaves[path]) if path in leaves else "absent"
    return text if len(text) <= 60 else text[:57] + "..."
