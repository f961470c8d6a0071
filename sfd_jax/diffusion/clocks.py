"""Pairs of clocks: how global time tau becomes the semantic and the texture time.

A pair of clocks is two monotone maps tau -> (t_semantic, t_texture), from (0, 0) at tau = 0 to
(1, 1) at tau_end, smooth between breakpoints. The loss (which draws tau) and the sampler (which
integrates over tau) use the same object: with x_g the latent of group g,

    dx_g / dtau = velocity_g(x, t_semantic, t_texture) * dt_g / dtau,

so a group is frozen while its clock is constant. The intervals between breakpoints are the stages:
for the fixed offset, stage I moves semantics alone, stage II both, stage III texture alone.

A custom pair is a frozen dataclass derived from `Clocks` that defines `tau_end`, `breakpoints` and `times`, registered
under a name (docs/extend.md). Its fields are its settings: config groups, checkpoints, recipes and samplers store
{"name": ..., **fields}, see `clocks_config` and `make_clocks`. Parameters trained with the network are not fields:
`init` creates them and `bind` attaches them.

Source: arXiv 2512.04926, section 3; later work (arXiv 2606.19662) learns the pair.
"""

import abc
import copy
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from sfd_jax import settings
from sfd_jax.errors import SfdError
from sfd_jax.ranges import Range, check_fields
from sfd_jax.registry import Registry
from sfd_jax.settings import setting

CLOCKS: Registry[type["Clocks"]] = Registry("clocks")


def make_clocks(config: Mapping[str, Any], registered_in: str | None = None) -> "Clocks":
    """Make the pair of clocks that a config describes.

    Args:
      config: "name" and fields, as `clocks_config` returns them. A `delta_t` is ignored for clocks
        without one: every checkpoint of an earlier version has it.
      registered_in: the module that registered the clocks, if the checkpoint names it.

    Raises:
      SfdError: an unknown name or field, or a value outside its range.
    """
    cls = CLOCKS.find(config["name"], registered_in)
    if "delta_t" not in settings.defaults_of(cls):
        config = {key: value for key, value in config.items() if key != "delta_t"}
    clocks = settings.make(CLOCKS, config)
    # Without a lead the released code samples with one clock on [0, 1] and no masks.
    return Synchronous() if clocks == FixedOffset(0.0) else clocks


def clocks_config(clocks: "Clocks") -> dict[str, Any]:
    """Return the config of a pair of clocks, {"name": ..., **fields}, without trained parameters."""
    return settings.describe(CLOCKS, clocks)


def join_params(network: dict, clocks: dict) -> dict:
    """Join the parameters of the network and of trained clocks, if any, into the parameters of a diffusion task.

    Args:
      network: the network's parameters.
      clocks: from `Clocks.init`; empty for clocks that are not trained.

    Returns:
      `network` itself, or {"network": network, "clocks": clocks}.

    Raises:
      SfdError: `Clocks.init` did not return a dict.
    """
    return {"network": network, "clocks": clocks} if _params(clocks) else network


def split_params(params: dict) -> tuple[dict, dict]:
    """Return (the network's parameters, the clocks' or {}): the reverse of `join_params`."""
    return (params["network"], params["clocks"]) if params.keys() == {"network", "clocks"} else (params, {})


def _params(tree: Any) -> dict:
    if not isinstance(tree, dict):
        raise SfdError("Clocks.init must return a dict of arrays, or {} for clocks without trained parameters")
    return tree


class Clocks(abc.ABC):
    """Map global time to the two clocks, with the breakpoints of that map.

    Attributes:
      tau_end, breakpoints: static: functions of the fields, not of trained parameters.
      params: trained parameters, set by `bind`.
    """

    tau_end: float
    breakpoints: tuple[float, ...]
    params: ClassVar[dict] = {}

    def __post_init__(self):
        check_fields("clocks", self)

    @abc.abstractmethod
    def times(self, tau: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Map tau, any shape, float32, to (t_semantic, t_texture) of the same shape.

        Must consist of JAX operations, so that it can be differentiated and traced. Trained parameters are in
        `self.params`.
        """

    def init(self, key: jax.Array) -> dict:
        """Return initial parameters to train with the network's, a nested dict of float32 arrays; none by default."""
        return {}

    def bind(self, params: dict) -> Self:
        """Return a copy with trained parameters in `params`: tracers in the loss, arrays in a sampler.

        Raises:
          SfdError: the shapes are not those of `init`.
        """
        shapes = _params(jax.eval_shape(lambda: self.init(jax.random.key(0))))
        found, wanted = jax.tree.map(jnp.shape, params), jax.tree.map(jnp.shape, shapes)
        if found != wanted:
            raise SfdError(
                f"the trained parameters of the clocks have shapes {found}, but {self} needs {wanted}: load "
                "parameters of these clocks"
            )
        bound = copy.copy(self)
        object.__setattr__(bound, "params", params)
        return bound

    @property
    def edges(self) -> tuple[float, ...]:
        """Return 0, the breakpoints and tau_end; stage s is between edges s and s + 1."""
        return (0.0, *self.breakpoints, self.tau_end)

    def training_times(self, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Map the drawn training time t in (0, 1) to the two clocks, at tau = t * tau_end."""
        return self.times(t * self.tau_end)

    def rates(self, tau: jax.Array, stage: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return dt/dtau of both clocks inside a stage.

        Args:
          tau: any shape, float32.
          stage: int32 of the same shape; selects the side at a breakpoint.

        Returns:
          (rate_semantic, rate_texture), shape of tau; 0 for a constant clock.
        """
        edges = jnp.asarray(self.edges, jnp.float32)
        inside = jnp.clip(tau, edges[stage] + MARGIN, edges[stage + 1] - MARGIN)
        _, rates = jax.jvp(self.times, (inside,), (jnp.ones_like(inside),))
        return rates

    def released_rates(self, tau: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return dt/dtau without a stage: at a breakpoint, the larger of both sides.

        For the fixed offset these are the released masks: texture moves where tau >= delta_t,
        semantics where tau <= 1, both ends included.

        Source: released `transport/transport.py`, `sample_ode_semantic_first`.
        """
        breakpoints = jnp.asarray(self.breakpoints, jnp.float32)
        left, right = (
            self.rates(tau, jnp.searchsorted(breakpoints, tau, side=side).astype(jnp.int32))
            for side in ("left", "right")
        )
        return jnp.maximum(left[0], right[0]), jnp.maximum(left[1], right[1])

    def tau_at(self, t: float) -> tuple[float, float]:
        """Return the tau at which the semantic and the texture clock reach t in (0, 1)."""
        found = []
        for group in (0, 1):
            low, high = 0.0, self.tau_end
            for _ in range(40):  # bisection, far below the resolution of float32
                middle = (low + high) / 2
                with jax.ensure_compile_time_eval():
                    reached = bool(self.times(jnp.float32(middle))[group] >= t)
                low, high = (low, middle) if reached else (middle, high)
            found.append(high)
        return found[0], found[1]


# Rates are evaluated at least this far inside a stage, and so is a velocity that jumps at the stage's edge.
# It is several units in the last place of float32 times near 2, and far below any step.
MARGIN = 1e-6


@CLOCKS.register("fixed_offset")
@dataclasses.dataclass(frozen=True)
class FixedOffset(Clocks):
    """Let semantics lead texture by delta_t: t_semantic = min(tau, 1), t_texture = tau - delta_t.

    Source: arXiv 2512.04926, the three phases of sampling; delta_t = 0.3 in the released system.
    """

    # Above 1, nothing would move between tau = 1 and tau = delta_t; 0 is one clock for both.
    delta_t: float = setting(0.3, "lead of semantics", range=Range(float, 0, 1))

    @property
    def tau_end(self) -> float:
        return 1.0 + self.delta_t

    @property
    def breakpoints(self) -> tuple[float, ...]:
        return tuple(sorted({tau for tau in (self.delta_t, 1.0) if 0 < tau < self.tau_end}))

    def times(self, tau: jax.Array) -> tuple[jax.Array, jax.Array]:
        # Texture is not capped at 1: the released dopri5 steps past tau_end and interpolates back.
        return jnp.minimum(tau, 1.0), jnp.maximum(tau - self.delta_t, 0.0)


@CLOCKS.register("sequential")
@dataclasses.dataclass(frozen=True)
class Sequential(Clocks):
    """Finish semantics before texture starts: the fixed offset of 1."""

    tau_end = 2.0
    breakpoints = (1.0,)

    def times(self, tau: jax.Array) -> tuple[jax.Array, jax.Array]:
        return FixedOffset(1.0).times(tau)


@CLOCKS.register("synchronous")
@dataclasses.dataclass(frozen=True)
class Synchronous(Clocks):
    """Move both groups together, as LightningDiT, ReDi and VA-VAE do: one stage, tau in [0, 1]."""

    tau_end = 1.0
    breakpoints = ()

    def times(self, tau: jax.Array) -> tuple[jax.Array, jax.Array]:
        return tau, tau
