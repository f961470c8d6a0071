"""docs/your_own_images.md: its commands as written, one after the other, with sizes and counts shrunk behind them."""

import json
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from sfd_jax.training.logging import read_metrics

STEPS = ["--config.train.steps=2", "--config.train.global_batch_size=4"]
# Images of 8 px, latents of 4 x 4: half a minute instead of an hour. Nothing of it names a path.
SHRUNK = {
    "train_texture_vae": [*STEPS, "--config.data.image_size=8", "--config.model.ch_mult=(1,1)"],
    "train_encoder": [*STEPS, "--config.data.image_size=8", "--config.model.patch_size=2", "--config.model.depth=1"],
    "train_semvae": [*STEPS, "--config.data.images.image_size=8", "--config.model.arch=linear"],
    "extract": ["--batch_size=8"],
    "train": [*STEPS, "--config.model.depth=1", "--config.model.repa_depth=1", "--config.model.width=24"],
    "sample": ["--num=6", "--batch_size=6", "--solver=euler", "--num_steps=4"],
    "evaluate": ["--image_size=8"],
}
RUN = """
import json, sys
from sfd_jax.cli.main import main
for command in json.load(sys.stdin):
    print("$", *command, flush=True)
    if status := main(command):
        sys.exit(status)
"""


def commands(root) -> list[list[str]]:
    """Return the words of the commands in the page's blocks, without `sfd`."""
    blocks = re.findall(r"^```\n(.*?)^```", (root / "docs" / "your_own_images.md").read_text(), re.S | re.M)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith("sfd ")]


@pytest.mark.slow
def test_the_page_as_written(root, tmp_path, quick):
    random = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 2)):
        for name in ("balls", "stripes", "tents"):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(0, 256, (*random.integers(20, 90, 2), 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.jpg")
    page = commands(root)
    assert [command for command, *_ in page] == list(SHRUNK)
    shrunk = json.dumps([[*words, *SHRUNK[words[0]]] for words in page])
    environment = {**quick, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", RUN], input=shrunk, text=True, capture_output=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "note: images of 8 px, since --texture_vae was trained on such" in done.stdout
    measured = {"vae": "psnr", "encoder": "accuracy_cls", "semvae": "cosine"}
    assert all(f"held_out_{name}" in read_metrics(tmp_path / "runs" / run)[-1] for run, name in measured.items())
    assert Image.open(tmp_path / "samples" / "grid.png").height >= 3 * 8
    assert np.load(tmp_path / "samples" / "samples.npz")["arr_0"].shape == (6, 8, 8, 3)
    [score] = json.loads((tmp_path / "scores.json").read_text())["scores"].values()
    assert np.isfinite(score)
