"""`sfd train` with learned clocks: the probe, then the run, with an interruption between them."""

import json

import numpy as np
import pytest

from sfd_jax.cli.main import run_command
from sfd_jax.cli.train import main
from sfd_jax.diffusion.clocks import make_clocks
from sfd_jax.errors import SfdError
from sfd_jax.experiment import training
from sfd_jax.experiment.config_files import load_config
from sfd_jax.experiment.learned_clocks import read_learned_clocks, with_learned_clocks
from sfd_jax.generation.parts import clocks_of
from sfd_jax.training import load_metadata
from sfd_jax.training.logging import read_metrics
from tests.training.test_train_command import make_store

CONFIG = "configs/sfd.py:xl,learned_clocks,tiny"


@pytest.mark.parametrize("variant", ["synchronous", "plain"])
def test_one_clock_has_nothing_to_learn(variant):
    with pytest.raises(SfdError, match="contradict each other"):
        load_config(f"configs/sfd.py:xl,learned_clocks,{variant}")


@pytest.mark.slow
def test_the_probe_then_the_run_with_an_interruption_between(tmp_path, monkeypatch, capsys):
    latents, run = make_store(tmp_path / "latents"), tmp_path / "run"

    def train(workdir, *flags):
        small = [f"--config.model.{setting}" for setting in ("depth=1", "width=24", "num_heads=2", "repa_depth=1")]
        given = [f"--config={CONFIG}", f"--workdir={workdir}", f"--config.data.path={latents}", *small, *flags]
        return run_command(main, "train", given)

    assert train(run, "--check") == 0 and not run.exists()
    with monkeypatch.context() as patch:
        patch.setattr(training, "open_diffusion", lambda *_, **__: (_ for _ in ()).throw(SfdError("interrupted")))
        assert train(run) == 2 and "interrupted" in capsys.readouterr().err
    learned = read_learned_clocks(run)
    probed = (run / "probe/metrics.jsonl").read_bytes()
    assert not (run / "run.json").exists() and learned["clocks"]["name"] == "learned"
    assert (run / "learned_clocks.png").read_bytes()[:4] == b"\x89PNG"
    history = learned["history"]
    assert history == read_metrics(run / "probe") and [row["step"] for row in history] == [1, 2, 3, 4]
    assert 0 < learned["share_of_flops"] < 1 and history[0]["wait"] == pytest.approx(0.3, abs=1e-3)
    assert np.isfinite([row["corrected_loss"] for row in history]).all()
    assert learned["clocks"]["energy_ratio"] == 8 / 4 and learned["clocks"]["wait"] != 0.3

    # The same command goes on with the run; another probe in the same folder is refused.
    assert train(run, "--config.probe.kinetic_weight=0.1") == 2
    assert "config.probe.kinetic_weight: there 0.05, here 0.1" in capsys.readouterr().err
    assert train(run) == 0
    assert (run / "probe/metrics.jsonl").read_bytes() == probed and read_metrics(run)[-1]["step"] == 4
    metadata = load_metadata(run)
    assert clocks_of(metadata) == make_clocks(learned["clocks"]) and "probe" not in metadata["config"]
    assert json.loads((run / "run.json").read_text())["config"]["clocks"] == learned["clocks"]

    # A weak model takes the curve of the run.
    weak = lambda path: with_learned_clocks(load_config(CONFIG, [f"--config.probe.path={path}"]), tmp_path / "weak")
    assert make_clocks(weak(run).clocks) == clocks_of(metadata)
    with pytest.raises(SfdError, match="no learned_clocks.json"):
        weak(latents)
