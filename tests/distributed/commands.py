"""Extract, train, sample and evaluate in one process of a job: `commands.py FOLDER OUT`, FOLDER made by the test."""

import importlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from sfd_jax.cli.main import run_command  # noqa: E402


def main(argv: list[str]) -> int:
    work, out = Path(argv[0]), Path(argv[1])
    networks = [f"--{name}={work / name}" for name in ("texture_vae", "visual", "semantic_vae")]
    command = lambda name, *flags: importlib.import_module(f"sfd_jax.cli.{name}").main(list(flags))
    command(
        "extract",
        "--images=folder",
        f"--path={work / 'images'}",
        f"--out={out / 'latents'}",
        "--image_size=16",
        "--tile_size=16",
        *networks,
        "--batch_size=8",
        "--shard_size=4",
        "--dtype=float32",
    )
    config = {
        "data.path": out / "latents",
        "model.depth": 1,
        "model.remat": "none",
        "model.compute_dtype": "float32",
        "model.repa_features": 0,
        "loss.repa_weight": 0.0,
        "optimizer.learning_rate": 0.1,
        "optimizer.eps": 1.0,
        "train.steps": 3,
        "mesh.data": 2,
        "mesh.fsdp": 2,
    }
    command(
        "train",
        f"--config={ROOT / 'configs/sfd.py'}:xl,tiny",
        f"--workdir={out / 'run'}",
        *(f"--config.{name}={value}" for name, value in config.items()),
    )
    command(
        "sample",
        f"--checkpoint={out / 'run'}",
        f"--texture_vae={work / 'texture_vae'}",
        f"--out={out / 'samples'}",
        "--num=10",
        "--solver=euler",
        "--num_steps=4",
        "--batch_size=2",
        "--chunk_size=8",
        "--weights=raw",
    )
    return command(
        "evaluate",
        f"--samples={work / 'judged'}",
        f"--reference={work / 'images'}",
        "--image_size=16",
        f"--dinov2={work / 'visual'}",
        f"--out={out / 'scores.json'}",
        "--eval_batch_size=1",
    )


if __name__ == "__main__":
    sys.modules["torch"] = None  # tensorboardX would import it, for seconds
    sys.exit(run_command(main, "train", sys.argv[1:]))
