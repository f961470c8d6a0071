"""Few-step sampling: a network that predicts the mean velocity of the flow over an interval of global time.

For tau <= rho, let each group of channels go the way t_g(rho) - t_g(tau) on its clock, and let N_g be what the network
answers at (x, tau, rho). One step is

    x_g(rho) = x_g(tau) + way_g N_g,      so the mean velocity in global time is U_g = N_g way_g / (rho - tau),

and a group whose clock stands still cannot move. Both sides of the step change with tau along the flow, and their
derivatives by tau agree; with r_g the rate of the group's clock and v_g the velocity on it,

    N_g = v_g + way_g / r_g dN_g/dtau     where the group moves at tau (r_g > 0),
      0 = dN_g/dtau                       where it waits for a later stage (r_g = 0, way_g > 0).

The first line is U = V + (rho - tau) dU/dtau of MeanFlow in this form. dN/dtau is one forward-mode derivative, along
the flow and inside the stage of tau: velocities jump at breakpoints, but N is continuous there. The answer for a group
that waits is moved towards the one at the end of the stage, by (end - tau) dN/dtau.

Source: MeanFlow, arXiv 2505.13447, section 4; with two clocks: this package.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sfd_jax.diffusion.clocks import Clocks
from sfd_jax.diffusion.sample_config import GUIDANCE
from sfd_jax.errors import SfdError
from sfd_jax.latents import LatentLayout
from sfd_jax.randomness import keys_by_row
from sfd_jax.ranges import Range, check_fields
from sfd_jax.settings import setting

# (latents (B,H,W,C), t_semantic (B,), t_texture (B,), ends: both clocks at rho) -> N (B,H,W,C)
MeanFn = Callable[[jax.Array, jax.Array, jax.Array, tuple[jax.Array, jax.Array]], jax.Array]

_SHARE = Range(float, 0, 1)


@dataclasses.dataclass(frozen=True)
class FewStepConfig:
    """Configure the training of a few-step model.

    Raises:
      SfdError: a name is unknown, a number outside its range, or guidance without effect.
    """

    velocity: str = setting(
        "teacher", "the velocity: of the frozen teacher, or data - noise", choices=("teacher", "data")
    )
    guidance: str = setting("none", "the teacher's guidance, which the student learns", choices=GUIDANCE)
    guidance_scale: float = setting(1.5, "its scale", range=Range(float, 0, 1e3))
    equal_share: float = setting(0.2, "share of intervals of length 0", range=_SHARE)
    start_share: float = setting(0.25, "share of intervals that begin at noise", range=_SHARE)
    edge_share: float = setting(0.5, "share of intervals that end at a breakpoint or at the data", range=_SHARE)
    error_power: float = setting(0.75, "p of the loss error / (error + 0.01)^p of each sample", range=_SHARE)

    def __post_init__(self):
        check_fields("few_step", self)
        if self.guidance != "none" and self.velocity == "data":
            raise SfdError("few_step.velocity=data has no guidance: leave out few_step.guidance or take the teacher's")


class Interval(NamedTuple):
    """Intervals [tau, rho] of global time: (B,) float32 each, and the stage of tau, (B,) int32."""

    tau: jax.Array
    rho: jax.Array
    stage: jax.Array


def interval(tau: jax.Array, rho: jax.Array, clocks: Clocks) -> Interval:
    """Return intervals with the stage of their start; at a breakpoint that is the later stage."""
    stage = jnp.searchsorted(jnp.asarray(clocks.breakpoints, jnp.float32), tau, side="right")
    return Interval(tau, rho, stage.astype(jnp.int32))


def draw_intervals(key: jax.Array, row_indices: jax.Array, clocks: Clocks, config: FewStepConfig) -> Interval:
    """Draw an interval for each row of a batch; randomness as in `losses.draw`.

    Args:
      key: the key of this step.
      row_indices: (B,) int32 rows in the global batch.
      clocks: the pair of clocks.
      config: shares of intervals.
    """
    edges = jnp.asarray(clocks.edges[1:], jnp.float32)

    def draw_one(key):
        start, length, kind, edge = jax.random.split(key, 4)
        tau, end = jax.random.uniform(start, maxval=clocks.tau_end), clocks.tau_end
        from_noise, which = jax.random.uniform(kind, (2,))
        tau = jnp.where(from_noise < config.start_share, 0.0, tau)
        rho = tau + jax.random.uniform(length) * (end - tau)
        first = jnp.searchsorted(edges, tau, side="right")
        chosen = edges[jax.random.randint(edge, (), first, len(edges))]
        rho = jnp.where(which < config.edge_share, chosen, rho)
        return tau, jnp.where(which > 1 - config.equal_share, tau, rho)

    return interval(*jax.vmap(draw_one)(keys_by_row(key, row_indices)), clocks)


class Motion(NamedTuple):
    """How each group moves, by channel, (B,1,1,C) float32.

    rate: dt/dtau at tau. way: of its clock until rho. left: global time until the end of the stage of tau.
    """

    rate: jax.Array
    way: jax.Array
    left: jax.Array


def motion(at: Interval, clocks: Clocks, layout: LatentLayout) -> Motion:
    """Return how the groups move at the start of intervals and until their ends."""
    ways = (end - start for start, end in zip(clocks.times(at.tau), clocks.times(at.rho), strict=True))
    left = jnp.asarray(clocks.edges[1:], jnp.float32)[at.stage] - at.tau
    pairs = clocks.rates(at.tau, at.stage), ways, (left, left)
    return Motion(*(layout.per_channel(texture, semantic)[:, None, None] for semantic, texture in pairs))


def mean_velocity(answer: jax.Array, at: Interval, clocks: Clocks, layout: LatentLayout) -> jax.Array:
    """Return the mean velocity in global time, U (B,H,W,C), of a network's answer; at rho = tau the velocity."""
    move, length = motion(at, clocks, layout), (at.rho - at.tau)[:, None, None, None]
    return answer * jnp.where(length > 0, move.way / jnp.where(length > 0, length, 1.0), move.rate)


def mean_target(
    network: MeanFn, latents: jax.Array, velocity: jax.Array, at: Interval, clocks: Clocks, layout: LatentLayout
) -> jax.Array:
    """Return what the network should answer by the identity, from its own derivative along the flow.

    Args:
      network: the network with its parameters and labels, in float32: a derivative in bfloat16 is too coarse.
      latents: (B,H,W,C) float32 at tau.
      velocity: (B,H,W,C) float32 there, of each group on its own clock, guidance included.
      at: the intervals.
      clocks, layout: as in training.

    Returns:
      (B,H,W,C) float32, without gradient.
    """
    move, rates, ends = motion(at, clocks, layout), clocks.rates(at.tau, at.stage), clocks.times(at.rho)
    tangents = (move.rate * velocity, *rates)
    answer, derivative = jax.jvp(lambda *point: network(*point, ends), (latents, *clocks.times(at.tau)), tangents)
    moves = move.rate > 0
    moving = velocity + move.way / jnp.where(moves, move.rate, 1.0) * derivative
    return jax.lax.stop_gradient(jnp.where(moves, moving, answer + move.left * derivative))


def step_ends(clocks: Clocks, steps: int) -> np.ndarray:
    """Return the global times (steps + 1,) float32 at which steps begin and end.

    The first step takes half of the time, the others share the rest: on the digits this was better than steps that end
    at the stages, and than equal ones (docs/few_step.md).
    """
    end = clocks.tau_end
    return np.float32([0, *np.linspace(end / 2, end, steps)] if steps > 1 else [0, end])


def sample_few_step(
    network: MeanFn, noise: jax.Array, taus: Sequence[float], *, clocks: Clocks, layout: LatentLayout
) -> jax.Array:
    """Go from noise to latents in one step for each interval between `taus`; pure and traceable.

    Args:
      network: the few-step network with its parameters and labels.
      noise: (B,H,W,C) float32, standard normal.
      taus: increasing global times, from 0 to tau_end.
      clocks, layout: as in training.

    Returns:
      (B,H,W,C) float32.
    """
    taus = jnp.asarray(taus, jnp.float32)

    def step(latents, ends):
        at = interval(*(jnp.broadcast_to(tau, len(latents)) for tau in ends), clocks)
        answer = network(latents, *clocks.times(at.tau), clocks.times(at.rho))
        return latents + motion(at, clocks, layout).way * answer, None

    return jax.lax.scan(step, noise, (taus[:-1], taus[1:]))[0]
