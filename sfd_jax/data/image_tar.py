"""Images in a tar, read in place: ILSVRC's tar of class tars, or a tar of class folders."""

import contextlib
import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from sfd_jax.data.class_folders import SPLITS, find_classes, is_hidden, is_image
from sfd_jax.data.decoding import MAX_BYTES
from sfd_jax.errors import SfdError
from sfd_jax.files import atomic_write

INDEX_FORMAT = 2  # part of the stamp: an index of another format is made again
BLOCK = 512
ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip")  # all but the first are refused
BEGINNINGS = {
    b"\x1f\x8b": "compressed with gzip",
    b"BZh": "compressed with bzip2",
    b"\xfd7zXZ": "compressed with xz",
    b"\x28\xb5\x2f\xfd": "compressed with zstd",
    b"PK": "a zip archive",
    b"<": "a web page",
    b"version https://git-lfs": "a pointer of Git LFS, whose file was not fetched",
}


class ImageTar:
    """Images in a tar of class folders or of class tars, at the top or below the name of a split.

    The first opening reads all headers and stores the offsets of the images in `<tar>.index.npz` beside the tar, if it
    can be written; later ones use that file as long as the tar's size and time are the same.

    Args:
      path: the tar, not compressed.
      split: name of a folder in it, used where it exists.

    Raises:
      SfdError: no such file, an incomplete tar (the message names the member), or images without a class.
    """

    def __init__(self, path: str, split: str = ""):
        self.path = Path(path)
        if not self.path.is_file():
            raise SfdError(f"no tar file '{path}'")
        try:
            self._open()
        except OSError as error:
            raise SfdError(f"cannot read tar file '{path}': {error.strerror}") from error
        stat = os.fstat(self._file.fileno())
        stamp = np.array([INDEX_FORMAT, stat.st_size, stat.st_mtime_ns], np.int64)
        index = _load_index(self._index_path, stamp)
        if index is None:
            index = _index_tar(self.path)
            _save_index(self._index_path, {**index, "stamp": stamp})
        names = [os.fsdecode(name) for name in index["names"].tolist()]
        folders = {os.fsdecode(name) for name in index["folders"].tolist()}
        above = {os.path.dirname(name) for name in names} | folders
        ends = lambda folder: (end for end in range(1, len(folder) + 1) if folder[end : end + 1] in ("", "/"))
        folders |= {folder[:end] for folder in above for end in ends(folder)}
        start = _start(names, folders, split)
        places = {name[len(start) :]: place for place, name in enumerate(names) if name.startswith(start)}
        folders = [folder[len(start) :] for folder in sorted(folders) if folder.startswith(start)]
        found = find_classes(path, list(places), folders, "" if f"{split}/" == start else split)
        order = np.array([places[name] for name in found.paths])
        self.names, self.offsets, self.sizes = index["names"][order], index["offsets"][order], index["sizes"][order]
        self.labels, self.class_names, self.notes = found.labels, found.class_names, found.notes

    @property
    def _index_path(self) -> Path:
        return self.path.with_name(f"{self.path.name}.index.npz")

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        # pread has no shared position, so threads do not disturb each other.
        size = min(int(self.sizes[index]), MAX_BYTES + 1)
        return os.pread(self._file.fileno(), size, int(self.offsets[index])), int(self.labels[index])

    def name(self, index: int) -> str:
        return f"{self.path.name}:{os.fsdecode(bytes(self.names[index]))}"

    def _open(self) -> None:
        self._file = open(self.path, "rb")  # noqa: SIM115

    def __getstate__(self):  # loader processes open the tar themselves
        return {key: value for key, value in self.__dict__.items() if key != "_file"}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._open()


def _start(names: list[str], folders: set[str], split: str) -> str:
    """Return the common start of the wanted images' names: a folder around everything, and the split."""
    start = ""
    while True:
        if split and start + split in folders:
            return f"{start}{split}/"
        tops = {path[len(start) :].split("/")[0] for path in folders if path.startswith(start)}
        if len(tops) != 1:
            return start
        [top] = tops
        if top.lower() in SPLITS or any(name[len(start) :].count("/") <= 1 for name in names):
            return start
        start += f"{top}/"


def _index_tar(path: Path) -> dict[str, np.ndarray]:
    images: list[tuple[str, int, int]] = []  # name, offset, size
    folders: set[str] = set()
    with open(path, "rb") as file:
        for member, name in _members(path, file, "", 0, path.stat().st_size):
            if member.isdir():
                folders.add(name)
            elif name.lower().endswith(ARCHIVES):
                folder, first = name[: -len(".tar")], member.offset_data
                folders.add(folder)
                for image, inner in _members(path, file, name, first, first + member.size):
                    if not image.isdir() and is_image(inner):
                        images.append((f"{folder}/{inner}", image.offset_data, image.size))
            elif is_image(name):
                images.append((name, member.offset_data, member.size))
    if twice := [name for name, count in Counter(name for name, *_ in images).items() if count > 1]:
        raise SfdError(f"{path} holds {twice[0]} twice; write the tar again from its extracted files")
    return {
        "names": np.array([os.fsencode(name) for name, *_ in images], dtype=np.bytes_),
        "offsets": np.array([offset for _, offset, _ in images], np.int64),
        "sizes": np.array([size for *_, size in images], np.int64),
        "folders": np.array([os.fsencode(folder) for folder in sorted(folders)], dtype=np.bytes_),
    }


def _members(path: Path, file: BinaryIO, inside: str, start: int, end: int) -> Iterator[tuple[tarfile.TarInfo, str]]:
    """Iterate over the visible members of the tar in bytes [start, end) of a file, and their names without dots.

    Python's tarfile takes a damaged header for the end; here the end must be zeros only.
    """
    what, last = f"{inside} in {path}" if inside else str(path), "its start"
    file.seek(start)
    beginning = file.read(BLOCK)[: end - start]
    kind = next((kind for magic, kind in BEGINNINGS.items() if beginning.lstrip().startswith(magic)), "")
    if kind or not beginning:
        raise SfdError(f"{what} is not a complete, uncompressed tar: it is {kind or 'empty'}; unpack or fetch it again")
    file.seek(start)
    damaged = lambda fault: SfdError(
        f"{what} is not a complete, uncompressed tar: {fault} after {last}; fetch or write it again"
    )
    try:
        # tarfile reads from the file's position, but its offsets count from the file's start.
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.size < 0 or member.offset_data + (0 if member.issparse() else member.size) > end:
                    raise damaged(f"it is cut in {member.name}")
                name = "/".join(part for part in member.name.split("/") if part not in ("", ".", ".."))
                # A symbolic link of any name may be a class folder.
                wanted = is_image(name) or ((name.lower().endswith(ARCHIVES) or member.issym()) and not is_hidden(name))
                if wanted and not member.isdir() and (not member.isreg() or member.issparse()):
                    raise SfdError(
                        f"{member.name} in {what} is a link, sparse or not a file, so its bytes are not in the tar; "
                        "write the tar with --hard-dereference --dereference and without --sparse"
                    )
                if name and not is_hidden(name) and (wanted or member.isdir()):
                    yield member, name
                last = member.name
            position = tar.offset
    except (tarfile.TarError, ValueError, OverflowError, OSError) as error:
        raise damaged(str(error)) from error
    if end - position < BLOCK:
        raise damaged("it ends without a block of zeros")
    file.seek(position)
    while position < end:
        block = file.read(min(end - position, 1 << 20))
        if not block or block.strip(b"\0"):
            raise damaged("there is a damaged header, or a second tar,")
        position += len(block)


def _load_index(path: Path, stamp: np.ndarray) -> dict[str, np.ndarray] | None:
    try:
        with np.load(path) as file:
            index = dict(file)
        names, offsets, sizes = index["names"], index["offsets"], index["sizes"]
        whole = names.shape == offsets.shape == sizes.shape and names.dtype.kind == index["folders"].dtype.kind == "S"
        whole = whole and bool(((offsets >= 0) & (sizes >= 0) & (offsets + sizes <= stamp[1])).all())
        return index if whole and np.array_equal(index["stamp"], stamp) else None
    except Exception:  # none yet, or a damaged one, for which numpy raises many types: it is made again
        return None


def _save_index(path: Path, index: dict[str, np.ndarray]) -> None:
    # A read-only disk is not an error: the next opening reads the headers again.
    with contextlib.suppress(OSError), atomic_write(path, shared=True) as part, open(part, "wb") as file:
        np.savez(file, **index)
