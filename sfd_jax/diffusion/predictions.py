"""What the network predicts: the velocity, the noise, or the score.

A `PredictionType` defines what the loss compares, and how the network's output becomes the velocity for samplers. Noise
and score determine the velocity only inside an interval of times (`interval`); loss and samplers clip times to it. A
type is a frozen dataclass in a registry; its fields are its settings. (`losses.Prediction` is another thing: the
inputs of a loss term.)

Source: released `transport/transport.py`, `training_losses`, `get_drift`, `check_interval`.
"""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sfd_jax import settings
from sfd_jax.diffusion.paths import PATHS, Path
from sfd_jax.latents import LatentLayout
from sfd_jax.ranges import Range, check_fields
from sfd_jax.registry import Registry
from sfd_jax.settings import setting

PREDICTIONS: Registry[type["PredictionType"]] = Registry("prediction")

WEIGHTS = ("none", "velocity", "likelihood")


@dataclasses.dataclass(frozen=True)
class PredictionType(abc.ABC):
    """Define what a network predicts; latents, data, noise and outputs are (B,H,W,C), times (B,1,1,C)."""

    eps: float = setting(1e-3, "distance kept from a singular end of the path", range=Range(float, 0, 0.1, above=True))

    def __post_init__(self):
        check_fields("prediction", self)

    def interval(self, path: Path) -> tuple[float, float]:
        """Return the first and the last time at which the output determines a finite velocity."""
        return self.eps if path.pure_noise else 0.0, 1 - self.eps

    def clip(self, t: jax.Array, path: Path) -> jax.Array:
        """Return the times clipped to `interval`."""
        low, high = self.interval(path)
        return t if (low, high) == (0, 1) else jnp.clip(t, low, high)

    @abc.abstractmethod
    def compared(
        self, output: jax.Array, data: jax.Array, noise: jax.Array, t: jax.Array, path: Path
    ) -> tuple[jax.Array, jax.Array]:
        """Return (predicted, target), whose difference the loss squares."""

    @abc.abstractmethod
    def velocity(self, output: jax.Array, latents: jax.Array, t: jax.Array, path: Path) -> jax.Array:
        """Return the velocity of the probability flow, from the network's output at time t inside `interval`."""

    def loss_weight(self, t: jax.Array, path: Path) -> jax.Array | None:
        """Return the weight of the squared differences at times t, in the shape of t; None for 1."""
        return None


@PREDICTIONS.register("velocity")
@dataclasses.dataclass(frozen=True)
class VelocityPrediction(PredictionType):
    """Predict the velocity of the path."""

    def interval(self, path: Path) -> tuple[float, float]:
        return 0.0, 1 - self.eps if path.steep_end else 1.0

    def compared(
        self, output: jax.Array, data: jax.Array, noise: jax.Array, t: jax.Array, path: Path
    ) -> tuple[jax.Array, jax.Array]:
        return output, path.velocity(data, noise, t)

    def velocity(self, output: jax.Array, latents: jax.Array, t: jax.Array, path: Path) -> jax.Array:
        return output


@dataclasses.dataclass(frozen=True)
class _Weighted(PredictionType):
    weight: str = setting(
        "none",
        "weight of the squared error: none (1), velocity ((g / sigma)^2) or likelihood (g / sigma^2); g is the path's "
        "drift variance",
        choices=WEIGHTS,
    )

    def loss_weight(self, t: jax.Array, path: Path) -> jax.Array | None:
        if self.weight == "none":
            return None
        low, high = self.interval(path)
        at = self.clip(t, path)
        g, sigma = path.drift_variance(at), path.sigma(at)
        weight = (g / sigma) ** 2 if self.weight == "velocity" else g / sigma**2
        # A clock that waits at 0 or 1 would otherwise have almost all the weight (1e6 at the default eps).
        return jnp.where((t >= low) & (t <= high), weight, 0.0)


@PREDICTIONS.register("noise")
@dataclasses.dataclass(frozen=True)
class NoisePrediction(_Weighted):
    """Predict the noise at the start of the path; score = -noise / sigma."""

    def compared(
        self, output: jax.Array, data: jax.Array, noise: jax.Array, t: jax.Array, path: Path
    ) -> tuple[jax.Array, jax.Array]:
        return output, noise

    def velocity(self, output: jax.Array, latents: jax.Array, t: jax.Array, path: Path) -> jax.Array:
        return path.velocity_from_score(-output / path.sigma(t), latents, t)


@PREDICTIONS.register("score")
@dataclasses.dataclass(frozen=True)
class ScorePrediction(_Weighted):
    """Predict the score, the gradient of the log density; the loss compares sigma * score with -noise."""

    def compared(
        self, output: jax.Array, data: jax.Array, noise: jax.Array, t: jax.Array, path: Path
    ) -> tuple[jax.Array, jax.Array]:
        return output * path.sigma(t), -noise

    def velocity(self, output: jax.Array, latents: jax.Array, t: jax.Array, path: Path) -> jax.Array:
        return path.velocity_from_score(output, latents, t)


def transport_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return {"path": Path, "prediction": PredictionType} of a diffusion config; linear and velocity by default.

    Args:
      config: the whole config; `loss.path` and `loss.prediction`, {"name": ..., **fields} each, may be missing.

    Raises:
      SfdError: an unknown name or field, or a value outside its range.
    """
    loss = config.get("loss") or {}
    return {
        "path": settings.make(PATHS, loss.get("path") or {"name": "linear"}),
        "prediction": settings.make(PREDICTIONS, loss.get("prediction") or {"name": "velocity"}),
    }


def describe_transport(path: Path, prediction: PredictionType) -> dict[str, Any]:
    """Return both as configs for a recipe; {} for linear and velocity, the default."""
    if {"path": path, "prediction": prediction} == transport_of({}):
        return {}
    return {"path": settings.describe(PATHS, path), "prediction": settings.describe(PREDICTIONS, prediction)}


def velocity_from(
    apply: Callable[..., jax.Array], prediction: PredictionType, path: Path, layout: LatentLayout
) -> Callable[..., jax.Array]:
    """Turn a network into one that predicts the velocity, for guidance, samplers and likelihood.

    Args:
      apply: (latents (B,H,W,C), t_semantic (B,), t_texture (B,), ...) -> output (B,H,W,C).
      prediction: the type of the output.
      path: the path it was trained on.
      layout: which channels are texture.

    Returns:
      A function of the same arguments; `apply` itself if it predicts the velocity.
    """
    if isinstance(prediction, VelocityPrediction):
        return apply

    def velocity(latents, t_semantic, t_texture, *more):
        output = apply(latents, t_semantic, t_texture, *more).astype(jnp.float32)
        t = layout.per_channel(t_texture, t_semantic)
        t = prediction.clip(t.reshape(len(t), *(1,) * (latents.ndim - 2), -1), path)
        return prediction.velocity(output, latents, t, path)

    return velocity
