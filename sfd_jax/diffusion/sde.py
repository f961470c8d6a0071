"""Sampling by a stochastic differential equation, with a clock and a diffusion for each group of channels.

With r_g = dt_g/dtau the rate of the clock of group g, s_g its part of the joint score and D_g its diffusion,

    dx_g = (flow_g + D_g s_g) r_g dtau + sqrt(2 D_g r_g) dW,

which has the marginals of the probability flow (D = 0) at every tau, for any D_g >= 0. A step of tau advances the clock
of a group by exactly dt_g, so it is a step of the group's own equation in t_g, and a group whose clock waits does not
change. The whole integration is one `lax.scan`.

Source: released `transport/integrators.py` and `transport.py`, `sample_sde`, for one clock; arXiv 2401.08740.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sfd_jax.diffusion.clocks import Clocks
from sfd_jax.diffusion.guidance import VelocityFn, velocity_at
from sfd_jax.diffusion.paths import LinearPath, Path
from sfd_jax.latents import LatentLayout
from sfd_jax.randomness import normal_by_row
from sfd_jax.ranges import Range, check_fields
from sfd_jax.settings import setting

FORMS: dict[str, Callable[[Path, jax.Array, float], jax.Array]] = {
    "constant": lambda path, t, norm: norm * jnp.ones_like(t),
    "sbdm": lambda path, t, norm: norm * path.drift_variance(t),
    "sigma": lambda path, t, norm: norm * path.sigma(t),
    "linear": lambda path, t, norm: norm * (1 - t),
    "decreasing": lambda path, t, norm: (norm * jnp.cos(np.float32(np.pi) * t) + 1) ** 2 / 4,
    "increasing_decreasing": lambda path, t, norm: norm * jnp.sin(np.float32(np.pi) * t) ** 2,
}
LAST_STEPS = ("mean", "euler", "tweedie", "none")


@dataclasses.dataclass(frozen=True)
class Diffusion:
    """Choose the diffusion D(t) of a group; "sbdm" is c g(t), with g the drift variance, as in score-based models."""

    form: str = setting("sbdm", "D as a function of the group's clock", choices=tuple(FORMS))
    norm: float = setting(1.0, "factor c of D", range=Range(float, 0, 1e3))

    def __post_init__(self):
        check_fields("sde", self)

    def __call__(self, path: Path, t: jax.Array) -> jax.Array:
        """Return D at times t, shape of t."""
        return FORMS[self.form](path, t, self.norm)


@dataclasses.dataclass(frozen=True)
class SDEConfig:
    """Configure the integration of the stochastic equation."""

    method: str = setting("euler", "euler (Euler-Maruyama) or heun (noise first)", choices=("euler", "heun"))
    num_steps: int = setting(
        250, "grid points, about equally spaced; the last step comes after them", range=Range(int, 2, 10**6)
    )
    texture: Diffusion = Diffusion()
    semantic: Diffusion = Diffusion()
    last_step: str = setting(
        "mean",
        "last step of each group, without noise: mean (drift), euler (flow), tweedie (expected data) or none",
        choices=LAST_STEPS,
    )
    last_step_size: float = setting(0.04, "its size on the group's clock", range=Range(float, 0, 0.5, above=True))
    eps: float = setting(
        1e-3, "start time of sbdm; distance from the data if there is no last step", range=Range(float, 0, 0.1)
    )

    def __post_init__(self):
        check_fields("sde", self)


class _Step(NamedTuple):
    """The steps of an integration; (N,2) float32 each: semantic, texture."""

    clock: jax.Array  # what the network sees
    clock_after: jax.Array
    t: jax.Array  # the same, clipped to the interval of the stochastic equation
    t_after: jax.Array
    last: jax.Array  # size of the group's last step if this is it, else 0


def noise_by_step(key: jax.Array, row_indices: jax.Array, shape: tuple[int, ...]) -> Callable[[jax.Array], jax.Array]:
    """Return the noise of `sample_sde`: a function of (key, row, step), whatever the batch size and hosts.

    Args:
      key: from the seed; another stream than that of the initial noise.
      row_indices: (B,) int32 places in the global batch.
      shape: of a sample.

    Returns:
      step () int32 -> (B, *shape) float32 standard normal.
    """
    return lambda step: normal_by_row(jax.random.fold_in(key, step), row_indices, shape)


def sample_sde(
    velocity_fn: VelocityFn,
    start: jax.Array,
    noises: Callable[[jax.Array], jax.Array],
    *,
    layout: LatentLayout,
    clocks: Clocks,
    path: Path = LinearPath(),
    config: SDEConfig = SDEConfig(),
    first_t: float = 0.0,
) -> jax.Array:
    """Integrate noise to latents; pure and traceable.

    Args:
      velocity_fn: the velocity, guidance included (`predictions.velocity_from` for other predictions).
      start: (B,H,W,C) float32, standard normal.
      noises: step -> (B,H,W,C) standard normal, see `noise_by_step`.
      layout: which channels are texture.
      clocks, path: those the network was trained with.
      config: method, steps and diffusions.
      first_t: start of the prediction's `interval`; raised to `eps` with form "sbdm" if the path has `pure_noise`.

    Returns:
      (B,H,W,C) float32.
    """
    ones = (1,) * (start.ndim - 1)
    spread = lambda semantic, texture: layout.per_channel(texture, semantic).reshape(*ones, -1)

    def diffusion(t):
        return spread(config.semantic(path, t[0]), config.texture(path, t[1]))

    def fields(x, clock, t, at):
        every = lambda pair: tuple(jnp.full((len(x),), value) for value in pair)
        moves = (at.t_after > at.t) | (at.last > 0)
        flow = velocity_at(velocity_fn, x, every(clock), every(moves)).astype(jnp.float32)
        score = path.score_from_velocity(flow, x, spread(*t))
        return flow, score, flow + diffusion(t) * score

    def last_step(x, flow, score, drift, at):
        if config.last_step == "tweedie":
            t = spread(*at.t)
            return (x + path.sigma(t) ** 2 * score) / path.alpha(t)
        return x + (drift if config.last_step == "mean" else flow) * spread(*at.last)

    def step(x, row):
        number, at = row
        dt = spread(*(at.t_after - at.t))
        kick = jnp.sqrt(2 * diffusion(at.t) * dt) * noises(number)
        if config.method == "heun":
            x, kick = x + kick, 0.0
        flow, score, drift = fields(x, at.clock, at.t, at)
        ends, ended = spread(*at.last) > 0, last_step(x, flow, score, drift, at)
        moved = jnp.where(ends, ended, x + drift * dt + kick)
        if config.method == "heun":
            drift_after = fields(moved, at.clock_after, at.t_after, at)[2]
            moved = jnp.where(ends, ended, x + (drift + drift_after) / 2 * dt)
        return moved, None

    steps = _steps(clocks, path, config, first_t)
    return jax.lax.scan(step, start, (jnp.arange(len(steps.t)), steps))[0]


def evaluations(
    clocks: Clocks, path: Path = LinearPath(), config: SDEConfig = SDEConfig(), first_t: float = 0.0
) -> int:
    """Return the network evaluations of `sample_sde`."""
    return len(_steps(clocks, path, config, first_t).t) * (2 if config.method == "heun" else 1)


def _steps(clocks: Clocks, path: Path, config: SDEConfig, first_t: float) -> _Step:
    """Place the steps: they end at breakpoints, and where the last step of a group that finishes early begins and ends.

    During that step the other group takes one normal step, so the network sees pairs of times as in training.
    """
    last_steps = config.last_step != "none"
    sbdm = "sbdm" in (config.semantic.form, config.texture.form)
    low = max(first_t, config.eps if sbdm and path.pure_noise else 0.0)
    stop = 1 - (config.last_step_size if last_steps else config.eps)
    stops, arrivals = clocks.tau_at(stop), clocks.tau_at(1.0)
    first, final = min(clocks.tau_at(low)) if low > 0 else 0.0, max(stops)
    with jax.ensure_compile_time_eval():
        times = lambda tau: np.stack(clocks.times(jnp.asarray(tau, jnp.float32)), axis=-1)
        early = times(final) > 1 - config.eps  # at most one group: the other's clock is at `stop`
        high = np.where(early | (not last_steps), np.float32(stop), times(final))
        edges, leap = {first, final, *(tau for tau in clocks.breakpoints if first < tau < final)}, None
        if last_steps and early.any():
            group = early.argmax()
            leap = stops[group], min(arrivals[group], final)
            edges = {tau for tau in edges if not leap[0] < tau < leap[1]} | {*leap}
        tau = [first]
        for begin, end in itertools.pairwise(sorted(edges)):
            count = max(round((end - begin) / (final - first) * (config.num_steps - 1)), 1)
            tau += np.linspace(begin, end, 1 + (1 if (begin, end) == leap else count)).tolist()[1:]
        begins = len(tau) - 1
        last = np.zeros((begins + last_steps, 2), np.float32)
        if last_steps:
            for group in (0, 1):
                last[tau.index(stops[group]) if early[group] else begins, group] = 1 - high[group]
            tau.append(final)  # tau does not advance in the last step
        clock = times(tau)
        t = np.clip(clock, np.float32(low), high)
    return _Step(clock[:-1], clock[1:], t[:-1], t[1:], last)
