"""Estimate hours, chip-hours and bytes of a training run from one measured step."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from sfd_jax.data.latent_store import DTYPES, latent_fields
from sfd_jax.pod.report import GIB, Measurement, two_columns

IMAGENET_TRAIN = 1_281_167
EPOCHS = (80, 800)  # the paper's two lengths


@dataclasses.dataclass(frozen=True)
class Length:
    """A run of a number of epochs.

    Attributes:
      epochs, steps: its length.
      hours: wall clock of the whole topology, without start, checkpoints and evaluation.
      chip_hours: hours times chips.
      checkpoint_bytes: of all checkpoints kept at its end.
    """

    epochs: int
    steps: int
    hours: float
    chip_hours: float
    checkpoint_bytes: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """The needs of a run. Times are estimates that depend on `utilisation`, which has not been measured.

    Attributes:
      step: the compiled training step.
      utilisation: assumed fraction of the chips' peak matrix rate, including recomputation.
      step_seconds, images_a_second: derived from it.
      latent_bytes: of the latents of all images, in both orientations.
      repa_bytes: of REPA's stored features, or 0.
      checkpoint_bytes: of one checkpoint: parameters, EMA and Adam's two moments.
      lengths: the paper's two runs.
    """

    step: Measurement
    utilisation: float
    step_seconds: float
    images_a_second: float
    latent_bytes: int
    repa_bytes: int
    checkpoint_bytes: int
    lengths: tuple[Length, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON-able values."""
        values = dataclasses.asdict(dataclasses.replace(self, step=None))
        return values | {"step": self.step.to_dict(), "times_are_estimates": True}


def make_plan(
    step: Measurement,
    *,
    utilisation: float,
    images: int = IMAGENET_TRAIN,
    texture_shape: tuple[int, ...],
    semantic_shape: tuple[int, ...],
    repa_shape: tuple[int, int] | None,
    keep_last: int,
    keep_every: int,
    epochs: Sequence[int] = EPOCHS,
) -> Plan:
    """Compute the plan of a run.

    Args:
      step: the measured training step; it must have compiled.
      utilisation: in (0, 1].
      images: number of images in the data set.
      texture_shape, semantic_shape, repa_shape: (H,W,C), (H,W,C) and (N,F) per image; None without stored features.
      keep_last, keep_every: which checkpoints are kept, as in TrainConfig.
      epochs: lengths of the runs.
    """
    chips = step.topology.count
    seconds = step.flops / (step.topology.chip.matrix_rate * utilisation)
    checkpoint = 4 * 4 * sum(step.parameters.values())
    lengths = []
    for count in epochs:
        steps = math.ceil(count * images / step.batch)
        hours = steps * seconds / 3600
        kept = min(keep_last, steps) + (steps // keep_every if keep_every else 0)
        lengths.append(Length(count, steps, hours, hours * chips, kept * checkpoint))
    both = latent_fields(texture_shape, semantic_shape, dtype="bfloat16", flips=True)
    with_repa = latent_fields(texture_shape, semantic_shape, dtype="bfloat16", flips=True, repa_shape=repa_shape)
    latents = images * _bytes(both)
    return Plan(
        step,
        utilisation,
        seconds,
        step.batch / seconds,
        latents,
        images * _bytes(with_repa) - latents,
        checkpoint,
        tuple(lengths),
    )


def _bytes(fields: dict[str, dict]) -> int:
    return sum(np.dtype(DTYPES[f["dtype"]]).itemsize * math.prod(f["shape"]) for f in fields.values())


def plan_table(plan: Plan) -> str:
    """Return a plan as a table."""
    step, chip = plan.step, plan.step.topology.chip
    tb = lambda size: f"{size / 1e12:.2f} TB" if size >= 1e12 else f"{size / 1e9:.1f} GB"
    rows = [
        ("run", f"{step.program}, global batch {step.batch}"),
        (
            "topology",
            f"{step.topology}: {step.topology.count} chips, {step.batch / step.topology.count:g} images per chip",
        ),
        ("memory per chip", f"{step.needed / GIB:.2f} of {chip.usable / GIB:g} GiB, from the compiler"),
        ("FLOPs per chip and step", f"{step.flops:.3g}, from the traced program"),
        (
            "step (estimate)",
            f"{plan.step_seconds:.3f} s, {plan.images_a_second:,.0f} images per second, "
            f"at {plan.utilisation:.0%} of {chip.matrix_rate / 1e12:g} TFLOP/s per chip",
        ),
    ]
    for length in plan.lengths:
        rows.append(
            (
                f"{length.epochs} epochs (estimate)",
                f"{length.steps:,} steps, {length.hours:,.1f} hours, "
                f"{length.chip_hours:,.0f} chip-hours; checkpoints kept {tb(length.checkpoint_bytes)}",
            )
        )
    stored = f", and {tb(plan.repa_bytes)} of REPA's features (none with another data.repa_source)"
    rows.append(("latents", tb(plan.latent_bytes) + (stored if plan.repa_bytes else "")))
    rows.append(("checkpoint", tb(plan.checkpoint_bytes)))
    return two_columns(rows)
