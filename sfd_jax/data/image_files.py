"""Datasets of encoded images: a folder of class folders, a tar, TensorFlow Datasets.

Each answers `dataset[i] -> (bytes, label)`, for `images.ImageSource` to decode. Labels number the
class names in sorted order, which for ImageNet's folders (n01440764, ...) gives the usual labels.
"""

import contextlib
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from sfd_jax.errors import SfdError
from sfd_jax.files import appearing

EXTENSIONS = (".jpeg", ".jpg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


class ImageFolder:
    """Images in a folder of class folders.

    Args:
      path: the folder.
      split: name of a subfolder, used where it exists.

    Raises:
      SfdError: no such folder, or no images in it.
    """

    def __init__(self, path: str, split: str = ""):
        root = Path(path)
        self.root = root / split if split and (root / split).is_dir() else root
        if not self.root.is_dir():
            raise SfdError(f"no folder '{path}'")
        files = {
            entry.name: sorted(_images_under(entry.path))
            for entry in os.scandir(self.root)
            if entry.is_dir()
        }
        self.class_names = sorted(name for name, found in files.items() if found)
        if not self.class_names:
            raise SfdError(
                f"no images in {self.root}: wanted are class folders, each with files that end in "
                + ", ".join(EXTENSIONS)
            )
        # One flat array of names: a million Python strings would cost ten times as much memory.
        self.paths = np.array([f for name in self.class_names for f in files[name]], dtype=np.bytes_)
        counts = [len(files[name]) for name in self.class_names]
        self.labels = np.repeat(np.arange(len(counts), dtype=np.int32), counts)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        return Path(self.name(index)).read_bytes(), int(self.labels[index])

    def name(self, index: int) -> str:
        return os.fsdecode(bytes(self.paths[index]))


def _images_under(folder: str) -> list[bytes]:
    return [
        os.fsencode(os.path.join(parent, name))
        for parent, _, names in os.walk(folder)
        for name in names
        if name.lower().endswith(EXTENSIONS)
    ]


class ImageTar:
    """Images in a tar, read in place: ILSVRC's tar of class tars, or a tar of class folders.

    The first opening reads all headers and keeps the offsets in `<tar>.index.npz`, beside the tar
    where it can; later ones take them from there, as long as the tar's size and time are the same.

    Args:
      path: the tar, not compressed.

    Raises:
      SfdError: no such file, not a tar, or nothing in it that has a class.
    """

    def __init__(self, path: str):
        self.path = Path(path)
        if not self.path.is_file():
            raise SfdError(f"no tar file '{path}'")
        stat = self.path.stat()
        stamp = np.array([stat.st_size, stat.st_mtime_ns], np.int64)
        index = _load_index(self._index_path, stamp)
        if index is None:
            index = _index_tar(self.path)
            _save_index(self._index_path, {**index, "stamp": stamp})
        self.names, self.labels = index["names"], index["labels"]
        self.offsets, self.sizes = index["offsets"], index["sizes"]
        self.class_names = [str(name) for name in index["class_names"]]
        self._open()

    @property
    def _index_path(self) -> Path:
        return self.path.with_name(f"{self.path.name}.index.npz")

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        # pread has no shared position, so threads do not disturb each other.
        data = os.pread(self._file.fileno(), int(self.sizes[index]), int(self.offsets[index]))
        return data, int(self.labels[index])

    def name(self, index: int) -> str:
        return f"{self.path.name}:{os.fsdecode(bytes(self.names[index]))}"

    def _open(self) -> None:
        self._file = open(self.path, "rb")

    def __getstate__(self):  # loader processes open the tar themselves
        return {key: value for key, value in self.__dict__.items() if key != "_file"}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._open()


def _index_tar(path: Path) -> dict[str, np.ndarray]:
    found: list[tuple[str, str, int, int]] = []  # class, name, offset, size
    try:
        with tarfile.open(path, "r:") as outer:
            for member in outer:
                if member.isfile() and member.name.lower().endswith(".tar"):
                    found += _inner_tar(path, member)
                elif member.isfile() and member.name.lower().endswith(EXTENSIONS):
                    name = os.path.basename(os.path.dirname(member.name))
                    found.append((name, member.name, member.offset_data, member.size))
    except tarfile.TarError as error:
        raise SfdError(f"{path} is not a whole, uncompressed tar: {error}") from error
    without = [name for class_name, name, _, _ in found if not class_name]
    if without or not found:
        what = f"'{without[0]}' has no class" if without else "it holds no images"
        raise SfdError(
            f"cannot use {path}: {what}; wanted is a tar of class tars (as ILSVRC2012_img_train.tar) "
            "or of class folders"
        )
    found.sort()
    class_names = sorted({class_name for class_name, *_ in found})
    numbers = {name: number for number, name in enumerate(class_names)}
    return {
        "class_names": np.array(class_names),
        "labels": np.array([numbers[class_name] for class_name, *_ in found], np.int32),
        "names": np.array([os.fsencode(name) for _, name, _, _ in found], dtype=np.bytes_),
        "offsets": np.array([offset for *_, offset, _ in found], np.int64),
        "sizes": np.array([size for *_, size in found], np.int64),
    }


def _inner_tar(path: Path, member: tarfile.TarInfo) -> list[tuple[str, str, int, int]]:
    class_name = os.path.splitext(os.path.basename(member.name))[0]
    with open(path, "rb") as file:
        # tarfile starts where the file stands, and its offsets then count from the file's start.
        file.seek(member.offset_data)
        with tarfile.open(fileobj=file, mode="r:") as inner:
            return [
                (class_name, f"{class_name}/{image.name}", image.offset_data, image.size)
                for image in inner
                if image.isfile() and image.name.lower().endswith(EXTENSIONS)
            ]


def _load_index(path: Path, stamp: np.ndarray) -> dict[str, np.ndarray] | None:
    try:
        with np.load(path) as file:
            index = dict(file)
        return index if np.array_equal(index["stamp"], stamp) else None
    except (OSError, ValueError, KeyError, EOFError):  # none yet, or a damaged one: make it again
        return None


def _save_index(path: Path, index: dict[str, np.ndarray]) -> None:
    # A read-only disk is no fault: the next opening reads the headers again.
    with contextlib.suppress(OSError), appearing(path, shared=True) as part, open(part, "wb") as file:
        np.savez(file, **index)


class TfdsImages:
    """Images of a TensorFlow Datasets data set, prepared as ArrayRecord and read without TensorFlow.

    Args:
      name: such as "imagenet2012"; the folder comes from the variable TFDS_DATA_DIR.
      split: such as "train" or "validation[:500]".

    Raises:
      SfdError: the package is missing, or the data set is not prepared.
    """

    def __init__(self, name: str, split: str):
        try:
            import tensorflow_datasets as tfds
        except ImportError as error:
            raise SfdError(
                "reading TensorFlow Datasets needs the package tensorflow-datasets: "
                "pip install 'sfd_jax[tfds]'"
            ) from error
        try:
            # SkipDecoding hands over the encoded bytes, so that our decoder sees what others see.
            self.source = tfds.data_source(
                name, split=split, decoders={"image": tfds.decode.SkipDecoding()}
            )
        except Exception as error:  # the package raises many kinds, for anything from name to disk
            raise SfdError(
                f"cannot open TFDS data set '{name}', split '{split}': {error}\nPrepare it once with "
                f"`tfds build {name} --file_format=array_record`, and set TFDS_DATA_DIR to its folder"
            ) from error
        self.dataset_name = f"{name}/{split}"
        self.class_names = list(self.source.dataset_info.features["label"].names)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        record = self.source[index]
        return record["image"], int(record["label"])

    def name(self, index: int) -> str:
        return f"{self.dataset_name}:{index}"
