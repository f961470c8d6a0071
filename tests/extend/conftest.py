"""Fixtures for extensions: latents, a texture VAE, and the commands."""

import sys

import jax
import numpy as np
import pytest

from sfd_jax.cli import main as cli
from sfd_jax.data.latent_store import LatentStoreWriter, Plan, latent_fields
from sfd_jax.generation import Sampler
from sfd_jax.models import Network
from sfd_jax.training import save_params

TINY = [
    "--config=configs/sfd.py:s,tiny",
    *(f"--config.model.{setting}" for setting in ("depth=1", "width=16", "num_heads=2", "repa_depth=1", "remat=none")),
    *(f"--config.train.{setting}" for setting in ("steps=3", "checkpoint_every=3", "log_every=1", "ema_decay=0.5")),
    "--config.optimizer.learning_rate=0.01",
]


@pytest.fixture(scope="session")
def latents(tmp_path_factory):
    """Twenty images of the tiny recipe's shapes."""
    folder = tmp_path_factory.mktemp("latents")
    fields = latent_fields((4, 4, 8), (4, 4, 4), dtype="float32", flips=True, repa_shape=(16, 24))
    writer = LatentStoreWriter(folder, Plan(20, 20, fields, {}, {}, [f"class {i}" for i in range(10)]))
    random = np.random.default_rng(0)
    with writer.open_shard(0) as records:
        for index in range(20):
            arrays = {name: random.standard_normal(field["shape"]) for name, field in fields.items()}
            records.add({**arrays, "label": index % 10, "index": index})
    writer.finish()
    return folder


@pytest.fixture(scope="session")
def texture_vae(tmp_path_factory):
    """A random texture VAE with the latents' channels."""
    network, random = Network("texture_vae", dict(ch=4, ch_mult=(1, 2), z_channels=8, norm_groups=2)), np.random
    draw = random.default_rng(1).standard_normal
    params = jax.tree.map(lambda x: (draw(x.shape) / 4).astype(np.float32), network.abstract_params())
    folder = tmp_path_factory.mktemp("vae")
    save_params(folder, params, {"network": network.name, "network_config": network.config_dict(), "source": "drawn"})
    return folder


@pytest.fixture
def sfd(latents, texture_vae, monkeypatch):
    """Run a command in this process: `sfd("train", "--workdir=run")`; returns its status."""
    monkeypatch.setattr(sys, "path", list(sys.path))  # plugins add their folders
    given = {
        "train": [*TINY, f"--config.data.path={latents}"],
        "sample": [f"--texture_vae={texture_vae}", "--solver=euler", "--num_steps=4", "--batch_size=1"],
    }
    return lambda command, *flags: cli.main([command, *given.get(command, []), *flags])


@pytest.fixture
def samplers(monkeypatch):
    """The samplers that commands build, in order."""
    made, init = [], Sampler.__init__
    monkeypatch.setattr(
        Sampler, "__init__", lambda self, *args, **named: made.append(self) or init(self, *args, **named)
    )
    return made
