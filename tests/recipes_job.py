"""Extract latents of the digits, then train, sample and evaluate recipes with them.

  python -m tests.recipes_job FOLDER RECIPE ...

A RECIPE is an argument of configs/sfd.py, and after spaces settings such as clocks.delta_t=0.5. The networks that make
the latents are drawn at random and tiny. Recipes of principal components get latents of `sfd extract --pca=8`, the
others those of a Semantic VAE of 8 channels, so that recipes of both compile the same programs.
"""

import sys
from pathlib import Path

import numpy as np

from sfd_jax.cli import evaluate, extract, sample, train
from sfd_jax.cli.main import run_command
from sfd_jax.data.digits import Digits
from sfd_jax.evaluation import Extractor
from sfd_jax.experiment import evaluation
from tests.generation.test_commands import VAE, save_random

VISUAL = dict(width=24, depth=1, num_heads=2, image_size=8, patch_size=2, num_registers=1)
SEMANTIC = dict(arch="linear", input_dim=24, bottleneck_dim=8)
MODEL = "width=16 depth=1 num_heads=2 compute_dtype=float32 scan_blocks=False remat=none"
EXTRACT = "--images=digits --split=held_out --image_size=8 --tile_size=8 --repa --no_flips --dtype=float32"


def main(folder: Path, recipes: list[str]) -> None:
    """Make networks, latents and references, and use them for each recipe, in its own folder."""
    vae = save_random(folder / "vae", "texture_vae", VAE | {"z_channels": 8}, 1)
    visual = save_random(folder / "visual", "dinov2", VISUAL, 2)
    semantic = save_random(folder / "semantic", "semantic_vae", SEMANTIC, 3)
    for name, made_by in (("semantic_vae", f"--semantic_vae={semantic}"), ("pca", "--pca=8")):
        networks = [f"--texture_vae={vae}", f"--visual={visual}", made_by]
        run(extract, *EXTRACT.split(), "--batch_size=360", *networks, f"--out={folder / 'latents' / name}")
    images = np.repeat(Digits("train").images[..., None], 3, axis=3)
    np.savez(folder / "reference.npz", arr_0=images)
    projection = np.random.default_rng(2).standard_normal((8 * 8 * 3, 4)).astype(np.float32) / 100
    features = lambda params, images: {"features": images.reshape(len(images), -1) @ params["w"]}
    evaluation.open_extractor = lambda *_: Extractor("inception", {"w": projection}, features)
    for recipe in recipes:
        name, *changes = recipe.split()
        out, flags = folder / name, [f"--config.{change}" for change in changes]
        flags += [f"--config.model.{setting}" for setting in MODEL.split()]
        variants = {*name.split(",")}
        kind = "pca" if variants & {"pca", "redi"} else "semantic_vae"
        if not variants & {"plain", "repa", "dit"}:
            flags.append("--config.latents.semantic_channels=8")
        if not variants & {"plain", "redi", "dit"}:
            flags.append("--config.model.repa_depth=1")
        flags += ["--config.train.steps=2", "--config.train.ema_decay=0.5", "--config.data.flips=False"]
        latents = f"--config.data.path={folder / 'latents' / kind}"
        run(train, f"--config=configs/sfd.py:{name},tiny", f"--workdir={out / 'run'}", latents, *flags)
        given = [f"--checkpoint={out / 'run'}", f"--texture_vae={vae}", "--guidance=none"]
        solver = ["--solver=euler", "--num_steps=4", "--num=12", "--batch_size=12"]
        run(sample, *given, *solver, f"--out={out / 'samples'}")
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
