"""Previews of a run: the scores of `sfd evaluate --live`, pictures, the best checkpoint, and kills in between."""

import json

import jax
import numpy as np
import pytest
from PIL import Image
from test_loop import tensorboard_scalars, without_time
from test_train_command import make_store, train

from sfd_jax.cli import evaluate as evaluate_command
from sfd_jax.cli.main import run_command
from sfd_jax.evaluation import Extractor
from sfd_jax.experiment import evaluation
from sfd_jax.experiment.previews import Previews
from sfd_jax.models import Network
from sfd_jax.training import save_params
from sfd_jax.training.logging import read_metrics

VAE = dict(ch=4, ch_mult=(1, 2), num_res_blocks=1, z_channels=8, norm_groups=2, attention_levels=())


@pytest.fixture
def setup(tmp_path, monkeypatch):
    """Flags of a run with previews every second step, and those of `sfd evaluate` that compare in the same way."""
    weights = np.random.default_rng(2).standard_normal((8 * 8 * 3, 4)).astype(np.float32) / 100
    apply = lambda params, images: {"features": images.reshape(len(images), -1) @ params["w"]}
    monkeypatch.setattr(evaluation, "open_extractor", lambda name, path: Extractor(name, {"w": weights}, apply))
    network = Network("texture_vae", VAE)
    rng = np.random.default_rng(1)
    leaves = lambda x: (rng.standard_normal(x.shape) / np.sqrt(max(1, np.prod(x.shape[:-1])))).astype(np.float32)
    vae = tmp_path / "vae"
    save_params(vae, jax.tree.map(leaves, network.abstract_params()), network.metadata() | {"source": "drawn"})
    images = rng.integers(0, 256, (30, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "reference.npz", arr_0=images)
    compared = {"reference": tmp_path / "reference.npz", "inception": vae}
    preview = {"every": 2, "texture_vae": vae, "images": 16, "num": 12, "best": "fid", **compared}
    run = [f"--config.preview.{name}={value}" for name, value in preview.items()]
    run += ["--config.model.depth=1", "--config.model.remat=none", "--config.mesh.fsdp=1", "--config.train.steps=8"]
    run += [
        "--config.model.repa_depth=1",
        "--config.sample.solver=euler",
        "--config.sample.num_steps=9",
        "--config.optimizer.learning_rate=0.05",
    ]
    run += ["--config.train.ema_decay=0.5", "--config.train.keep_last=1", "--config.sample.guidance=none"]
    live = [f"--{name}={value}" for name, value in compared.items()]
    return make_store(tmp_path / "latents"), run, ["--live", f"--texture_vae={vae}", "--num=12", "--metrics=fid", *live]


@pytest.mark.slow
def test_previews_give_the_scores_of_evaluate_and_survive_a_kill(setup, tmp_path, monkeypatch, capsys):
    latents, flags, live = setup
    run = tmp_path / "run"
    assert train(run, latents, *flags) == 0
    rows = read_metrics(run)
    scores = {row["step"]: row["fid"] for row in rows}
    assert len(set(scores.values())) == 4  # the weights of each step
    best = min(scores, key=scores.get)
    assert sorted(int(path.name) for path in (run / "checkpoints").iterdir()) == sorted({best, 8})
    for step in {best, 8}:
        out = tmp_path / f"{step}.json"
        checkpoint = [f"--checkpoint={run}", f"--step={step}", f"--out={out}"]
        assert run_command(evaluate_command.main, "evaluate", [*live, *checkpoint]) == 0
        assert json.loads(out.read_text())["scores"]["fid"] == scores[step]  # bit for bit
    pictures = sorted((run / "previews").iterdir())
    assert [path.name for path in pictures] == [f"step_{step:08d}.png" for step in (2, 4, 6, 8)]
    assert Image.open(pictures[0]).height == 9 * 66  # a row for each of eight classes, and the stages, enlarged
    assert tensorboard_scalars(run / "tensorboard")["fid"] == pytest.approx(scores)
    assert b"\x89PNG" in b"".join(path.read_bytes() for path in (run / "tensorboard").iterdir())
    assert Image.open(run / "convergence.png").width > 100

    # Another run is killed in its third preview, and goes on as if it had not been.
    score, killed = Previews._score, tmp_path / "killed"

    def fails_once(self, sampler):
        monkeypatch.setattr(Previews, "_score", score)
        raise KeyboardInterrupt

    def fails_at_6(self, sampler):
        if len(read_metrics(killed)) == 2:
            return fails_once(self, sampler)
        return score(self, sampler)

    monkeypatch.setattr(Previews, "_score", fails_at_6)
    assert train(killed, latents, *flags) != 0
    assert [row["step"] for row in read_metrics(killed)] == [2, 4]
    assert train(killed, latents, *flags) == 0
    assert without_time(read_metrics(killed)) == without_time(rows)


def test_faults_of_the_settings_are_named_before_training(setup, tmp_path, capsys):
    latents, flags, _ = setup
    wrong = ["--config.preview.every=3", "--config.preview.weak=nowhere", "--config.preview.metrics=fud"]
    assert train(tmp_path / "run", latents, *flags, *wrong, "--config.preview.reference=") == 2
    error = capsys.readouterr().err
    for words in (
        "every=3 is not a multiple",
        "nowhere",
        "unknown metric 'fud'",
        "preview.num needs preview.reference",
    ):
        assert words in error
    assert not (tmp_path / "run").exists()
    assert train(tmp_path / "run", latents, *flags, "--config.preview.best=precision") == 2
    assert "preview.best=precision: no score of this run whose smallest value is best" in capsys.readouterr().err
    assert not read_metrics(tmp_path / "run")
