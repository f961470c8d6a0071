"""Image sources behind one interface: random access to square RGB images with their labels.

A source has two parts. A *dataset* has `len(dataset)`, `dataset[i] -> (image, label)` and `class_names`;
its image is encoded bytes, an array or a Pillow image. An `ImageSource` turns that into pixels, the same way
for all of them (decoding.py): RGB, then the ADM centre crop. A dataset may also have `labels` (N,), `notes`
(assumptions made, as sentences) and `name(i)`. To add a kind of dataset, write such a class and add it to `KINDS`.

Pixels are uint8 (H,W,3), 0..255, H = W = image_size.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from sfd_jax.data.decoding import center_crop, to_rgb
from sfd_jax.data.digits import Digits
from sfd_jax.data.image_files import ImageFolder, TfdsImages
from sfd_jax.data.image_tar import ImageTar
from sfd_jax.data.mnist import Mnist
from sfd_jax.errors import SfdError, nearest
from sfd_jax.ranges import check


class LabelledImages(Protocol):
    """Anything with (image, label) pairs that an `ImageSource` can read."""

    class_names: list[str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Any, int]: ...


def open_images(kind: str, path: str, split: str, image_size: int) -> "ImageSource":
    """Open a set of labelled images for random access.

    Args:
      kind: "folder" (a folder of class folders), "tar" (the ILSVRC tar of class tars, or a tar of
        class folders), "tfds" (a TensorFlow Datasets name, read without TensorFlow), "digits" or "mnist".
      path: the folder, the tar file or the dataset's name; unused for "digits" and "mnist".
      split: "train", "held_out" and so on: a folder below `path`, also inside a tar; "" for `path` itself.
      image_size: side of the square that every image is cropped to, in pixels.

    Returns:
      The source: `len(source)`, `source[i] -> {"pixels", "label", "index"}`, `source.class_names`.

    Raises:
      SfdError: unknown kind, nothing at `path`, no such split, or a missing package.
    """
    if kind not in KINDS:
        raise SfdError(f"unknown kind of images '{kind}'; {nearest(kind, KINDS)}")
    check(image_size=image_size)
    return ImageSource(KINDS[kind](path, split), image_size)


# Kind -> dataset of (path, split); extra packages that a kind needs are imported when it is opened.
KINDS: dict[str, Callable[[str, str], LabelledImages]] = {
    "digits": lambda path, split: Digits(split),
    "folder": ImageFolder,
    "mnist": lambda path, split: Mnist(split),
    "tar": ImageTar,
    "tfds": TfdsImages,
}


class ImageSource:
    """Random access to cropped RGB images.

    Args:
      dataset: `dataset[i] -> (image, label)`; see `LabelledImages`.
      image_size: side of the square, in pixels.
    """

    def __init__(self, dataset: LabelledImages, image_size: int):
        self.dataset = dataset
        self.image_size = image_size
        self._kept: dict[int, dict] | None = None
        self.class_names = list(dataset.class_names)
        self.notes = list(getattr(dataset, "notes", ()))

    def keep(self, most: int = 2**29) -> None:
        """Keep decoded images in memory from now on, if all of them take at most `most` bytes."""
        if 3 * self.image_size**2 * len(self) <= most:
            self._kept = {}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        """Return {"pixels": uint8 (H,W,3), "label": int, "index": int}.

        Raises:
          BrokenImage: the image cannot be read or decoded.
          SfdError: its label is not that of a class.
        """
        index = int(index)
        if self._kept is not None and index in self._kept:
            return self._kept[index]
        try:
            image, label = self.dataset[index]
            pixels = center_crop(to_rgb(image), self.image_size)
        # The last three come from Pillow images and arrays, which do not pass through `load_image`.
        except (OSError, ValueError, TypeError, SyntaxError, EOFError) as error:
            raise BrokenImage(self.name(index), str(error) or type(error).__name__) from error
        if not (0 <= label < len(self.class_names) and label == int(label)):
            raise SfdError(f"{self.name(index)} has label {label}, but there are {len(self.class_names)} classes")
        record = {"pixels": pixels, "label": int(label), "index": index}
        if self._kept is not None:
            self._kept[index] = record
        return record

    def label_counts(self) -> dict[int, int]:
        """Return the number of images by label; empty if labels are known only by reading the images."""
        return dict(Counter(getattr(self.dataset, "labels", np.empty(0, int)).tolist()))

    def name(self, index: int) -> str:
        """Return a name of image `index` for messages: its path where it has one."""
        name = getattr(self.dataset, "name", None)
        name = name(index) if name else f"image {index}"
        return name.encode(errors="backslashreplace").decode()  # a name that is not UTF-8 could not be printed


class BrokenImage(SfdError):
    """Report one image that cannot be decoded.

    Args:
      name: its path or number.
      reason: the decoder's message.
    """

    def __init__(self, name: str, reason: str):
        super().__init__(f"cannot decode {name}: {reason}")
        self.name = name
        self.reason = reason

    def __reduce__(self):  # the default would call BrokenImage(message) in the receiving process
        return BrokenImage, (self.name, self.reason)


class BrokenImages:
    """List the broken images of a job, and stop the job when there are too many.

    Args:
      limit: how many the job tolerates.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.listed: dict[str, str] = {}

    def add(self, broken: BrokenImage) -> None:
        """Note a broken image; the same one counts once.

        Raises:
          SfdError: more than `limit` of them, with the list.
        """
        self.listed[broken.name] = broken.reason
        if len(self.listed) > self.limit:
            lines = "\n".join(f"  {name}: {reason}" for name, reason in sorted(self.listed.items()))
            raise SfdError(
                f"{len(self.listed)} broken images, more than the {self.limit} allowed; "
                f"repair or remove them, or allow more:\n{lines}"
            )


class Tolerant:
    """Read images that may be broken, for jobs that take every image once.

    A broken image is returned as black, with the decoder's message in `broken` and the image's name in `name`;
    both are empty for intact images.

    Args:
      source: an `ImageSource`.
    """

    def __init__(self, source: ImageSource):
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict:
        try:
            return {**self.source[index], "name": np.str_(), "broken": np.str_()}
        except BrokenImage as fault:
            pixels = np.zeros((self.source.image_size,) * 2 + (3,), np.uint8)
            fault_fields = {"name": np.str_(fault.name), "broken": np.str_(fault.reason or "?")}
            return {"pixels": pixels, "label": -1, "index": int(index), **fault_fields}
