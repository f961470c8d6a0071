"""One step of the real network with its real loss: neither the mesh nor accumulation changes it.

REPA is iREPA: its convolution is no matrix product, unlike all other layers, and features are normalised over an image.
"""

import dataclasses

import jax
import numpy as np
import pytest
from test_diffusion_task import DIT as WITH_MLP
from test_diffusion_task import make_batch, make_task

from sfd_jax.distributed import make_mesh, put_batch
from sfd_jax.models import Network
from sfd_jax.training import OptimizerConfig, TrainConfig, make_optimizer, make_train_step
from sfd_jax.training.randomness import stream_key
from sfd_jax.training.state import state_from_params

# Adam's first update is g / (|g| + eps): with eps 1 it is as smooth in the gradient as the gradient itself, where the
# usual 1e-8 would amplify the rounding of gradients near zero. So parameters after the step show the gradients.
DIT = dataclasses.replace(WITH_MLP, repa_projector="conv")
CONFIG = TrainConfig(
    OptimizerConfig(learning_rate=1.0, eps=1.0, weight_decay=0.1), steps=5, global_batch_size=16, ema_decay=0.5
)


def random_params():
    """Every weight at random, the zero-initialised ones too."""
    rng = np.random.default_rng(1)
    draw = lambda leaf: (0.3 * rng.standard_normal(leaf.shape)).astype(np.float32)
    return jax.tree.map(draw, Network("lightning_dit", DIT).abstract_params())


def step_on(mesh, accumulation=1):
    config = dataclasses.replace(CONFIG, accumulation=accumulation)
    task, optimizer = make_task(DIT, repa_spatial_norm=0.6), make_optimizer(CONFIG.optimizer, CONFIG.steps)
    state = state_from_params(random_params(), optimizer, mesh)
    step = make_train_step(task, optimizer, config, mesh)
    state, metrics = step(state, put_batch(make_batch(), mesh), stream_key(5, "loss", mesh))
    means = {name: value / count for name, (value, count) in jax.device_get(metrics).items() if count}
    return (jax.device_get(state), means), state


@pytest.fixture(scope="module")
def alone():
    (state, metrics), _ = step_on(make_mesh(1, 1, devices=jax.devices()[:1]))
    assert metrics["loss_repa"] > 0 and metrics["loss_cosine"] > 0
    moved = jax.tree.map(lambda new, old: np.abs(new - old).max(), state.params, random_params())
    assert min(jax.tree.leaves(moved)) > 1e-3  # each parameter has a gradient
    return state, metrics


@pytest.mark.slow
@pytest.mark.parametrize("shape, accumulation", [((1, 8), 1), ((2, 4), 2), ((8, 1), 1)])
def test_a_step_on_eight_devices_equals_one_device(shape, accumulation, alone, monkeypatch):
    monkeypatch.setattr("sfd_jax.distributed.sharding.MIN_ELEMENTS", 1)  # or nothing of this size would be split
    (state, metrics), on_devices = step_on(make_mesh(*shape), accumulation)
    # Sums run in another order.
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, alone[0], state)
    jax.tree.map(close, alone[1], metrics)
    kernel = on_devices.opt_state[0].nu["blocks"]["attention"]["qkv"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape)[2] == 48 // shape[1]
