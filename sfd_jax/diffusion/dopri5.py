"""Dormand-Prince 5(4), adaptive, in two variants.

  dopri5          each sample has its own step size, and steps end on the edges
  dopri5_shared   as in torchdiffeq: one step size for the batch, edges ignored

Axis letters: B samples, S segments.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sfd_jax.diffusion.solvers import Field, Solution, combine, readable

# Dormand and Prince (1980), the pair of orders 5 and 4. The last row is the solution itself, so
# the last slope of a step is the first slope of the next.
NODES = np.array([0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1], np.float32)
ROWS = np.zeros((7, 7), np.float32)
ROWS[1, :1] = [1 / 5]
ROWS[2, :2] = [3 / 40, 9 / 40]
ROWS[3, :3] = [44 / 45, -56 / 15, 32 / 9]
ROWS[4, :4] = [19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729]
ROWS[5, :5] = [9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656]
ROWS[6, :6] = [35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84]
# Fifth order minus Shampine's fourth-order solution, as in torchdiffeq.
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
# Shampine (1986): the solution in the middle of a step, for interpolation.
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
# The constants of `dopri5` were chosen on a trained digits model and checked on other seeds and networks
# (scripts/benchmarks/solver_nfe.py). A step is accepted up to this multiple of the tolerance. With 1.5, an
# oscillation takes as many evaluations as with the released controller, at the same error. With 1, the digits take
# six evaluations more; with 3, the digits with AutoGuidance take six fewer at 1.6 times the error. At rtol = 1e-3
# the final errors were 0.5 to 0.8 times rtol, those of the released controller 6 to 45 times.
STEP_TOLERANCE = 1.5
# The first step, and the longest allowed. Error estimates of longer steps are unreliable: without this bound,
# single steps across smooth fields had ten times their estimated error. Three steps instead of two between the
# breakpoints divide the error by three or four.
LONGEST_STEP = 0.3
_MIN_STEP = 1e-6  # steps this small are not rejected for their error, since times are float32


class _State(NamedTuple):
    """The state of `dopri5`; each sample is in its own segment and step."""

    y: jax.Array  # (B,...) at tau
    tau: jax.Array  # (B,)
    segment: jax.Array  # (B,) int32; S at the end
    node: jax.Array  # (B,) int32, the slope to evaluate next
    slopes: jax.Array  # (7,B,...)
    step: jax.Array  # (B,) the current step
    proposed: jax.Array  # (B,) the step that the error allows, before it is fitted to the edges
    failed: jax.Array  # (B,) bool
    nfe: jax.Array  # ()
    sample_nfe: jax.Array  # (B,S)
    at_edges: jax.Array | None  # (S,B,...)


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
    """Integrate with Dormand-Prince 5(4), each sample under its own error control.

    Each sample has its own time, segment, step size and node within the step. Its result does not depend
    on the rest of the batch, and no sample waits for another: the batch takes as many evaluations as its
    slowest sample. Steps end on the edges. This saves evaluations against one solver run per segment: the
    clocks are continuous, so the velocity at an edge serves both sides (only its rates change), and the
    step size carries over. The first step is `LONGEST_STEP`: trying it costs less than the usual
    estimate, which proposed a quarter of what was possible.

    The error is relative to the norm of the sample, not to each value: a latent has values near zero
    everywhere, and dividing by them made some samples take 1.5 times as many evaluations as others,
    while the whole batch waited for them.

    Args:
      field: the right-hand side.
      y0: (B,...) float32.
      edges: S+1 increasing times.
      atol, rtol: with rms the root mean square over the values of a sample that are not frozen, a step
        is accepted where rms(error) is at most `STEP_TOLERANCE` * (atol + rtol rms(y)).
      max_nfe: limit of network evaluations; samples not done by then have not converged.
      jumps: (S+1,) whether the velocity itself jumps at an edge; it is then evaluated on both sides.
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

    def evaluate(state: _State) -> _State:
        active = state.segment < segments
        segment = jnp.minimum(state.segment, segments - 1)
        end = edges[segment + 1]
        y, step = state.y, state.step

        # One evaluation: node 0 is at y itself, node 6 at the new solution.
        tau_node = jnp.clip(state.tau + nodes[state.node] * step, low[segment], high[segment])
        y_node = y + combine(rows[state.node].T * step[None], state.slopes)
        velocity = field.velocity(y_node, tau_node, segment)
        rate = field.rate(tau_node, segment)
        slope = rate * velocity
        is_node = jnp.arange(7)[:, None] == state.node[None]
        slopes = jnp.where(per_sample(is_node, state.slopes), slope[None], state.slopes)

        # Frozen values have no error; averaging over them would loosen the tolerance.
        moves = jnp.broadcast_to(rate != 0, y.shape)
        axes = tuple(range(1, y.ndim))

        def norm(values):
            total = jnp.sum(jnp.where(moves, values, 0.0) ** 2, axis=axes)
            return jnp.sqrt(total / jnp.maximum(jnp.sum(moves, axis=axes), 1))

        # Accept or reject a finished step.
        finished = active & (state.node == _LAST)
        error = norm(per_sample(step, y) * combine(jnp.asarray(ERROR), slopes))
        ratio = error / (STEP_TOLERANCE * (atol + rtol * jnp.maximum(norm(y), norm(y_node))))
        finite = jnp.isfinite(ratio)
        tiny = ~(step > _MIN_STEP)  # true for NaN too
        accepted = finished & finite & ((ratio <= 1) | tiny)
        failed = state.failed | (finished & ~finite & tiny)
        arrived = accepted & (step >= end - state.tau)

        factor = jnp.where(finite, jnp.clip(_SAFETY * ratio**-0.2, _SHRINK, _GROW), _SHRINK)
        # A step cut short by an edge may grow at most tenfold, although the error had allowed a longer one.
        grown = jnp.where(factor < _GROW, step * factor, jnp.maximum(state.proposed, step * factor))
        proposed = jnp.where(finished, jnp.minimum(grown, LONGEST_STEP), state.proposed)

        tau = jnp.where(arrived, end, state.tau + jnp.where(accepted, step, 0.0))
        new_segment = jnp.where(failed, segments, state.segment + arrived)
        ahead = jnp.minimum(new_segment, segments - 1)
        y = jnp.where(per_sample(accepted, y), y_node, y)
        # The last slope of a step is the first slope of the next, with new rates across an edge.
        next_slope = field.rate(tau, ahead) * velocity
        slopes = slopes.at[0].set(jnp.where(per_sample(accepted, y), next_slope, slopes[0]))

        node = jnp.where(state.node < _LAST, state.node + 1, 1)
        node = jnp.where(arrived & jumps[ahead], _START, node)
        step = jnp.where(node == 1, _fit(proposed, edges[ahead + 1] - tau), step)
        # Slopes not evaluated yet must be 0, or a NaN of a rejected step would persist.
        unread = jnp.arange(7)[:, None] >= node[None]
        slopes = jnp.where(per_sample(unread, slopes), 0.0, slopes)
        at_edges = state.at_edges
        if keep_edges:
            here = (jnp.arange(segments)[:, None] == segment[None]) & arrived[None]
            at_edges = jnp.where(per_sample(here, at_edges), y[None], at_edges)
        used = (jnp.arange(segments)[None] == segment[:, None]) & active[:, None]
        return _State(
            y,
            tau,
            new_segment,
            node,
            slopes,
            step,
            proposed,
            failed,
            state.nfe + 1,
            state.sample_nfe + used,
            at_edges,
        )

    zeros = jnp.zeros(batch, jnp.float32)
    state = _State(
        y=y0,
        tau=zeros + edges[0],
        segment=jnp.zeros(batch, jnp.int32),
        node=jnp.full(batch, _START, jnp.int32),
        slopes=jnp.zeros((7, *y0.shape), y0.dtype),
        step=zeros,
        proposed=zeros + LONGEST_STEP,
        failed=jnp.zeros(batch, bool),
        nfe=jnp.int32(0),
        sample_nfe=jnp.zeros((batch, segments), jnp.int32),
        at_edges=jnp.full((segments, *y0.shape), jnp.nan, y0.dtype) if keep_edges else None,
    )
    state = jax.lax.while_loop(lambda state: jnp.any(state.segment < segments) & (state.nfe < max_nfe), evaluate, state)
    converged = (state.segment == segments) & ~state.failed
    return Solution(
        final=jnp.where(per_sample(converged, state.y), state.y, jnp.nan),
        at_edges=state.at_edges,
        nfe=state.nfe,
        sample_nfe=state.sample_nfe,
        converged=converged,
    )


def _fit(proposed: jax.Array, remaining: jax.Array) -> jax.Array:
    """Fit a step to the next edge: the proposed one, unless less than half of it would remain.

    The shorter step comes last, where a clock nears the data and the flow of trained networks curves most.
    A step a tenth longer than proposed is within the safety factor, and may save a whole step.
    """
    fitted = jnp.where(1.5 * proposed >= remaining, remaining / 2, proposed)
    return jnp.where(1.1 * proposed >= remaining, remaining, fitted)


class _SharedState(NamedTuple):
    """The state of `dopri5_shared`; all samples share time and step."""

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

    The whole batch has one step size, the error control ignores the edges, frozen values count in
    its norm, an accepted step never shrinks the next, and the last step runs past the end and is
    interpolated back. The field's segment is always 0.

    Args:
      field: the right-hand side; also evaluated a little past the last edge.
      y0: (B,...) float32.
      edges: the first and last are the interval; those between only divide the count of evaluations.
      atol, rtol: a step is accepted where the root mean square, over the batch, of its
        error / (atol + rtol |y|) is at most 1.
      max_nfe: limit of network evaluations.

    Source: torchdiffeq 0.2.5 `rk_common.py`, `misc.py`, `interp.py`.
    """
    batch = y0.shape[0]
    begin, end = jnp.float32(edges[0]), jnp.float32(edges[-1])
    inner = jnp.asarray(edges[1:-1], jnp.float32)

    def slope_at(y, tau):
        tau, segment = jnp.full((batch,), tau), jnp.zeros(batch, jnp.int32)
        return field.rate(tau, segment) * field.velocity(y, tau, segment)

    def count(nfe, tau):
        return nfe.at[jnp.searchsorted(inner, tau, side="right")].add(1)

    def norm(values):
        return jnp.sqrt(jnp.mean(values**2))

    def one_step(state: _SharedState) -> _SharedState:
        y, tau, step = state.y, state.tau, state.step

        def evaluate(node, carry):
            slopes, _, nfe = carry
            y_node = y + combine(jnp.asarray(ROWS)[node] * step, slopes)
            tau_node = tau + jnp.asarray(NODES)[node] * step
            # At the end of a step torchdiffeq evaluates one float earlier, in case the field jumps there.
            tau_node = jnp.where(node >= 5, jnp.nextafter(tau_node, -jnp.inf), tau_node)
            return slopes.at[node].set(slope_at(y_node, tau_node)), y_node, count(nfe, tau_node)

        slopes = jnp.zeros((7, *y.shape), y.dtype).at[0].set(state.slope)
        slopes, y_new, nfe = jax.lax.fori_loop(1, 7, evaluate, (slopes, y, state.nfe))
        error = step * combine(jnp.asarray(ERROR), slopes)
        ratio = norm(error / (atol + rtol * jnp.maximum(jnp.abs(y), jnp.abs(y_new))))
        accepted = ratio <= 1
        past = accepted & (tau + step >= end)

        middle = y + combine(jnp.asarray(MIDDLE) * step, slopes)
        y_end = _interpolate(y, middle, y_new, step * slopes[0], step * slopes[-1], (end - tau) / step)
        factor = jnp.clip(_SAFETY * ratio**-0.2, jnp.where(ratio < 1, 1.0, _SHRINK), _GROW)
        return _SharedState(
            y=jnp.where(past, y_end, jnp.where(accepted, y_new, y)),
            slope=jnp.where(accepted, slopes[-1], state.slope),
            tau=jnp.where(accepted, tau + step, tau),
            step=step * factor,
            nfe=nfe,
            failed=~jnp.isfinite(ratio) | (tau + step == tau),
        )

    # The first step: Hairer, Norsett and Wanner I, section II.4.
    nfe = count(jnp.zeros(len(edges) - 1, jnp.int32), begin)
    slope = slope_at(y0, begin)
    scale = atol + rtol * jnp.abs(y0)
    size, speed = norm(y0 / scale), norm(slope / scale)
    trial = jnp.where((size < 1e-5) | (speed < 1e-5), 1e-6, 0.01 * size / speed)
    curvature = norm((slope_at(y0 + trial * slope, begin + trial) - slope) / scale) / trial
    nfe = count(nfe, begin + trial)
    first = jnp.minimum(100 * trial, (0.01 / jnp.maximum(speed, curvature)) ** 0.2)

    state = jax.lax.while_loop(
        lambda state: (state.tau < end) & (state.nfe.sum() < max_nfe) & ~state.failed,
        one_step,
        _SharedState(y0, slope, begin, first, nfe, jnp.bool_(False)),
    )
    converged = jnp.broadcast_to((state.tau >= end) & ~state.failed, (batch,))
    return Solution(
        final=jnp.where(converged.reshape((batch,) + (1,) * (y0.ndim - 1)), state.y, jnp.nan),
        at_edges=None,
        nfe=state.nfe.sum(),
        sample_nfe=jnp.broadcast_to(state.nfe, (batch, len(edges) - 1)),
        converged=converged,
    )


def _interpolate(y0, y_middle, y1, dy0, dy1, x):
    """Evaluate at x in [0, 1] the quartic through y0, y_middle, y1 with end slopes dy0, dy1."""
    a = 2 * (dy1 - dy0) - 8 * (y1 + y0) + 16 * y_middle
    b = 5 * dy0 - 3 * dy1 + 18 * y0 + 14 * y1 - 32 * y_middle
    c = dy1 - 4 * dy0 - 11 * y0 - 5 * y1 + 16 * y_middle
    return y0 + x * (dy0 + x * (c + x * (b + x * a)))
