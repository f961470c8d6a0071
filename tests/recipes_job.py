"""Train, sample and evaluate recipes of configs/sfd.py: `python -m tests.recipes_job FOLDER RECIPE ...`."""

import sys
from pathlib import Path

import numpy as np

from sfd_jax.cli import evaluate, sample, train
from sfd_jax.cli.main import run_command
from sfd_jax.evaluation import Extractor
from sfd_jax.experiment import evaluation
from tests.generation.test_commands import VAE, save_random
from tests.training.test_train_command import make_store

MADE_BY = {"texture_vae": "0" * 64, "semantic_vae": "1" * 64, "visual": "2" * 64}
MODEL = "width=24 depth=1 num_heads=2 compute_dtype=float32 scan_blocks=False remat=none"


def main(folder: Path, recipes: list[str]) -> None:
    """Make latents of both groups, a texture VAE and references, and use them for each recipe, in its own folder."""
    make_store(folder / "latents", weights=MADE_BY)
    vae = save_random(folder / "vae", "texture_vae", VAE | {"z_channels": 8}, 1)
    random = np.random.default_rng(2)
    np.savez(folder / "reference.npz", arr_0=random.integers(0, 256, (12, 8, 8, 3), dtype=np.uint8))
    projection = random.standard_normal((8 * 8 * 3, 4)).astype(np.float32) / 100
    features = lambda params, images: {"features": images.reshape(len(images), -1) @ params["w"]}
    evaluation.open_extractor = lambda *_: Extractor("inception", {"w": projection}, features)
    for recipe in recipes:
        out, flags = folder / recipe, [f"--config.model.{setting}" for setting in MODEL.split()]
        if "repa" in recipe:
            flags.append("--config.model.repa_depth=1")
        flags += ["--config.train.steps=2", "--config.train.ema_decay=0.5", f"--config.data.path={folder / 'latents'}"]
        run(train, f"--config=configs/sfd.py:{recipe}", f"--workdir={out / 'run'}", *flags)
        given = [f"--checkpoint={out / 'run'}", f"--texture_vae={vae}", "--other_texture_vae", "--guidance=none"]
        run(
            sample, *given, "--solver=euler", "--num_steps=4", "--num=12", "--batch_size=12", f"--out={out / 'samples'}"
        )
        given = [f"--samples={out / 'samples'}", f"--reference={folder / 'reference.npz'}", "--inception=stand-in"]
        run(evaluate, *given, "--metrics=fid", f"--out={out / 'scores.json'}")


def run(command, *arguments: str) -> None:
    """Run a command, which must succeed."""
    name = command.__name__.rpartition(".")[-1]
    print(f"sfd {name}", *arguments)
    if status := run_command(command.main, name, list(arguments)):
        sys.exit(status)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
