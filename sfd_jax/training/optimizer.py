"""AdamW, learning-rate schedules, gradient clipping, and a check that the EMA's decay fits the run's length."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sfd_jax.errors import SfdError
from sfd_jax.models.network import checkpoint_name
from sfd_jax.ranges import check_fields
from sfd_jax.settings import setting

SCHEDULES = ("constant", "cosine", "constant_cosine")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule. Counts are optimizer updates.

    Attributes:
      learning_rate: peak learning rate.
      b1, b2, eps: Adam's decays and its guard against division by zero.
      weight_decay: decoupled, on every parameter, as in PyTorch's AdamW without parameter groups.
      schedule: after the warm-up, "constant"; "cosine" down to `final_fraction` at the last step; or
        "constant_cosine": constant up to `constant_steps`, then cosine.
      warmup_steps: linear warm-up from `warmup_fraction` of the peak.
      warmup_fraction: where the warm-up starts.
      constant_steps: step at which "constant_cosine" begins to fall.
      final_fraction: of the peak, where the cosine ends.
      clip_norm: largest global norm of the gradient; 0 for no clipping.
      first_moment_dtype: "float32", or "bfloat16", which takes two bytes a parameter less. The second moment is
        always float32: it changes by a factor of 1 - b2 = 0.001 a step, which bfloat16 would round away.

    Raises:
      SfdError: unknown schedule or dtype, or a number outside its range.
    """

    learning_rate: float = 1e-4
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    schedule: str = setting("constant", "of the learning rate", choices=SCHEDULES)
    warmup_steps: int = 0
    warmup_fraction: float = 0.01
    constant_steps: int = 0
    final_fraction: float = 0.0
    clip_norm: float = 0.0
    first_moment_dtype: str = setting("float32", "of AdamW's first moment", choices=("float32", "bfloat16"))

    def __post_init__(self):
        check_fields("optimizer", self)

    @property
    def may_extend(self) -> bool:
        """Tell whether the learning rate of a step is the same whatever the length of the run."""
        return self.schedule == "constant"


def make_optimizer(config: OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
    """Build the optimizer: clip, then AdamW.

    Args:
      config: its settings.
      total_steps: where a falling schedule ends.

    Returns:
      An optax.GradientTransformation.

    Raises:
      SfdError: the schedule's parts do not fit into `total_steps`.
    """
    adamw = optax.adamw(
        make_schedule(config, total_steps),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mu_dtype=config.first_moment_dtype,
    )
    return optax.chain(clip_by_global_norm(config.clip_norm), adamw) if config.clip_norm else adamw


def make_schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Return the learning rate as a function of the number of updates done.

    Args:
      config: `schedule` and the fields it uses.
      total_steps: where a falling schedule ends.

    Raises:
      SfdError: its parts do not fit into `total_steps`.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    hold = config.constant_steps if config.schedule == "constant_cosine" else warmup
    if config.schedule != "constant" and not warmup <= hold < total_steps:
        raise SfdError(
            f"optimizer.schedule '{config.schedule}' needs warmup_steps <= constant_steps < train.steps; "
            f"got warmup_steps={warmup}, constant_steps={hold}, steps={total_steps}"
        )
    parts, boundaries = [optax.constant_schedule(peak)], []
    if warmup:
        parts.insert(0, optax.linear_schedule(config.warmup_fraction * peak, peak, warmup))
        boundaries.append(warmup)
    if config.schedule != "constant":
        parts.append(optax.cosine_decay_schedule(peak, total_steps - hold, config.final_fraction))
        boundaries.append(hold)
    return optax.join_schedules(parts, boundaries)


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Scale gradients by min(1, max_norm / (norm + 1e-6)).

    Source: torch.nn.utils.clip_grad_norm_; optax's own clipping lacks the 1e-6, a relative difference of
    1e-6 / norm.
    """

    def update(grads, state, params=None):
        del params
        scale = jnp.minimum(1.0, max_norm / (optax.tree.norm(grads) + 1e-6))
        return jax.tree.map(lambda g: g * scale, grads), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


# The digits' shortest stage leaves 4.9 % of its first weights in the average, the released weak model 0.1 %.
INITIAL_SHARE = 0.05


def check_average(decay: float, steps: int) -> list[str]:
    """Return a note where a run's averaged weights will still contain a large share of the initial ones.

    Args:
      decay: d of ema = d * ema + (1 - d) * params, which after n steps holds d^n of the first weights.
      steps: length of the run.

    Returns:
      [], or a sentence with the share at the end and the decay that leaves 1 %.
    """
    if (share := decay**steps) <= INITIAL_SHARE:
        return []
    rest = 1 - 0.01 ** (1 / steps)
    unit = 10.0 ** (math.floor(math.log10(rest)) - 1)
    enough = 1 - math.ceil(rest / unit) * unit  # 1 - decay to two digits, rounded up
    return [
        f"train.ema_decay={decay} is too large for {steps:,} steps: at the end the averaged weights, used by sampling, "
        f"still hold {share:.1%} of the initial ones. Set train.ema_decay={enough:.10g} (1 % left), or sample with "
        "--weights=raw"
    ]


def average_notes(metadata: Mapping[str, Any]) -> list[str]:
    """Return a note where a checkpoint's averaged weights still contain a large share of the random initial ones.

    Args:
      metadata: of the checkpoint; "which" says whether the averaged ("ema") or the raw weights are used.
    """
    train = (metadata.get("config") or {}).get("train") or {}
    average = metadata.get("average") or {"decay": train.get("ema_decay"), "from": "drawn weights"}
    decay, step = average["decay"], metadata.get("step") or 0
    if not decay or metadata.get("which") == "raw" or average["from"] != "drawn weights":
        return []
    if (share := decay**step) <= INITIAL_SHARE:
        return []
    return [
        f"{checkpoint_name(metadata)}: at step {step:,} the averaged weights still hold {share:.1%} of "
        f"the initial ones (ema_decay={decay}); sample with --weights=raw to use the trained weights"
    ]
