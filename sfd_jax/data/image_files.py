"""Datasets of encoded images: a folder of class folders, TensorFlow Datasets.

Each returns `dataset[i] -> (bytes, label)`, for `images.ImageSource` to decode. Labels number the
class names in sorted order, which for ImageNet's folders (n01440764, ...) gives the usual labels.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np

from sfd_jax.data.class_folders import find_classes, walk
from sfd_jax.data.decoding import read_bytes
from sfd_jax.errors import SfdError, needs_extra


class ImageFolder:
    """Images in a folder of class folders.

    Args:
      path: the folder.
      split: name of a subfolder to read; "" reads the folder itself. Where there is no subfolder "train",
        the default, the folder itself is read if its own folders are classes, and `notes` says so.

    Raises:
      SfdError: no such folder or split, or folders that are not classes (see `find_classes`).
    """

    def __init__(self, path: str, split: str = ""):
        self.root = Path(path)
        if split and (self.root / split).is_dir():
            self.root, split = self.root / split, ""
        if not path or not self.root.is_dir():
            raise SfdError(f"no folder '{path}'" + ": it is a file" * os.path.isfile(path))
        images, folders, others = walk(self.root)
        found = find_classes(str(self.root), images, folders, split)
        # One flat array of names: a million Python strings would cost ten times as much memory.
        self.paths = np.array([os.fsencode(name) for name in found.paths], dtype=np.bytes_)
        self.labels, self.class_names, self.notes = found.labels, found.class_names, found.notes
        if others:
            endings = ", ".join(f"{ending or 'none'} ({count:,})" for ending, count in others.most_common(8))
            self.notes.append(f"files of {self.root} that do not end as images do are left out: {endings}")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        return read_bytes(self.name(index)), int(self.labels[index])

    def name(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(bytes(self.paths[index])))


class TfdsImages:
    """Images of a TensorFlow Datasets data set, prepared as ArrayRecord and read without TensorFlow.

    Args:
      name: such as "imagenet2012"; the folder comes from the variable TFDS_DATA_DIR.
      split: such as "train" or "validation[:500]".

    Raises:
      SfdError: the package is missing, or the data set was not prepared.
    """

    def __init__(self, name: str, split: str):
        with needs_extra("tfds", "reading TensorFlow Datasets"):
            import tensorflow_datasets as tfds
        try:
            # SkipDecoding gives the encoded bytes, so that one decoder serves all kinds of sources.
            self.source = tfds.data_source(name, split=split, decoders={"image": tfds.decode.SkipDecoding()})
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
