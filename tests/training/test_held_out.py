"""Held-out metrics come from held-out rows, or the run is refused."""

import os
import tarfile

import numpy as np
import pytest
from PIL import Image

from sfd_jax.data.images import open_images
from sfd_jax.errors import SfdError
from sfd_jax.training.held_out import check_held_out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twenty images to train on, five held out, and the first again under other names."""
    folder, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 20), ("val", 5)):
        for index in range(count):
            target = folder / split / f"class{index % 2}"
            target.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 256, (8, 8, 3), np.uint8)).save(target / f"{index:02d}.png")
    os.symlink(folder / "train", folder / "again")
    with tarfile.open(folder / "train.tar", "w") as tar:
        tar.add(folder / "train", ".")
    return folder


SAME = [
    (("folder", "", "train"), ("folder", "", "train")),
    (("folder", "", "train"), ("folder", "", "again")),  # other paths, the same images
    (("tar", "train.tar", "train"), ("tar", "train.tar", "")),
    (("folder", "", "train"), ("tar", "train.tar", "")),
]
PARTS = [
    (("digits", "", "all"), ("digits", "", "held_out")),
    (("digits", "", "held_out"), ("digits", "", "all")),
]


# In a set too large to be searched only the same set is recognised.
@pytest.mark.parametrize(("pair", "searched"), [(pair, 2000) for pair in SAME + PARTS] + [(pair, 10) for pair in SAME])
def test_training_images_as_held_out_ones_are_refused(folder, pair, searched):
    source, held_out = (open_images(kind, str(folder / path), split, 8) for kind, path, split in pair)
    with pytest.raises(SfdError, match="held-out data are training data"):
        check_held_out(source, held_out, searched=searched)


@pytest.mark.parametrize("searched", [2000, 10])
def test_held_out_images_are_accepted(folder, searched):
    check_held_out(open_images("digits", "", "train", 8), open_images("digits", "", "held_out", 8), searched=searched)
    check_held_out(*(open_images("folder", str(folder), split, 8) for split in ("train", "val")), searched=searched)
