"""512 px from images to scores: the real commands with narrow networks, at the full grid of 32 x 32 latents."""

import json

import numpy as np
import pytest
from PIL import Image

from sfd_jax.cli.main import main
from sfd_jax.data.latent_store import LatentStore
from sfd_jax.evaluation import Extractor
from sfd_jax.experiment import evaluation
from tests.generation.test_commands import save_random

TEXTURE = dict(ch=2, ch_mult=(1, 1, 1, 1, 1), num_res_blocks=1, attention_levels=(), z_channels=8, norm_groups=1)
VISUAL = dict(width=24, depth=1, num_heads=2, num_registers=1)  # DINOv2's patch size and position table
SEMANTIC = dict(arch="linear", input_dim=24, bottleneck_dim=4)
MODEL = "width=24 depth=1 num_heads=2 input_size=32 repa_depth=1 compute_dtype=float32 scan_blocks=False remat=none"


@pytest.mark.slow
def test_images_of_512_px_from_extraction_to_scores(tmp_path, capsys, monkeypatch):
    random = np.random.default_rng(0)
    for index in range(8):
        folder = tmp_path / "images" / "train" / f"{index % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (512, 520, 3), np.uint8)).save(folder / f"{index}.png")
    vae = save_random(tmp_path / "vae", "texture_vae", TEXTURE, 1)
    visual = save_random(tmp_path / "visual", "dinov2", VISUAL, 2)
    semantic = save_random(tmp_path / "semantic", "semantic_vae", SEMANTIC, 3)
    projection = random.standard_normal((512 * 3, 4)).astype(np.float32) / 100
    features = lambda params, images: {"features": images.mean(axis=1).reshape(len(images), -1) @ params["w"]}
    monkeypatch.setattr(evaluation, "open_extractor", lambda *_: Extractor("inception", {"w": projection}, features))

    def run(command, *flags):
        assert main([command, *flags]) == 0
        return capsys.readouterr().out

    networks = [f"--texture_vae={vae}", f"--visual={visual}", f"--semantic_vae={semantic}"]
    images = ["--images=folder", f"--path={tmp_path / 'images'}", "--image_size=512", "--tile_size=512", "--no_flips"]
    run("extract", *images, *networks, "--batch_size=8", f"--out={tmp_path / 'latents'}")
    store = LatentStore(tmp_path / "latents")
    assert store[0]["texture"].shape == (32, 32, 8) and store[0]["semantic"].shape == (32, 32, 4)

    # The targets are decoded from one view, as the latents were extracted.
    targets = ["--config.data.repa_source=semvae", f"--config.data.semantic_vae={semantic}"]
    model = [f"--config.model.{setting}" for setting in MODEL.split()]
    steps = ["--config.data.flips=False", "--config.train.steps=3", "--config.train.global_batch_size=8"]
    config = ["--config=configs/sfd.py:b,512,tiny", f"--config.data.path={tmp_path / 'latents'}"]
    printed = run("train", *config, *model, *targets, *steps, f"--workdir={tmp_path / 'run'}")
    assert "targets are made of one view an image, like the latents (data.tile_grid=32)" in printed

    given = [f"--checkpoint={tmp_path / 'run'}", f"--texture_vae={vae}", "--guidance=none", "--solver=euler"]
    run("sample", *given, "--num_steps=4", "--num=8", "--batch_size=1", f"--out={tmp_path / 'samples'}")
    reference, inception = tmp_path / "reference.npz", "--inception=stand-in"
    photos = [f"--reference={tmp_path / 'images' / 'train' / '0'}", "--image_size=512"]
    run("evaluate", *photos, inception, f"--save_statistics={reference}")
    given = [f"--samples={tmp_path / 'samples'}", f"--reference={reference}", inception, "--metrics=fid"]
    run("evaluate", *given, f"--out={tmp_path / 'scores.json'}")
    assert np.isfinite(json.loads((tmp_path / "scores.json").read_text())["scores"]["fid"])
