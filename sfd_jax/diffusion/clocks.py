"""Pairs of clocks: how global time tau becomes the semantic and the texture time.

A pair of clocks is two monotone maps tau -> (t_semantic, t_texture), from (0, 0) at tau = 0 to
(1, 1) at tau_end, smooth between breakpoints. It is given once and used by the loss (which draws
tau) and by the sampler (which integrates over tau): with x_g the latent of group g,

    dx_g / dtau = velocity_g(x, t_semantic, t_texture) * dt_g / dtau,

so a group whose clock stands still is frozen. The stretches between breakpoints are the stages:
for the fixed offset, stage I moves semantics alone, stage II both, stage III texture alone.

Another pair (a learned one, say) subclasses `Clocks` and gives `tau_end`, `breakpoints` and
`times`; all else follows from them.

Source: arXiv 2512.04926, section 3; later work (arXiv 2606.19662) learns the pair.
"""

import abc
import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from sfd_jax.errors import SfdError, nearest
from sfd_jax.ranges import check_fields


def make_clocks(name: str, *, delta_t: float = 0.3) -> "Clocks":
    """Make the pair of clocks that a config names.

    Args:
      name: "fixed_offset", "synchronous" or "sequential".
      delta_t: lead of semantics for "fixed_offset", in [0, 1]; the others do not read it.

    Raises:
      SfdError: if the name is unknown or delta_t outside its range.
    """
    makers: dict[str, Callable[[], Clocks]] = {
        # Without a lead the released code samples with one clock on [0, 1] and no masks.
        "fixed_offset": lambda: FixedOffset(delta_t) if delta_t else Synchronous(),
        "synchronous": Synchronous,
        "sequential": Sequential,
    }
    if name not in makers:
        raise SfdError(f"unknown clocks {name!r}: {nearest(name, makers)}")
    return makers[name]()


class Clocks(abc.ABC):
    """Map global time to the two clocks, with the places where that map has kinks."""

    tau_end: float
    breakpoints: tuple[float, ...]

    @abc.abstractmethod
    def times(self, tau: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Map tau, any shape, float32, to (t_semantic, t_texture) of the same shape.

        Must be made of jax operations, so that it can be differentiated and traced.
        """

    @property
    def edges(self) -> tuple[float, ...]:
        """Return 0, the breakpoints and tau_end; stage s lies between edges s and s + 1."""
        return (0.0, *self.breakpoints, self.tau_end)

    def training_times(self, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Map the drawn training time t in (0, 1) to the two clocks, at tau = t * tau_end."""
        return self.times(t * self.tau_end)

    def rates(self, tau: jax.Array, stage: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return dt/dtau of both clocks as seen from inside a stage.

        Args:
          tau: any shape, float32.
          stage: int32 of the same shape; decides the side at a breakpoint.

        Returns:
          (rate_semantic, rate_texture), shape of tau; 0 for a clock that stands still.
        """
        edges = jnp.asarray(self.edges, jnp.float32)
        inside = jnp.clip(tau, edges[stage] + MARGIN, edges[stage + 1] - MARGIN)
        _, rates = jax.jvp(self.times, (inside,), (jnp.ones_like(inside),))
        return rates

    def published_rates(self, tau: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return dt/dtau without knowing the stage: at a breakpoint, the larger of both sides.

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


# How far inside a stage its rates are read, and its velocity where that jumps at the stage's edge:
# several units in the last place of float32 times near 2, and far below any step.
MARGIN = 1e-6


@dataclasses.dataclass(frozen=True)
class FixedOffset(Clocks):
    """Let semantics lead texture by delta_t: t_semantic = min(tau, 1), t_texture = tau - delta_t.

    Args:
      delta_t: the lead, in (0, 1].

    Raises:
      SfdError: if delta_t is outside (0, 1].

    Source: arXiv 2512.04926, the three phases of sampling; delta_t = 0.3 in the released system.
    """

    delta_t: float = 0.3

    def __post_init__(self):
        check_fields(
            "fixed_offset", self
        )  # without a lead there is Synchronous; beyond 1 nothing would move between the groups

    @property
    def tau_end(self) -> float:
        return 1.0 + self.delta_t

    @property
    def breakpoints(self) -> tuple[float, ...]:
        return (self.delta_t, 1.0) if self.delta_t < 1.0 else (1.0,)

    def times(self, tau):
        # Texture is not capped at 1: the released dopri5 steps past tau_end and interpolates back.
        return jnp.minimum(tau, 1.0), jnp.maximum(tau - self.delta_t, 0.0)


class Sequential(FixedOffset):
    """Finish semantics before texture starts: the fixed offset with delta_t = 1."""

    def __init__(self):
        super().__init__(delta_t=1.0)


@dataclasses.dataclass(frozen=True)
class Synchronous(Clocks):
    """Move both groups together, as LightningDiT, ReDi and VA-VAE do: one stage, tau in [0, 1]."""

    tau_end = 1.0
    breakpoints = ()

    def times(self, tau):
        return tau, tau
