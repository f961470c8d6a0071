"""Train a network that takes long steps: the mean velocity of a frozen teacher's flow (`diffusion/few_step.py`).

Batches: `latents` (B, H, W, C) normalised, `labels` (B,) int32.
"""

import functools

import jax
import jax.numpy as jnp

from sfd_jax.diffusion import guidance
from sfd_jax.diffusion.clocks import Clocks
from sfd_jax.diffusion.few_step import FewStepConfig, draw_intervals, mean_target, motion
from sfd_jax.diffusion.losses import LossConfig, draw
from sfd_jax.diffusion.paths import LinearPath
from sfd_jax.latents import LatentLayout
from sfd_jax.models.network import Network
from sfd_jax.training.task import Task

LENGTHS = 4  # the error is logged by the length of the interval, in as many parts of [0, tau_end]


def few_step_task(
    network: Network,
    layout: LatentLayout,
    clocks: Clocks,
    loss: LossConfig,
    config: FewStepConfig,
    teachers: dict[str, tuple[Network, dict]],
) -> Task:
    """Return the task for a "lightning_dit" network with `end_time`.

    Args:
      network: the student.
      layout: which channels are texture.
      clocks: the teacher's, without trained parameters.
      loss: `semantic_weight` and `label_dropout` are used.
      config: where velocities come from, and which intervals are drawn.
      teachers: "teacher" and, for AutoGuidance, "weak": network and parameters (or their shapes).
    """
    # Computed in float32, whatever the dtype of the student: the derivative is a small difference of large numbers.
    precise = Network(network.name, {**network.config_dict(), "compute_dtype": "float32"})
    frozen = {name: params for name, (_, params) in teachers.items()}

    def velocity_of(frozen, labels):
        apply = {name: functools.partial(teacher.apply, frozen[name]) for name, (teacher, _) in teachers.items()}
        options = {"scale": config.guidance_scale, "layout": layout}
        if config.guidance == "cfg":
            null_label = network.config.num_classes
            return guidance.classifier_free(apply["teacher"], labels, null_label=null_label, **options)
        if config.guidance == "autoguidance":
            return guidance.autoguidance(apply["teacher"], apply["weak"], labels, **options)
        return guidance.conditional(apply["teacher"], labels)

    def compute(params, batch, key, *given):
        data, rows = batch["latents"], batch["row_indices"]
        null_label = network.config.num_classes if network.config.null_label else None
        draws = draw(key, data, batch["labels"], config=loss, null_label=null_label, row_indices=rows)
        at = draw_intervals(jax.random.fold_in(key, 1), rows, clocks, config)
        times, ends = clocks.times(at.tau), clocks.times(at.rho)
        t = layout.per_channel(times[1], times[0])[:, None, None]
        latents = LinearPath().interpolate(data, draws.noise, t)
        velocity = (
            data - draws.noise if config.velocity == "data" else velocity_of(*given, draws.labels)(latents, *times)
        )
        fixed = jax.lax.stop_gradient(params)
        at_point = lambda *point: precise.apply(fixed, *point[:3], draws.labels, point[3])
        target = mean_target(at_point, latents, velocity, at, clocks, layout)
        answer = network.apply(params, latents, *times, draws.labels, ends)

        move = motion(at, clocks, layout)
        weight = layout.per_channel(1.0, loss.semantic_weight)[None, None, None] * ((move.rate > 0) | (move.way > 0))
        error = jnp.mean(weight * (answer - target) ** 2, axis=(1, 2, 3))
        scaled = error / jax.lax.stop_gradient((error + 0.01) ** config.error_power)
        return scaled.mean(), _metrics(error, at, clocks)

    return Task("few_step", network, network.init, compute, frozen=frozen or None)


def _metrics(error, at, clocks):
    """Return the mean error, in all and by the length of the interval ("error_length_q1" for the shortest)."""
    metrics = {"error": (jnp.sum(error), jnp.float32(len(error)))}
    part = jnp.clip(jnp.floor((at.rho - at.tau) / clocks.tau_end * LENGTHS), 0, LENGTHS - 1)
    for q in range(LENGTHS):
        here = (part == q).astype(jnp.float32)
        metrics[f"error_length_q{q + 1}"] = (jnp.sum(error * here), jnp.sum(here))
    return metrics
