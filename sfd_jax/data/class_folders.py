"""Find the images in a folder or a tar, and the class of each."""

import dataclasses
import os
import re
from collections import Counter
from pathlib import Path

import numpy as np

from sfd_jax.errors import SfdError

EXTENSIONS = (".jpeg", ".jpg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
# Entries that systems and tools put among a user's files; names that start with a dot are hidden as well.
HIDDEN = {
    "@eadir",
    "@tmp",
    "@recycle",
    "@recently-snapshot",
    "__macosx",
    "__pycache__",
    "thumbs.db",
    "desktop.ini",
    "#recycle",
    "#snapshot",
    "~snapshot",
    "$recycle.bin",
    "system volume information",
    "lost+found",
}
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "held_out"}
NO_CLASS = {"images", "image", "imgs", "img", "jpegimages", "data"}  # no class where it is the only folder
MOST_NUMBERED = 100_000  # larger numbers are not labels, but dates or identities


def is_hidden(path: str) -> bool:
    """Tell whether a relative path has a part that no user made: hidden, or of a system or a tool."""
    return any(part.startswith(".") or part.lower() in HIDDEN for part in path.split("/"))


def is_image(path: str) -> bool:
    """Tell whether a relative path is that of an image, by its ending and its folders."""
    return path.lower().endswith(EXTENSIONS) and not is_hidden(path)


def walk(folder: str | os.PathLike) -> tuple[list[str], list[str], Counter[str]]:
    """List a folder at every depth, links followed, hidden entries left out.

    Returns:
      Relative paths of the images and of the folders, in no order, and the number of other files by ending.

    Raises:
      SfdError: a folder that cannot be read or contains itself, or a dangling link beside the class folders.
    """

    def refuse(error: OSError) -> None:
        raise SfdError(f"cannot read folder {error.filename}: {error.strerror}")

    images, folders, others = [], [], Counter()
    for parent, below, names in os.walk(folder, followlinks=True, onerror=refuse):
        inside = os.path.relpath(parent, folder)
        prefix = "" if inside == "." else f"{inside}/"
        below[:] = [name for name in below if not is_hidden(name)]
        for name in below:
            path = os.path.join(parent, name)
            if os.path.islink(path) and Path(parent).resolve().is_relative_to(Path(path).resolve()):
                raise SfdError(f"{path} is a link to one of its own parent folders; remove it")
        folders += [prefix + name for name in below]
        found = [name for name in names if is_image(name)]
        images += [prefix + name for name in found]
        others.update(os.path.splitext(name)[1] for name in set(names).difference(found) if not is_hidden(name))
        for name in [] if prefix else names:
            path = os.path.join(parent, name)
            if not is_hidden(name) and not os.path.exists(path):
                raise SfdError(f"{path} is a link whose target is missing; mount the target, or remove the link")
    return images, folders, others


@dataclasses.dataclass(frozen=True)
class Classes:
    """Images by class.

    Attributes:
      paths: relative paths, by label and then by name.
      labels: int32 (N,).
      class_names: names by label.
      notes: assumptions made, as sentences.
    """

    paths: list[str]
    labels: np.ndarray
    class_names: list[str]
    notes: list[str]


def find_classes(where: str, images: list[str], folders: list[str], split: str = "") -> Classes:
    """Sort images by the top-level folders, which are the classes; labels number their sorted names.

    Where all names are numbers, these are the labels.

    Args:
      where: the folder or tar, for messages.
      images, folders: relative paths.
      split: one that was asked for and does not exist; "train", the default, may be `where` itself.

    Raises:
      SfdError: the top-level folders are not classes, one of them is empty, or images lie beside them; the message
        says what was found and what to give instead.
    """
    notes: list[str] = []
    tops = sorted({path.split("/")[0] for path in folders})
    found = f"it holds {_some(tops, 'folders')}" if tops else "it holds no folders"
    splits = [name for name in tops if name.lower() in SPLITS]
    nested = {name for name in splits for path in folders if path.startswith(f"{name}/")}
    splits = splits if len(splits) == len(tops) else [name for name in splits if name in nested]
    if splits:
        asked = f"has no split '{split}'" if split else "is not a folder of classes"
        raise SfdError(f"{where} {asked}: {found}. Give one of these splits: {', '.join(splits)}")
    if split:
        if deeper := [path for path in folders if path.endswith(f"/{split}")]:
            above = min(deeper, key=lambda path: path.count("/"))[: -len(split) - 1]
            raise SfdError(
                f"{where} has no split '{split}': {found}. Give {above} in it as the path, or "
                f"{above}/{split} as the split"
            )
        name = Path(where).resolve().stem
        itself = split == name or split in re.split(r"[\W_]", name)
        if not itself and (split != "train" or name.lower() in SPLITS):
            raise SfdError(f"{where} has no split '{split}': {found}. To read it as it is, give an empty split")
        if not itself:
            notes.append(f"{where} has no split '{split}': its own folders are taken as the classes")
    by_class: dict[str, list[str]] = {name: [] for name in tops}
    loose = []
    for path in images:
        (by_class[path.split("/")[0]] if "/" in path else loose).append(path)
    if len(tops) == 1 and tops[0].lower() in NO_CLASS and not any(path.startswith(f"{tops[0]}/") for path in folders):
        loose = images
    if loose:
        raise SfdError(
            f"{where} holds {len(loose):,} images that have no class, such as {min(loose)}, and {len(tops):,} folders: "
            "put each image into a folder named after its class (ImageNet's validation images come unsorted)"
        )
    endings = ", ".join(EXTENSIONS)
    if not images:
        raise SfdError(
            f"no images in {where}: {found}; it must hold class folders, each with files that end in {endings}"
        )
    if empty := [name for name, paths in by_class.items() if not paths]:
        raise SfdError(
            f"{where} holds folders without images: {_some(empty, 'of ' + format(len(tops), ',') + ' folders')}; fill "
            f"them (files that end in {endings}), or remove them if they are not classes"
        )
    notes += _check_depth(where, by_class)
    names, numbers = _number(where, tops, notes)
    paths = [sorted(by_class[name], key=os.fsencode) for name in names if name in by_class]
    counts = [len(part) for part in paths]
    labels = np.repeat(np.array(numbers, np.int32), counts)
    return Classes([path for part in paths for path in part], labels, names, notes)


def _check_depth(where: str, by_class: dict[str, list[str]]) -> list[str]:
    """Refuse folders above the classes; return notes on classes with images in subfolders."""
    inner = {name: {os.path.dirname(path) for path in paths} - {name} for name, paths in by_class.items()}
    [(first, paths), *others] = by_class.items()
    parts = {part for folders in inner.values() for folder in folders for part in folder.split("/")[1:]}
    only = not others and len(inner[first]) > 1 and not any(path.count("/") == 1 for path in paths)
    wordnet = r"n\d{8}"
    synsets = any(re.fullmatch(wordnet, part) for part in parts) and not re.fullmatch(wordnet, first)
    if only or synsets or any(part.lower() in SPLITS for part in parts):
        above = os.path.commonpath(inner[first]) if only else first
        raise SfdError(
            f"the folders of {where} are not classes: {first} holds {_some(sorted(inner[first]), 'folders')}. Give "
            f"the folder right above the classes as the path, such as {above} in it"
        )
    deep = [name for name, folders in inner.items() if len(folders) > 1]
    if not deep:
        return []
    return [f"images in subfolders belong to the class folder above them: {_some(deep, 'classes of ' + where)}"]


def _number(where: str, tops: list[str], notes: list[str]) -> tuple[list[str], list[int]]:
    """Return the names by label, and the labels that have images."""
    is_number = [re.fullmatch(r"-?[0-9]+", name) is not None for name in tops]
    if not all(is_number):
        if any(is_number):
            notes.append(
                f"not all class folders of {where} are numbers: labels follow the alphabetical order of the names"
            )
        return tops, list(range(len(tops)))
    by_number: dict[int, str] = {}
    for name in tops:
        if int(name) in by_number or not 0 <= int(name) < MOST_NUMBERED:
            twin = by_number.get(int(name))
            what = f"'{twin}' and '{name}' are one number" if twin else f"'{name}' is not a label"
            raise SfdError(
                f"the class folders of {where} are numbers, which are taken as labels, but {what}; rename it"
            )
        by_number[int(name)] = name
    count = max(by_number) + 1
    gaps = sorted(set(range(count)) - set(by_number))
    without = f"; no images have {_some([str(gap) for gap in gaps], 'labels')}" if gaps else ""
    notes.append(f"the class folders of {where} are numbers and taken as labels 0..{count - 1}{without}")
    return [by_number.get(number, str(number)) for number in range(count)], sorted(by_number)


def _some(names: list[str], what: str) -> str:
    """Return the first names, and how many there are."""
    return f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''} ({len(names):,} {what})"
