"""Checks before a long job: each returns a list of sentences that name the faults it found.

They read counts, headers and samples, so that they take seconds on any size of data.
"""

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np

from sfd_jax.data.images import BrokenImage, ImageSource
from sfd_jax.data.latent_store import LatentSource, LatentStore
from sfd_jax.data.released import ReleasedLatents
from sfd_jax.errors import SfdError

# Images of ImageNet-1k by split, for data with a thousand classes.
IMAGENET_COUNTS = {"train": 1_281_167, "val": 50_000, "validation": 50_000}


def check_images(
    source: ImageSource, *, split: str = "", expected_count: int | None = None, max_broken: int = 0
) -> list[str]:
    """Check an image source; 64 images, spread evenly, are decoded.

    Args:
      source: an open `ImageSource`.
      split: with a thousand classes, the split of ImageNet whose count is expected.
      expected_count: images that it must hold; None for ImageNet's count or any.
      max_broken: broken images that the job tolerates.

    Returns:
      Faults, each a sentence.
    """
    faults, broken_images = [], []
    if expected_count is None and len(source.class_names) == 1000:
        expected_count = IMAGENET_COUNTS.get(split)
    if expected_count is not None and len(source) != expected_count:
        faults.append(f"there are {len(source):,} images, not the expected {expected_count:,}")
    for index in _spread(len(source), 64):
        try:
            source[index]
        except BrokenImage as broken:
            broken_images.append(str(broken))
    return faults + (broken_images if len(broken_images) > max_broken else [])


def check_store(
    directory: str | os.PathLike,
    *,
    num_classes: int | None = None,
    flips: bool = False,
    repa: bool = False,
) -> list[str]:
    """Check a latent store before training on it.

    ImageNet's count of images is expected, skipped ones included, where the store is ImageNet's: by its class names
    and split, or as released latents of a thousand labels. About 2 GB of shards, at least three, are compared with
    their checksums.

    Args:
      directory: of the store.
      num_classes: labels must be below it; None for the number of the store's class names.
      flips: the flipped latents are needed.
      repa: the stored features are needed.

    Returns:
      Faults, each a sentence.
    """
    try:
        store = LatentStore(directory)
    except SfdError as error:
        return [str(error)]
    manifest, faults = store.manifest, []
    names = store.class_names
    expected_count = None
    if names is not None and len(names) == 1000:
        expected_count = IMAGENET_COUNTS.get(manifest["config"].get("split", ""))
    if expected_count is None and "repacked_from" in manifest["config"] and len(manifest["label_counts"]) == 1000:
        expected_count = IMAGENET_COUNTS["train"]  # the only latents that were released
    found = manifest["count"] + len(manifest["skipped"])
    if expected_count is not None and found != expected_count:
        faults.append(f"{directory} holds {found:,} images, not the expected {expected_count:,}")
    limit = num_classes if num_classes is not None else len(names) if names else 2**31
    faults += check_labels(
        store, limit, "model.num_classes" if num_classes is not None else "the number of class names"
    )
    wanted = ["texture", "semantic"] + ["repa_features"] * repa
    wanted += [f"{name}_flip" for name in wanted] * flips
    for name in wanted:
        if name not in manifest["fields"]:
            faults.append(f"{directory} holds no '{name}'; extract again with it")
    largest = max(shard["bytes"] for shard in store.shards)
    for number in _spread(len(store.shards), max(3, 2_000_000_000 // largest)):
        try:
            store.verify([number])
        except SfdError as error:
            faults.append(str(error))
    return faults


def check_released(source: ReleasedLatents, *, num_classes: int, flips: bool = False) -> list[str]:
    """Check released shards before training on them as they are; they have no checksums.

    Args:
      source: the open shards.
      num_classes: labels must be below it; where all of a thousand occur, ImageNet's count of images is expected.
      flips: the flipped latents are needed.

    Returns:
      Faults, each a sentence.
    """
    counts, expected = source.label_counts(), IMAGENET_COUNTS["train"]
    faults = check_labels(source, num_classes)
    if len(counts) == 1000 and len(source) != expected:
        faults.append(
            f"{source.directory} holds {len(source):,} images, not the expected {expected:,}; shards are missing"
        )
    if flips and not source.flips:
        faults.append(f"{source.directory} holds no flipped latents; train with --config.data.flips=False")
    return faults


def check_labels(source: ImageSource | LatentSource, num_classes: int, setting: str = "model.num_classes") -> list[str]:
    """Check the labels of all records, as far as they are known without reading the records.

    Args:
      source: of images or latents.
      num_classes: labels must be below it.
      setting: its name in the message.
    """
    counts = source.label_counts() if hasattr(source, "label_counts") else {}
    labels = counts or range(len(getattr(source, "class_names", None) or ()))
    wrong = sorted(label for label in labels if not 0 <= label < num_classes)
    if not wrong:
        return []
    where, images = getattr(source, "directory", "the data"), sum(counts.get(label, 0) for label in wrong)
    return [
        f"{where}: labels outside 0..{num_classes - 1}: {wrong[:5]} ({len(wrong):,} labels, {images:,} images), but "
        f"{setting}={num_classes}"
    ]


def check_writable(directory: str | os.PathLike, needed: int) -> list[str]:
    """Check that a folder can be made, written to, and has `needed` bytes free; leaves nothing behind."""
    folder = Path(directory).absolute()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        return [f"{folder} is a file, so {directory} cannot be made"]
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"sfd")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return [f"cannot write to {folder}: {error.strerror or error}"]
    free = shutil.disk_usage(folder).free
    if free < needed:
        return [f"{folder} has {free / 1e9:.2f} GB free and {needed / 1e9:.2f} GB are needed"]
    return []


def _spread(count: int, sample: int) -> list[int]:
    """Return up to `sample` numbers below `count`, evenly spread, with both ends."""
    return sorted({int(i) for i in np.linspace(0, count - 1, min(sample, count)).round()})
