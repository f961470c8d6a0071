"""The hash of a training set: independent of its location, different for other content."""

import shutil

import numpy as np
from PIL import Image

from sfd_jax.data.fingerprint import data_hash
from sfd_jax.data.images import open_images


def test_of_images(tmp_path):
    rng = np.random.default_rng(0)
    for index in range(20):
        folder = tmp_path / "here" / f"class_{index % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(folder / f"{index:02d}.png")
    hash_of = lambda name: data_hash(open_images("folder", str(tmp_path / name), "", 8))
    shutil.copytree(tmp_path / "here", tmp_path / "moved")
    assert hash_of("here") == hash_of("moved")
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "moved" / "class_0" / "00.png")
    changed = hash_of("moved")
    (tmp_path / "moved" / "class_1" / "19.png").unlink()
    assert len({hash_of("here"), changed, hash_of("moved")}) == 3
    digits = [data_hash(open_images("digits", "", split, 8)) for split in ("train", "train", "held_out")]
    assert digits[0] == digits[1] != digits[2]
