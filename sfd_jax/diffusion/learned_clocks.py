"""Clocks that are learned: a curve in the square of (t_semantic, t_texture), and the loss that compares curves.

A pair of clocks is a curve from (0, 0) to (1, 1). Here it has three parts; the first and the last may be empty:

    texture waits at 0 until t_semantic = wait;
    both move: t_semantic = wait + (1 - wait) x, t_texture = (1 - rest) y(x), x from 0 to 1;
    semantics are done, and texture moves from 1 - rest to 1.

y is a mixture of powers, so every curve is monotone, convex, and smooth inside each part. With y = x it is the fixed
offset's curve for wait = rest = delta_t, the synchronous pair's for 0, the sequential one's for 1.

The corrected loss of a curve is the integral along it of sum_g w_g(t_g) |v_g - u_g|^2 dt_g, where the weight w_g of
group g over its own time is the same for all curves. It does not depend on how tau runs along the curve. That is chosen
for the least kinetic energy, the mean over tau of sum_g t_g'(tau)^2 E|u_g|^2: constant speed in the length whose square
is sum_g E|u_g|^2 dt_g^2.

Source: the idea is arXiv 2606.19662's, whose details are not public; the derivation is ours (docs/learned_clocks.md).
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sfd_jax.diffusion.clocks import CLOCKS, Clocks
from sfd_jax.diffusion.losses import Predict
from sfd_jax.errors import SfdError
from sfd_jax.latents import LatentLayout
from sfd_jax.ranges import Range
from sfd_jax.settings import setting

POWERS = (1, 2, 4, 8)  # of y(x)
_NODES, _WEIGHTS = (array.astype(np.float32) for array in np.polynomial.legendre.leggauss(16))
_TABLE = np.linspace(0, 1, 65, dtype=np.float32)  # x of the first guess
_SHORT = 1e-4  # a part below this share of the length has no breakpoint of its own
Pair = tuple[jax.Array, jax.Array]  # of semantics and texture


class Curve(NamedTuple):
    """A curve by its numbers, floats or arrays: wait, rest in [0, 1]; shape, the weights of POWERS, with sum 1."""

    wait: Any
    rest: Any
    shape: Any

    def times(self, place: jax.Array) -> Pair:
        """Map a place on the curve to (t_semantic, t_texture); each of the three parts has length 1 in `place`."""
        first, x, last = jnp.clip(place, 0, 1), jnp.clip(place - 1, 0, 1), jnp.maximum(place - 2, 0)
        y = sum(self.shape[i] * x**power for i, power in enumerate(POWERS))
        return self.wait * first + (1 - self.wait) * x, (1 - self.rest) * y + self.rest * last

    def speed(self, x: Any, energy_ratio: float) -> Any:
        """Return the length per x of the middle part, in the metric dt_semantic^2 + energy_ratio dt_texture^2."""
        slope = sum(self.shape[i] * power * x ** (power - 1) for i, power in enumerate(POWERS))
        squared = (1 - self.wait) ** 2 + energy_ratio * ((1 - self.rest) * slope) ** 2
        return (squared + 1e-12) ** 0.5  # differentiable where the middle part is empty

    def length_until(self, x: Any, energy_ratio: float) -> Any:
        """Return the length of the middle part from 0 to x, any shape, by Gauss-Legendre quadrature."""
        nodes, weights = (array.reshape((1,) * x.ndim + (-1,)) for array in (_NODES, _WEIGHTS))
        return x / 2 * (self.speed(x[..., None] / 2 * (1 + nodes), energy_ratio) * weights).sum(axis=-1)

    def lengths(self, energy_ratio: float) -> tuple[Any, Any, Any]:
        """Return the lengths of the three parts."""
        return self.wait, self.length_until(np.ones(()), energy_ratio), energy_ratio**0.5 * self.rest

    def kinetic_energy(self, energy_ratio: float) -> jax.Array:
        """Return the least kinetic energy, relative to the synchronous pair's: 1 or more."""
        return sum(self.lengths(energy_ratio)) ** 2 / (1 + energy_ratio)


@CLOCKS.register("learned")
@dataclasses.dataclass(frozen=True)
class Learned(Clocks):
    """Follow a frozen curve at constant speed: tau in [0, 1] is the share of its length."""

    wait: float = setting(0.3, "t_semantic at which texture starts", range=Range(float, 0, 1))
    rest: float = setting(0.3, "how far texture still has to go when semantics end", range=Range(float, 0, 1))
    shape: tuple = setting((1.0, 0.0, 0.0, 0.0), "weights of the powers 1, 2, 4, 8", range=Range(float, 0, 1e6))
    energy_ratio: float = setting(1.0, "E|u|^2 of texture over that of semantics", range=Range(float, 0.001, 1000))
    tau_end = 1.0

    def __post_init__(self):
        super().__post_init__()
        if len(self.shape) != len(POWERS) or not sum(self.shape) > 0:
            raise SfdError(f"clocks.shape={self.shape}: give {len(POWERS)} weights of which one is positive")

    @property
    def curve(self) -> Curve:
        """Return the curve, with weights that sum to 1."""
        return Curve(self.wait, self.rest, tuple(weight / sum(self.shape) for weight in self.shape))

    @property
    def breakpoints(self) -> tuple[float, ...]:
        """Return where texture starts and where semantics end, unless that is an end of the curve."""
        start, end = map(float, np.cumsum(self._shares()[:2]))
        return tuple(tau for tau in ((start, end) if end - start > _SHORT else (start,)) if _SHORT < tau < 1 - _SHORT)

    def _shares(self) -> np.ndarray:
        lengths = np.array(self.curve.lengths(self.energy_ratio))
        return lengths / lengths.sum()

    def times(self, tau: jax.Array) -> Pair:
        first, middle, last = np.maximum(self._shares(), 1e-9)
        x = self._x_at(jnp.clip((tau - first) / middle, 0, 1))
        return self.curve.times(jnp.clip(tau / first, 0, 1) + x + jnp.maximum((tau - first - middle) / last, 0))

    def _x_at(self, share: jax.Array) -> jax.Array:
        """Return x where the middle part has a share of its length: the inverse of `Curve.length_until`."""
        curve, ratio = self.curve, self.energy_ratio
        lengths = curve.length_until(_TABLE, ratio)
        x = jnp.interp(share, lengths / lengths[-1], _TABLE)
        for _ in range(2):  # Newton's steps; the last one has the derivative by `share` too
            x = jax.lax.stop_gradient(x)
            x = jnp.clip(x + (share * lengths[-1] - curve.length_until(x, ratio)) / curve.speed(x, ratio), 0, 1)
        return x


@dataclasses.dataclass(frozen=True)
class TrainedCurve(Clocks):
    """A curve whose numbers are trained parameters, for the probe; `freeze` makes `Learned` of them.

    Each part of the curve has length 1 in tau, whatever the parameters. If breakpoints moved with them, the gradient of
    the loss at drawn tau would lack the term of the rates that jump there.

    Attributes:
      start: the curve at the start.
      gain: factor of the parameters. Adam's steps have the size of the learning rate, so the curve's are `gain` times
        as large as the network's.
    """

    start: Learned = Learned()
    gain: float = 1.0
    tau_end = 3.0
    breakpoints = (1.0, 2.0)

    def init(self, key: jax.Array) -> dict:
        wait, rest, shape = (jnp.clip(jnp.asarray(value, jnp.float32), 0.02, 0.98) for value in self.start.curve)
        values = {"wait": jax.scipy.special.logit(wait), "rest": jax.scipy.special.logit(rest), "shape": jnp.log(shape)}
        return jax.tree.map(lambda value: value / self.gain, values)

    @property
    def curve(self) -> Curve:
        """Return the curve of the bound parameters."""
        wait, rest, shape = (self.params[name] * self.gain for name in Curve._fields)
        return Curve(jax.nn.sigmoid(wait), jax.nn.sigmoid(rest), jax.nn.softmax(shape))

    def times(self, tau: jax.Array) -> Pair:
        return self.curve.times(tau)

    def freeze(self) -> Learned:
        """Return the curve as plain numbers of 4 digits; below 0.01 they are 0, so that no part is very short."""
        number = lambda value: round(float(value), 4) if value >= 0.01 else 0.0
        wait, rest, shape = jax.device_get(self.curve)
        return Learned(number(wait), number(rest), tuple(map(number, shape)), self.start.energy_ratio)


@dataclasses.dataclass(frozen=True)
class LocalWeights:
    """The weights w_g over each group's own time: for a fixed offset, those of the usual loss.

    With t of density p, tau = t (1 + offset) and a group moving at t_g = tau - lag, its times have the density
    p((t_g + lag) / (1 + offset)) / (1 + offset). So the corrected loss of that offset is the usual one without the
    samples of a group that stands still.

    Attributes:
      time: distribution of t, `LossConfig.time`.
      semantic_weight: beta.
      offset: of the fixed offset, 0.3 in the released recipe.
    """

    time: str = "logit_normal"
    semantic_weight: float = 2.0
    offset: float = 0.3

    def __call__(self, t_semantic: jax.Array, t_texture: jax.Array) -> Pair:
        """Return w_semantic and w_texture, in the shape of the times."""
        return self.semantic_weight * self._density(t_semantic), self._density(t_texture + self.offset)

    def _density(self, tau: jax.Array) -> jax.Array:
        end = 1 + self.offset
        if self.time == "uniform":
            return jnp.full_like(tau, 1 / end)
        t = jnp.clip(tau / end, 1e-5, 1 - 1e-5)
        return jax.scipy.stats.norm.pdf(jax.scipy.special.logit(t)) / (t * (1 - t)) / end


def at_tau(clocks: Clocks, tau: jax.Array) -> tuple[Pair, Pair]:
    """Return the times at tau and their rates per share of tau_end, both (semantics, texture)."""
    stage = jnp.searchsorted(jnp.asarray(clocks.breakpoints, jnp.float32), tau, side="right").astype(jnp.int32)
    semantic, texture = clocks.rates(tau, stage)
    return clocks.times(tau), (clocks.tau_end * semantic, clocks.tau_end * texture)


def corrected_loss(
    predict: Predict,
    data: jax.Array,
    noise: jax.Array,
    labels: jax.Array,
    times: Pair,
    rates: Pair,
    *,
    layout: LatentLayout,
    weights: LocalWeights,
) -> jax.Array:
    """Return sum_g w_g rate_g |v_g - u_g|^2 of each sample, a mean over channels and positions.

    With times and rates from `at_tau`, for tau uniform on [0, tau_end], its mean is the corrected loss of the clocks.

    Args:
      predict: (latents, t_semantic, t_texture, labels) -> velocity (B,H,W,C).
      data, noise: (B,H,W,C), ends of the linear path.
      labels: (B,) int32.
      times, rates: (B,) each, of semantics and texture.
      layout: which channels are texture.
      weights: of each group over its own time.

    Returns:
      (B,) float32.
    """
    spread = lambda pair: layout.per_channel(pair[1], pair[0])[:, None, None, :]
    t, factor = spread(times), spread([weight * rate for weight, rate in zip(weights(*times), rates, strict=True)])
    velocity = predict(t * data + (1 - t) * noise, *times, labels).astype(jnp.float32)
    return jnp.mean(factor * (velocity - (data - noise)) ** 2, axis=(1, 2, 3))
