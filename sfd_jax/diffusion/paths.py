"""Paths between noise (t = 0) and data (t = 1): x_t = alpha(t) data + sigma(t) noise.

Time is an array that broadcasts against the latents, (B,1,1,C) in the loss, because the two groups of channels have
their own clocks. To add a path, write a frozen dataclass with `alpha` and `sigma` and register it under a name; its
fields are its settings.

Source: released `transport/path.py`.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from sfd_jax.ranges import Range, check_fields
from sfd_jax.registry import Registry
from sfd_jax.settings import setting

PATHS: Registry[type["Path"]] = Registry("path")


class Path(abc.ABC):
    """Connect noise to data.

    The velocity of the probability flow is alpha'/alpha x + g s, with s the score and g the drift variance.

    Attributes:
      pure_noise: whether alpha(0) = 0, so that alpha'/alpha and g are infinite at t = 0.
      steep_end: whether sigma', and so the velocity, is infinite at t = 1.
    """

    pure_noise: ClassVar[bool] = True
    steep_end: ClassVar[bool] = False

    def __post_init__(self):
        check_fields("path", self)

    @abc.abstractmethod
    def alpha(self, t: jax.Array) -> jax.Array:
        """Return the coefficient of the data, in the shape of t; 1 at t = 1."""

    @abc.abstractmethod
    def sigma(self, t: jax.Array) -> jax.Array:
        """Return the coefficient of the noise, in the shape of t; 0 at t = 1."""

    def d_alpha(self, t: jax.Array) -> jax.Array:
        """Return the derivative of `alpha`."""
        return _derivative(self.alpha, t)

    def d_sigma(self, t: jax.Array) -> jax.Array:
        """Return the derivative of `sigma`."""
        return _derivative(self.sigma, t)

    def alpha_ratio(self, t: jax.Array) -> jax.Array:
        """Return alpha' / alpha."""
        return self.d_alpha(t) / self.alpha(t)

    def drift_variance(self, t: jax.Array) -> jax.Array:
        """Return g = alpha'/alpha sigma^2 - sigma sigma'."""
        sigma = self.sigma(t)
        return self.alpha_ratio(t) * sigma**2 - sigma * self.d_sigma(t)

    def interpolate(self, data: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
        """Return the point at time t: `data` at t = 1, `noise` at t = 0 if `pure_noise`."""
        return self.alpha(t) * data + self.sigma(t) * noise

    def velocity(self, data: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
        """Return the derivative of `interpolate` with respect to t."""
        return self.d_alpha(t) * data + self.d_sigma(t) * noise

    def velocity_from_score(self, score: jax.Array, latents: jax.Array, t: jax.Array) -> jax.Array:
        """Return the velocity of the probability flow, from the score of the latents at time t."""
        return self.alpha_ratio(t) * latents + self.drift_variance(t) * score

    def noise_from_velocity(self, velocity: jax.Array, latents: jax.Array, t: jax.Array) -> jax.Array:
        """Return the expected noise of the latents at time t."""
        ratio = self.alpha(t) / self.d_alpha(t)  # finite at t = 0, unlike its inverse
        return (ratio * velocity - latents) / (ratio * self.d_sigma(t) - self.sigma(t))

    def score_from_velocity(self, velocity: jax.Array, latents: jax.Array, t: jax.Array) -> jax.Array:
        """Return the score, the gradient of the log density, of the latents at time t < 1."""
        return -self.noise_from_velocity(velocity, latents, t) / self.sigma(t)


def _derivative(function: Callable[[jax.Array], jax.Array], t: jax.Array) -> jax.Array:
    return jax.jvp(function, (t,), (jnp.ones_like(t),))[1]


@PATHS.register("linear")
@dataclasses.dataclass(frozen=True)
class LinearPath(Path):
    """Connect noise and data by a straight line: x_t = t data + (1 - t) noise, velocity = data - noise.

    Source: ICPlan.
    """

    def alpha(self, t: jax.Array) -> jax.Array:
        return t

    def sigma(self, t: jax.Array) -> jax.Array:
        return 1.0 - t


@PATHS.register("gvp")
@dataclasses.dataclass(frozen=True)
class GVPPath(Path):
    """Preserve the variance if the ends are uncorrelated: alpha = sin(pi t / 2), sigma = cos(pi t / 2).

    Source: GVPCPlan.
    """

    def alpha(self, t: jax.Array) -> jax.Array:
        return jnp.sin(np.float32(np.pi / 2) * t)

    def sigma(self, t: jax.Array) -> jax.Array:
        return jnp.cos(np.float32(np.pi / 2) * t)


class _VariancePreserving(Path):
    """sigma^2 = 1 - alpha^2, so that g = alpha'/alpha; alpha(0) > 0 is small."""

    pure_noise = False
    steep_end = True

    @abc.abstractmethod
    def _log_alpha(self, t):
        """Return the logarithm of alpha."""

    def alpha(self, t: jax.Array) -> jax.Array:
        return jnp.exp(self._log_alpha(t))

    def sigma(self, t: jax.Array) -> jax.Array:
        return jnp.sqrt(-jnp.expm1(2 * self._log_alpha(t)))

    def alpha_ratio(self, t: jax.Array) -> jax.Array:
        return _derivative(self._log_alpha, t)

    def drift_variance(self, t: jax.Array) -> jax.Array:
        return self.alpha_ratio(t)


@PATHS.register("vp")
@dataclasses.dataclass(frozen=True)
class VPPath(_VariancePreserving):
    """Follow the variance-preserving diffusion: alpha = exp(-int beta / 2), sigma^2 = 1 - alpha^2.

    beta falls linearly from `beta_max` at the noise to `beta_min` at the data. alpha(0) is 0.0066, not 0.

    Source: VPCPlan.
    """

    beta_min: float = setting(0.1, "beta at the data", range=Range(float, 0, 1e3, above=True))
    beta_max: float = setting(20.0, "beta at the noise", range=Range(float, 0, 1e3, above=True))

    def _log_alpha(self, t):
        return -0.25 * (1 - t) ** 2 * (self.beta_max - self.beta_min) - 0.5 * (1 - t) * self.beta_min

    def alpha_ratio(self, t: jax.Array) -> jax.Array:
        return (self.beta_min + (1 - t) * (self.beta_max - self.beta_min)) / 2


@PATHS.register("ddpm")
@dataclasses.dataclass(frozen=True)
class DDPMPath(_VariancePreserving):
    """Pass through the 1,000 discrete steps of DDPM and DiT, whose betas grow linearly from 1e-4 to 0.02.

    Step i of 0 to 999 is at t = 1 - (i + 1) / 1000. alpha is there the root of the product of 1 - beta over the steps 0
    to i, and smooth between the steps. `VPPath` is the limit of many steps: its sigma is 5 % larger at step 0, its
    alpha 3 % larger at step 999.

    Source: arXiv 2006.11239; facebookresearch/DiT, diffusion/gaussian_diffusion.py.
    """

    def _log_alpha(self, t):
        before_data = 1 - t
        return before_data * jnp.polyval(_ddpm_log_alpha(), before_data)


@functools.cache
def _ddpm_log_alpha() -> np.ndarray:
    """Return coefficients of the polynomial log(alpha) / (1 - t); its relative error is 4e-9."""
    log_alpha = np.cumsum(np.log1p(-np.linspace(1e-4, 0.02, 1000))) / 2
    before_data = np.arange(1, 1001) / 1000
    return np.polyfit(before_data, log_alpha / before_data, 4).astype(np.float32)
