"""A folder of your own images, prepared for the demo: split by class, cropped once, kept in the work folder.

The stages read PREPARED/{train,held_out}/CLASS/NUMBER.png like any folder of class folders, so that each photograph is
decoded only once.
"""

import dataclasses
import hashlib
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from sfd_jax.data.class_folders import NO_CLASS, SPLITS
from sfd_jax.data.images import ImageSource, Tolerant, open_images
from sfd_jax.errors import SfdError, refuse
from sfd_jax.files import PART

PREPARED = "prepared"  # folder in the work folder
MOST_IMAGES = 10_000  # features of both orientations are kept in memory: at most 1.3 GB
LEAST_IMAGES = 8
HELD_OUT = 5  # one image in HELD_OUT of each class
HEAD = 2**14  # bytes of a file that show, with its name and size, whether it has changed


@dataclasses.dataclass(frozen=True)
class OwnImages:
    """Images of a folder, split by class.

    Attributes:
      source: all of them, cropped when read.
      train, held_out: int (N,), their indices in `source`; disjoint.
      classes: names of the classes that have images, by label.
      notes: assumptions, as sentences.
    """

    source: ImageSource
    train: np.ndarray
    held_out: np.ndarray
    classes: dict[int, str]
    notes: list[str]

    def identity(self) -> str:
        """Return a description that depends on the images but not on where their folder is.

        Raises:
          SfdError: a file cannot be read.
        """
        digest, dataset = hashlib.sha256(), self.source.dataset
        for index in range(len(dataset)):
            try:
                with open(dataset.name(index), "rb") as file:
                    content = (bytes(dataset.paths[index]), os.fstat(file.fileno()).st_size, file.read(HEAD))
            except OSError as error:
                raise SfdError(f"cannot read {self.source.name(index)}: {error.strerror}") from error
            digest.update(repr(content).encode())
        return f"{len(dataset):,} images in {len(self.classes)} classes, content {digest.hexdigest()[:12]}"

    def prepare(self, workdir: Path) -> dict:
        """Crop the images and write them below `workdir`; the folder appears once it is complete.

        Returns:
          The numbers of training and of held-out images.

        Raises:
          SfdError: images cannot be decoded; up to 20 are named.
        """
        part, faults = workdir / (PREPARED + PART), []
        shutil.rmtree(part, ignore_errors=True)
        splits = {"train": self.train, "held_out": self.held_out}
        chosen = [(split, int(index)) for split, indices in splits.items() for index in indices]
        with ThreadPoolExecutor() as pool:
            records = pool.map(Tolerant(self.source).__getitem__, [index for _, index in chosen])
            for (split, index), record in zip(chosen, tqdm(records, "crop", len(chosen), disable=None), strict=True):
                if record["broken"]:
                    faults.append(f"{record['name']}: {record['broken']}")
                    continue
                folder = part / split / self.classes[record["label"]]
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(record["pixels"]).save(folder / f"{index:06}.png")
        if faults:
            more = [f"and {len(faults) - 20:,} more"] * (len(faults) > 20)
            lines = "".join(f"\n  {fault}" for fault in faults[:20] + more)
            raise SfdError(f"{len(faults):,} images cannot be decoded; repair or remove them, then start again:{lines}")
        shutil.rmtree(workdir / PREPARED, ignore_errors=True)
        part.rename(workdir / PREPARED)
        return {"training images": len(self.train), "held out": len(self.held_out)}


def find_images(folder: str, workdir: Path, image_size: int) -> OwnImages:
    """Find the images of a folder and split them.

    Args:
      folder: a folder of class folders, or of a folder "train" that holds them.
      workdir: the demo's work folder.
      image_size: side of the square that each will be cropped to, in pixels.

    Raises:
      SfdError: no folder, no classes, too few images, or one folder is inside the other.
    """
    source = open_images("folder", folder, "train", image_size)
    there, out = Path(folder).resolve(), workdir.resolve()
    if out.is_relative_to(there) or there.is_relative_to(out):
        raise SfdError(f"--workdir={workdir} and --images={folder}: one is inside the other; choose another --workdir")
    labels = source.dataset.labels
    train, held_out = split_images(labels)
    if len(train) < LEAST_IMAGES:
        refuse([f"{folder} holds {len(labels)} images; the demo needs at least {LEAST_IMAGES}, better hundreds"])
    present = np.unique(labels).tolist()
    # Numbers with gaps would become labels without images; some names are not accepted as those of classes.
    strange = {name.lower() for name in source.class_names} & (NO_CLASS | SPLITS)
    prefix = "class_" if strange or len(present) < len(source.class_names) else ""
    classes = {label: prefix + source.class_names[label] for label in present}
    notes = [note for note in source.notes if "its own folders are taken" not in note]
    if len(train) + len(held_out) < len(labels):
        notes.append(
            f"only {len(train) + len(held_out):,} of the {len(labels):,} images are used, about equally many of each "
            "class, to keep the demo short; `sfd extract` and `sfd train` have no such limit"
        )
    if small := [classes[label] for label in present if label not in labels[held_out]]:
        notes.append(
            f"no image is held out in classes with fewer than {HELD_OUT} images: {', '.join(small[:5])}"
            f"{', ...' if len(small) > 5 else ''} ({len(small)} of {len(present)})"
        )
    if len(present) == 1:
        notes.append(
            "with a single class, the visual encoder learns the rotation of an image (0, 90, 180 or 270 degrees), "
            "not labels, and samples are not classified"
        )
    return OwnImages(source, train, held_out, classes, notes)


def split_images(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split images into training and held-out images: a fifth of each class, rounded down, is held out.

    Args:
      labels: int (N,).

    Returns:
      Ascending indices of training and held-out images, at most MOST_IMAGES together; the same in every run.
    """
    random, rank = np.random.RandomState(0), np.empty(len(labels), int)  # a stream that NumPy guarantees
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        rank[random.permutation(members)] = np.arange(len(members))
    kept = np.sort(np.argsort(rank, kind="stable")[:MOST_IMAGES])  # equally many of each class, as far as it has them
    held_out = rank[kept] < np.bincount(labels[kept])[labels[kept]] // HELD_OUT
    return kept[~held_out], kept[held_out]
