"""Dormand-Prince 5(4), adaptive, in two ways.

  dopri5          every sample with its own step size, no step across an edge
  dopri5_shared   as torchdiffeq does it: one step size for the batch, edges unknown

Axis letters: B samples, S segments.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sfd_jax.diffusion.solvers import Field, Solution, combine, readable

# Dormand and Prince (1980), the pair of orders 5 and 4. The last row is the solution itself, so
# the last slope of a step is the first of the next.
NODES = np.array([0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1], np.float32)
ROWS = np.zeros((7, 7), np.float32)
ROWS[1, :1] = [1 / 5]
ROWS[2, :2] = [3 / 40, 9 / 40]
ROWS[3, :3] = [44 / 45, -56 / 15, 32 / 9]
ROWS[4, :4] = [19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729]
ROWS[5, :5] = [9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656]
ROWS[6, :6] = [35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84]
# Fifth order minus Shampine's fourth-order companion, the one torchdiffeq carries.
ERROR = np.array(
    [
        35 / 384 - 1951 / 21600,
        0,
        500 / 1113 - 22642 / 50085,
        125 / 192 - 451 / 720,
        -2187 / 6784 + 12231 / 42400,
        11 / 84 - 649 / 6300,
        -1 / 60,
    ],
    np.float32,
)
# Shampine (1986): the solution at the middle of a step, for interpolation.
MIDDLE = np.array(
    [
        6025192743 / 30085553152 / 2,
        0,
        51252292925 / 65400821598 / 2,
        -2691868925 / 45128329728 / 2,
        187940372067 / 1594534317056 / 2,
        -1776094331 / 19743644256 / 2,
        11237099 / 235043384 / 2,
    ],
    np.float32,
)
_SAFETY, _SHRINK, _GROW = 0.9, 0.2, 10.0
# Of `dopri5`, set on a trained digits model and checked on other seeds and networks
# (scripts/benchmarks/solver_nfe.py). How many times the tolerance the estimate of a step may be. With 1.5 this
# controller crosses an oscillation in as many calls as the released one, with the same error. With 1 the digits
# take six calls more, with 3 those with AutoGuidance six fewer at 1.6 times the error. Answers at rtol = 1e-3
# came out 0.5 to 0.8 times rtol off, the released ones 6 to 45 times.
STEP_TOLERANCE = 1.5
# The first step, and the longest. The estimate of a longer one is not to be trusted: without this bound,
# smooth fields were crossed in single steps that erred ten times more than they claimed. Three steps instead
# of two between the breakpoints divide the error by three or four.
LONGEST_STEP = 0.3
_MIN_STEP = 1e-6  # a rejection cannot shrink a step below this, times being float32


class _Walk(NamedTuple):
    """The state of `dopri5`: each sample walks through its segments on its own."""

    y: jax.Array  # (B,...) at tau
    tau: jax.Array  # (B,)
    segment: jax.Array  # (B,) int32; S once arrived
    node: jax.Array  # (B,) int32, the slope that the next call reads
    slopes: jax.Array  # (7,B,...)
    step: jax.Array  # (B,) the step being tried
    wish: jax.Array  # (B,) the step that the error allows, whatever the edges say
    broken: jax.Array  # (B,) bool
    nfe: jax.Array  # ()
    sample_nfe: jax.Array  # (B,S)
    kept: jax.Array | None  # (S,B,...)


_START, _LAST = 0, 6


def dopri5(
    field: Field,
    y0: jax.Array,
    edges: Sequence[float],
    *,
    atol: float,
    rtol: float,
    max_nfe: int,
    jumps: Sequence[bool] | None = None,
    keep_edges: bool = False,
) -> Solution:
    """Integrate with Dormand-Prince 5(4), every sample under its own error control.

    A sample has its own time, segment, step size and place within the step, so its answer does
    not depend on its companions, and one that is done or ahead never waits: the number of calls
    is that of the slowest sample. Steps end on the edges. What is saved against one solver run a
    segment: the clocks are continuous, so the velocity at an edge serves both sides (only its
    rates change), and the step size carries over. The first step is `LONGEST_STEP`: trying it
    costs less than the usual probe, which proposed a quarter of what proved possible.

    The error is measured against the size of the sample, not value by value: a latent has values near
    zero everywhere, and dividing by them made some samples take half as many calls again as others,
    for whom the whole batch waited.

    Args:
      field: the right-hand side.
      y0: (B,...) float32.
      edges: S+1 increasing times.
      atol, rtol: with rms the root mean square over the values of a sample that move, a step is
        accepted where rms(error) is at most `STEP_TOLERANCE` * (atol + rtol rms(y)).
      max_nfe: limit of network evaluations; samples not done by then are given up.
      jumps: (S+1,) whether the velocity itself jumps at an edge; then it is read again.
      keep_edges: whether to return the solution at every edge.

    Source: the controller is that of Hairer, Norsett and Wanner I, sections II.4-5.
    """
    batch, segments = y0.shape[0], len(edges) - 1
    low, high = (jnp.asarray(bound) for bound in readable(edges, jumps))
    edges = jnp.asarray(edges, jnp.float32)
    jumps = jnp.zeros(segments + 1, bool) if jumps is None else jnp.asarray(jumps, bool)
    nodes, rows = jnp.asarray(NODES), jnp.asarray(ROWS)

    def per_sample(values, like):
        return values.reshape(values.shape + (1,) * (like.ndim - values.ndim))

    def one_call(walk: _Walk) -> _Walk:
        active = walk.segment < segments
        segment = jnp.minimum(walk.segment, segments - 1)
        end = edges[segment + 1]
        y, step = walk.y, walk.step

        # The call: node 0 reads the slope at y itself, node 6 at the new solution.
        tau_read = jnp.clip(walk.tau + nodes[walk.node] * step, low[segment], high[segment])
        y_read = y + combine(rows[walk.node].T * step[None], walk.slopes)
        velocity = field.velocity(y_read, tau_read, segment)
        rate = field.rate(tau_read, segment)
        slope = rate * velocity
        is_node = jnp.arange(7)[:, None] == walk.node[None]
        slopes = jnp.where(per_sample(is_node, walk.slopes), slope[None], walk.slopes)

        # Frozen values have no error; averaging over them would loosen the tolerance.
        moves = jnp.broadcast_to(rate != 0, y.shape)
        axes = tuple(range(1, y.ndim))

        def norm(values):
            total = jnp.sum(jnp.where(moves, values, 0.0) ** 2, axis=axes)
            return jnp.sqrt(total / jnp.maximum(jnp.sum(moves, axis=axes), 1))

        # The verdict on a step.
        finished = active & (walk.node == _LAST)
        error = norm(per_sample(step, y) * combine(jnp.asarray(ERROR), slopes))
        ratio = error / (STEP_TOLERANCE * (atol + rtol * jnp.maximum(norm(y), norm(y_read))))
        sound = jnp.isfinite(ratio)
        least = ~(step > _MIN_STEP)  # so that a NaN counts too
        accepted = finished & sound & ((ratio <= 1) | least)
        broken = walk.broken | (finished & ~sound & least)
        arrived = accepted & (step >= end - walk.tau)

        factor = jnp.where(sound, jnp.clip(_SAFETY * ratio**-0.2, _SHRINK, _GROW), _SHRINK)
        # A step cut short by an edge may grow no more than tenfold, yet a longer one was allowed.
        regrown = jnp.where(factor < _GROW, step * factor, jnp.maximum(walk.wish, step * factor))
        wish = jnp.where(finished, jnp.minimum(regrown, LONGEST_STEP), walk.wish)

        tau = jnp.where(arrived, end, walk.tau + jnp.where(accepted, step, 0.0))
        new_segment = jnp.where(broken, segments, walk.segment + arrived)
        ahead = jnp.minimum(new_segment, segments - 1)
        y = jnp.where(per_sample(accepted, y), y_read, y)
        # The last slope of a step is the first of the next, across an edge with the new rates.
        next_slope = field.rate(tau, ahead) * velocity
        slopes = slopes.at[0].set(jnp.where(per_sample(accepted, y), next_slope, slopes[0]))

        node = jnp.where(walk.node < _LAST, walk.node + 1, 1)
        node = jnp.where(arrived & jumps[ahead], _START, node)
        step = jnp.where(node == 1, _fit(wish, edges[ahead + 1] - tau), step)
        # What the next steps have not read yet must be 0, lest a NaN of a rejected step lives on.
        unread = jnp.arange(7)[:, None] >= node[None]
        slopes = jnp.where(per_sample(unread, slopes), 0.0, slopes)
        kept = walk.kept
        if keep_edges:
            here = (jnp.arange(segments)[:, None] == segment[None]) & arrived[None]
            kept = jnp.where(per_sample(here, kept), y[None], kept)
        spent = (jnp.arange(segments)[None] == segment[:, None]) & active[:, None]
        return _Walk(
            y,
            tau,
            new_segment,
            node,
            slopes,
            step,
            wish,
            broken,
            walk.nfe + 1,
            walk.sample_nfe + spent,
            kept,
        )

    zeros = jnp.zeros(batch, jnp.float32)
    walk = _Walk(
        y=y0,
        tau=zeros + edges[0],
        segment=jnp.zeros(batch, jnp.int32),
        node=jnp.full(batch, _START, jnp.int32),
        slopes=jnp.zeros((7, *y0.shape), y0.dtype),
        step=zeros,
        wish=zeros + LONGEST_STEP,
        broken=jnp.zeros(batch, bool),
        nfe=jnp.int32(0),
        sample_nfe=jnp.zeros((batch, segments), jnp.int32),
        kept=jnp.full((segments, *y0.shape), jnp.nan, y0.dtype) if keep_edges else None,
    )
    walk = jax.lax.while_loop(lambda walk: jnp.any(walk.segment < segments) & (walk.nfe < max_nfe), one_call, walk)
    converged = (walk.segment == segments) & ~walk.broken
    return Solution(
        final=jnp.where(per_sample(converged, walk.y), walk.y, jnp.nan),
        at_edges=walk.kept,
        nfe=walk.nfe,
        sample_nfe=walk.sample_nfe,
        converged=converged,
    )


def _fit(wish: jax.Array, remaining: jax.Array) -> jax.Array:
    """Fit a step before the next edge: what is wished, but no stub of less than half of it is left.

    The shorter step comes last, where a clock nears the data and trained networks bend most. A tenth
    more than is wished is within the controller's safety, and may save a whole step.
    """
    fitted = jnp.where(1.5 * wish >= remaining, remaining / 2, wish)
    return jnp.where(1.1 * wish >= remaining, remaining, fitted)


class _March(NamedTuple):
    """The state of `dopri5_shared`: all samples march together."""

    y: jax.Array  # (B,...) at tau
    slope: jax.Array  # (B,...) at tau
    tau: jax.Array  # ()
    step: jax.Array  # ()
    nfe: jax.Array  # (S,)
    failed: jax.Array  # ()


def dopri5_shared(
    field: Field,
    y0: jax.Array,
    edges: Sequence[float],
    *,
    atol: float,
    rtol: float,
    max_nfe: int,
) -> Solution:
    """Integrate with Dormand-Prince 5(4) as the released sampler does through torchdiffeq.

    One step size serves the whole batch, the edges are not told to the error control, frozen
    values count in its norm, an accepted step never shrinks the next, and the last step runs past
    the end and is interpolated back. The field's segment is always 0.

    Args:
      field: the right-hand side; read a little past the last edge too.
      y0: (B,...) float32.
      edges: the first and last are the interval; those between only sort the count of calls.
      atol, rtol: a step is accepted where the root mean square, over the batch, of its
        error / (atol + rtol |y|) is at most 1.
      max_nfe: limit of network evaluations.

    Source: torchdiffeq 0.2.5 `rk_common.py`, `misc.py`, `interp.py`.
    """
    batch = y0.shape[0]
    begin, end = jnp.float32(edges[0]), jnp.float32(edges[-1])
    inner = jnp.asarray(edges[1:-1], jnp.float32)

    def read(y, tau):
        tau, segment = jnp.full((batch,), tau), jnp.zeros(batch, jnp.int32)
        return field.rate(tau, segment) * field.velocity(y, tau, segment)

    def count(nfe, tau):
        return nfe.at[jnp.searchsorted(inner, tau, side="right")].add(1)

    def norm(values):
        return jnp.sqrt(jnp.mean(values**2))

    def one_step(march: _March) -> _March:
        y, tau, step = march.y, march.tau, march.step

        def one_call(node, state):
            slopes, _, nfe = state
            y_read = y + combine(jnp.asarray(ROWS)[node] * step, slopes)
            tau_read = tau + jnp.asarray(NODES)[node] * step
            # At the end of a step torchdiffeq reads one float earlier, lest the field jump there.
            tau_read = jnp.where(node >= 5, jnp.nextafter(tau_read, -jnp.inf), tau_read)
            return slopes.at[node].set(read(y_read, tau_read)), y_read, count(nfe, tau_read)

        slopes = jnp.zeros((7, *y.shape), y.dtype).at[0].set(march.slope)
        slopes, y_new, nfe = jax.lax.fori_loop(1, 7, one_call, (slopes, y, march.nfe))
        error = step * combine(jnp.asarray(ERROR), slopes)
        ratio = norm(error / (atol + rtol * jnp.maximum(jnp.abs(y), jnp.abs(y_new))))
        accepted = ratio <= 1
        past = accepted & (tau + step >= end)

        middle = y + combine(jnp.asarray(MIDDLE) * step, slopes)
        y_end = _interpolate(y, middle, y_new, step * slopes[0], step * slopes[-1], (end - tau) / step)
        factor = jnp.clip(_SAFETY * ratio**-0.2, jnp.where(ratio < 1, 1.0, _SHRINK), _GROW)
        return _March(
            y=jnp.where(past, y_end, jnp.where(accepted, y_new, y)),
            slope=jnp.where(accepted, slopes[-1], march.slope),
            tau=jnp.where(accepted, tau + step, tau),
            step=step * factor,
            nfe=nfe,
            failed=~jnp.isfinite(ratio) | (tau + step == tau),
        )

    # The first step: Hairer, Norsett and Wanner I, section II.4.
    nfe = count(jnp.zeros(len(edges) - 1, jnp.int32), begin)
    slope = read(y0, begin)
    scale = atol + rtol * jnp.abs(y0)
    size, speed = norm(y0 / scale), norm(slope / scale)
    trial = jnp.where((size < 1e-5) | (speed < 1e-5), 1e-6, 0.01 * size / speed)
    bend = norm((read(y0 + trial * slope, begin + trial) - slope) / scale) / trial
    nfe = count(nfe, begin + trial)
    first = jnp.minimum(100 * trial, (0.01 / jnp.maximum(speed, bend)) ** 0.2)

    march = jax.lax.while_loop(
        lambda march: (march.tau < end) & (march.nfe.sum() < max_nfe) & ~march.failed,
        one_step,
        _March(y0, slope, begin, first, nfe, jnp.bool_(False)),
    )
    converged = jnp.broadcast_to((march.tau >= end) & ~march.failed, (batch,))
    return Solution(
        final=jnp.where(converged.reshape((batch,) + (1,) * (y0.ndim - 1)), march.y, jnp.nan),
        at_edges=None,
        nfe=march.nfe.sum(),
        sample_nfe=jnp.broadcast_to(march.nfe, (batch, len(edges) - 1)),
        converged=converged,
    )


def _interpolate(y0, y_middle, y1, dy0, dy1, x):
    """Evaluate at x in [0, 1] the quartic through y0, y_middle, y1 with end slopes dy0, dy1."""
    a = 2 * (dy1 - dy0) - 8 * (y1 + y0) + 16 * y_middle
    b = 5 * dy0 - 3 * dy1 + 18 * y0 + 14 * y1 - 32 * y_middle
    c = dy1 - 4 * dy0 - 11 * y0 - 5 * y1 + 16 * y_middle
    return y0 + x * (dy0 + x * (c + x * (b + x * a)))
