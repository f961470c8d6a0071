"""The section "A loss term" of docs/extend.md: a file with terms, with and without hidden states, and a config."""

import json
import sys

import numpy as np
import pytest

from sfd_jax.diffusion.losses import TERMS
from sfd_jax.training import load_metadata
from sfd_jax.training.logging import read_metrics

PLUGIN = '''
import dataclasses

import jax
import jax.numpy as jnp

from sfd_jax.diffusion.losses import TERMS, LossTerm
from sfd_jax.ranges import Range
from sfd_jax.settings import setting


@TERMS.register("magnitude")
@dataclasses.dataclass(frozen=True)
class Magnitude(LossTerm):
    """Match the norm of the velocity at each position."""

    power: float = setting(2.0, "of the difference", range=Range(float, 1, 4))

    def __call__(self, at):
        length = lambda x: jnp.sqrt(jnp.sum(x**2, axis=-1) + 1e-6)
        return jnp.mean(jnp.abs(length(at.velocity) - length(at.target)) ** self.power, axis=(1, 2))


@TERMS.register("spread")
@dataclasses.dataclass(frozen=True)
class Spread(LossTerm):
    """Keep the hidden states of an image's positions different."""

    reads_hidden = True

    def __call__(self, at):
        return jnp.mean(jax.nn.relu(1 - jnp.std(at.projected, axis=1)), axis=1)
'''
CONFIG = """
from sfd_jax.experiment.config_files import load_config


def get_config(argument="s,tiny"):
    config = load_config(f"configs/sfd.py:{argument}")
    with config.unlocked():
        config.loss.repa_weight = 0.0
        config.loss.terms = {"magnitude": {"weight": 0.5}, "spread": {"weight": 0.25}}
    return config
"""


@pytest.fixture
def plugin(tmp_path):
    """The flag that loads the module, which is not imported before and is removed afterwards."""
    (tmp_path / "my_sfd_terms.py").write_text(PLUGIN)
    yield f"--plugin={tmp_path / 'my_sfd_terms.py'}"
    sys.modules.pop("my_sfd_terms", None)
    for name in ("magnitude", "spread"):
        TERMS.pop(name, None)


@pytest.mark.slow
def test_custom_terms(sfd, plugin, tmp_path, capsys):
    run, file = tmp_path / "run", tmp_path / "my_config.py"
    file.write_text(CONFIG)
    mine = (plugin, f"--workdir={run}", f"--config={file}:s,tiny")
    assert sfd("train", *mine) == 0
    terms = {"magnitude": {"weight": 0.5, "power": 2.0}, "spread": {"weight": 0.25}}
    assert load_metadata(run)["config"]["loss"]["terms"] == terms
    assert json.loads((run / "run.json").read_text())["config"]["loss"]["terms"] == terms
    rows = read_metrics(run)
    for row in rows:
        parts = [row["loss_velocity"], row["loss_cosine"], 0.5 * row["loss_magnitude"], 0.25 * row["loss_spread"]]
        np.testing.assert_allclose(row["loss"], sum(parts), rtol=1e-5)
    assert rows[0]["loss_magnitude"] > 1 and 0 < rows[-1]["loss_spread"] < rows[0]["loss_spread"]  # it is trained

    # Their settings belong to the run; on the command line they are set like all others, newly registered ones too.
    capsys.readouterr()
    for flags, status, says in (
        (["--config.loss.terms.magnitude.power=3"], 2, "loss.terms.magnitude.power: there 2.0, here 3.0"),
        (["--config.loss.terms.magnitude.power=5"], 2, "loss.terms.magnitude.power=5.0: give a number from 1 to 4"),
        (["--config.loss.terms.magnitude.powr=3"], 2, "did you mean 'power'"),
        (["--config.loss.terms.spraed.weight=1"], 2, "no loss terms 'spraed': did you mean 'spread'"),
        (["--config.model.repa_features=0"], 2, "loss term 'spread' reads projected hidden states"),
        (["--check"], 0, "no faults found"),
    ):
        assert sfd("train", *mine, *flags) == status
        captured = capsys.readouterr()
        assert says in captured.out + captured.err
    flags = ("--config.loss.terms.magnitude.weight=0.5", "--check")
    assert sfd("train", plugin, f"--workdir={tmp_path / 'other'}", *flags) == 0
