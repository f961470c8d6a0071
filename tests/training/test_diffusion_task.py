"""The diffusion task: its loss, and the parts that contradict each other."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sfd_jax.diffusion.clocks import FixedOffset, Synchronous
from sfd_jax.diffusion.losses import LossConfig
from sfd_jax.errors import SfdError
from sfd_jax.experiment.build import task_from_config
from sfd_jax.experiment.config_files import load_config
from sfd_jax.latents import LatentLayout
from sfd_jax.models import DiTConfig, Network
from sfd_jax.training.diffusion import diffusion_task

DIT = DiTConfig(
    width=16,
    depth=2,
    num_heads=2,
    input_size=2,
    in_channels=5,
    num_classes=3,
    repa_features=7,
    repa_depth=1,
    repa_width=8,
)
LAYOUT = LatentLayout(3, 2)


def make_task(dit=DIT, layout=LAYOUT, clocks=FixedOffset(0.3), **loss):
    return diffusion_task(Network("lightning_dit", dit), layout, clocks, LossConfig(**loss))


def make_batch(rows=16):
    rng = np.random.default_rng(0)
    return {
        "latents": rng.standard_normal((rows, 2, 2, 5)).astype(np.float32),
        "labels": rng.integers(0, 3, rows).astype(np.int32),
        "repa_features": rng.standard_normal((rows, 4, 7)).astype(np.float16),
    }


def test_a_fresh_network_predicts_zero_so_the_loss_is_known():
    """With velocity 0 the squared error is the target's square, and the cosine term is 1."""
    task = make_task(repa_weight=0.0)
    batch = {**make_batch(4096), "row_indices": jnp.arange(4096)}
    _, metrics = jax.jit(task.loss)(task.init(jax.random.key(0)), batch, jax.random.key(1))
    mean = {name: float(value / count) for name, (value, count) in metrics.items() if count}
    np.testing.assert_allclose(mean["loss_cosine"], 1.0, rtol=1e-6)
    # data - noise has variance 2 in every channel; 4096 x 20 values give it to about half a percent.
    np.testing.assert_allclose([mean["error_texture"], mean["error_semantic"]], 2.0, rtol=0.03)
    np.testing.assert_allclose(mean["loss_velocity"], (3 * 2 + 2 * 2 * 2) / 5, rtol=0.03)
    assert mean["loss_repa"] == 0
    # t = sigmoid(N(0,1)) and tau = 1.3 t: texture stays at 0 below t = 0.23, semantics are at 1 above 0.77.
    counts = [float(metrics[f"error_{group}_q{q}"][1]) / 4096 for group in ("texture", "semantic") for q in (1, 4)]
    below = lambda t: 0.5 * (1 + math.erf(np.log(t / (1 - t)) / 2**0.5))  # P(sigmoid(N(0, 1)) < t)
    expected = [below(0.55 / 1.3), 1 - below(1.05 / 1.3), below(0.25 / 1.3), 1 - below(0.75 / 1.3)]
    np.testing.assert_allclose(counts, expected, atol=0.03)  # four standard deviations of 4096 draws


def test_irepa_trains_its_convolution_on_normalised_features():
    shallow = ["--config.model.depth=1", "--config.model.repa_depth=1"]
    task = task_from_config(load_config("configs/sfd.py:xl,irepa,tiny", shallow))
    rng = np.random.default_rng(0)
    draw = lambda leaf: (0.1 * rng.standard_normal(leaf.shape)).astype(np.float32)
    params = jax.tree.map(draw, task.network.abstract_params())
    batch = {
        "latents": rng.standard_normal((4, 4, 4, 12)).astype(np.float32),
        "labels": np.arange(4, dtype=np.int32),
        "row_indices": np.arange(4, dtype=np.int32),
        "repa_features": rng.standard_normal((4, 16, 24)).astype(np.float16),
    }

    loss = lambda params, batch: task.loss(params, batch, jax.random.key(1))[0]
    quick = {"xla_backend_optimization_level": 0}  # most of the time is spent compiling
    gradient = jax.jit(jax.value_and_grad(loss), compiler_options=quick)
    value, gradients = gradient(params, batch)
    assert np.isfinite(value) and all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradients))
    taps = np.abs(gradients["repa_projector"]["conv"]["kernel"]).max((2, 3))
    assert taps.shape == (3, 3) and taps.min() > 0
    # The scale of a channel does not matter after the normalisation.
    scaled, _ = gradient(params, batch | {"repa_features": batch["repa_features"] * np.float16([4, 0.5] * 12)})
    np.testing.assert_allclose(scaled, value, rtol=1e-5)


@pytest.mark.parametrize(
    "parts, message",
    [
        (dict(layout=LatentLayout(3, 1)), "model.in_channels=5, but the latents have 3 texture and 1 semantic"),
        (dict(dit=dataclasses.replace(DIT, repa_features=0)), "loss.repa_weight=1.0 .* model.repa_features=0"),
        (dict(dit=dataclasses.replace(DIT, input_size=1), repa_spatial_norm=0.6), "=0.6 needs several tokens"),
        (dict(dit=dataclasses.replace(DIT, null_label=False)), "loss.label_dropout=0.1 .* model.null_label=False"),
        (dict(dit=dataclasses.replace(DIT, two_clocks=False)), "model.two_clocks=False .* FixedOffset"),
    ],
)
def test_parts_that_contradict_each_other(parts, message):
    with pytest.raises(SfdError, match=message):
        make_task(**parts)
    make_task(dit=dataclasses.replace(DIT, two_clocks=False), clocks=Synchronous())
