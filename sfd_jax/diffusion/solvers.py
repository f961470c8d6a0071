"""The equation of sampling and its fixed-step integrators; the adaptive ones are in `dopri5.py`.

The equation is dy/dtau = rate(tau, segment) * velocity(y, tau, segment). The velocity is the
network's output, the rate is the speed of the clock of each group (0 where a group is frozen).
Both depend on the segment: edges cut the interval [0, tau_end] into segments inside which the
field is smooth. Each integrator is one `lax` loop with one network evaluation per iteration, so
that every method traces and compiles the network once.

Axis letters: B samples, S segments, N slopes of a step.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sfd_jax.diffusion.clocks import MARGIN
from sfd_jax.errors import SfdError, nearest


class Field(NamedTuple):
    """The right-hand side of the equation.

    velocity: (y (B,...), tau (B,), segment (B,) int32) -> (B,...); the costly network evaluation.
    rate: (tau (B,), segment (B,) int32) -> array that broadcasts against y; cheap.
    """

    velocity: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    rate: Callable[[jax.Array, jax.Array], jax.Array]


class Solution(NamedTuple):
    """The result of an integration.

    final: (B,...) at the last edge; NaN for a sample that did not reach it.
    at_edges: (S,B,...) at every edge but the first, or None if not requested.
    nfe: () int32, network evaluations, each of the whole batch.
    sample_nfe: (B,S) int32, evaluations that each sample needed, by segment.
    converged: (B,) bool, whether the sample reached the last edge with finite values.
    """

    final: jax.Array
    at_edges: jax.Array | None
    nfe: jax.Array
    sample_nfe: jax.Array
    converged: jax.Array


@dataclasses.dataclass(frozen=True)
class Tableau:
    """An explicit Runge-Kutta method: slope i is taken at tau + nodes[i] h, y + h rows[i] slopes."""

    nodes: tuple[float, ...]
    rows: tuple[tuple[float, ...], ...]
    solution: tuple[float, ...]


# Their names in torchdiffeq: euler, heun2, midpoint, and rk4, which is Kutta's 3/8 rule there.
TABLEAUS = {
    "euler": Tableau((0,), ((),), (1,)),
    "heun": Tableau((0, 1), ((), (1,)), (1 / 2, 1 / 2)),
    "midpoint": Tableau((0, 1 / 2), ((), (1 / 2,)), (0, 1)),
    "rk4": Tableau(
        (0, 1 / 3, 2 / 3, 1),
        ((), (1 / 3,), (-1 / 3, 1), (1, -1, 1)),
        (1 / 8, 3 / 8, 3 / 8, 1 / 8),
    ),
}
METHODS = (*TABLEAUS, "ab2", "dopri5")


def integrate_grid(
    field: Field,
    y0: jax.Array,
    points: Sequence[np.ndarray],
    *,
    method: str,
    jumps: Sequence[bool] | None = None,
    keep_edges: bool = False,
) -> Solution:
    """Integrate on given points with a fixed-step method.

    A method is a table with one row per network evaluation: where to evaluate the velocity, and what to
    add to y afterwards, as combinations of the newest slopes. "ab2" is Adams-Bashforth of order 2
    for uneven steps, one evaluation per step. Its two-step formula needs a smooth field, so it
    starts again in every segment, with one midpoint step.

    Args:
      field: the right-hand side.
      y0: (B,...) float32 at the first point.
      points: one increasing float32 array for each segment, its two edges included.
      method: a name of `TABLEAUS`, or "ab2".
      jumps: (S+1,) whether the velocity itself jumps at an edge; it is then evaluated just inside.
      keep_edges: whether to return the solution at every edge.

    Returns:
      Solution; `converged` is whether the values are finite.

    Source: torchdiffeq `fixed_grid.py` for the first four.
    """
    if method not in (*TABLEAUS, "ab2"):
        raise SfdError(f"unknown fixed-step solver {method!r}: {nearest(method, METHODS)}")
    batch, segments = y0.shape[0], len(points)
    evaluations = _ab2_evaluations(points) if method == "ab2" else _runge_kutta_evaluations(points, TABLEAUS[method])
    low, high = readable([p[0] for p in points] + [points[-1][-1]], jumps)
    evaluations["tau"] = np.clip(evaluations["tau"], low[evaluations["segment"]], high[evaluations["segment"]])

    def evaluate(carry, evaluation):
        y, slopes, at_edges = carry  # slopes: (N,B,...), the newest first
        tau, segment = jnp.full((batch,), evaluation["tau"]), jnp.full((batch,), evaluation["segment"])
        velocity = field.velocity(y + combine(evaluation["read"], slopes), tau, segment)
        slope = field.rate(tau, segment) * velocity
        slopes = jnp.concatenate([slope[None], slopes[:-1]])
        y = y + combine(evaluation["add"], slopes)
        if keep_edges:
            at_edges = at_edges.at[evaluation["segment"]].set(y)  # the last of a segment overwrites the others
        return (y, slopes, at_edges), None

    slopes = jnp.zeros((evaluations["read"].shape[1], *y0.shape), y0.dtype)
    at_edges = jnp.zeros((segments, *y0.shape), y0.dtype) if keep_edges else None
    (y, _, at_edges), _ = jax.lax.scan(evaluate, (y0, slopes, at_edges), evaluations)
    nfe = np.bincount(evaluations["segment"], minlength=segments).astype(np.int32)
    return Solution(
        final=y,
        at_edges=at_edges,
        nfe=nfe.sum(dtype=np.int32),
        sample_nfe=jnp.broadcast_to(nfe, (batch, segments)),
        converged=jnp.isfinite(y).reshape(batch, -1).all(axis=1),
    )


def _runge_kutta_evaluations(points: Sequence[np.ndarray], tableau: Tableau) -> dict[str, np.ndarray]:
    """Return the table of evaluations of a Runge-Kutta method."""
    order = len(tableau.nodes)
    rows = []
    for segment, grid in enumerate(points):
        for start, end in zip(grid[:-1], grid[1:], strict=True):
            step = end - start
            for i, (node, row) in enumerate(zip(tableau.nodes, tableau.rows, strict=True)):
                tau = end if node == 1 else start + np.float32(node) * step
                add = tableau.solution if i == order - 1 else ()
                read, add = (_newest_first(weights, order) * step for weights in (row, add))
                rows.append((tau, segment, read, add))
    return _columns(rows)


def _ab2_evaluations(points: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Return the table of evaluations of Adams-Bashforth 2."""
    rows = []
    for segment, grid in enumerate(points):
        steps = np.diff(grid)
        half = steps[0] / 2
        rows.append((grid[0], segment, [0, 0], [0, 0]))
        rows.append((grid[0] + half, segment, [half, 0], [steps[0], 0]))
        for i in range(1, len(steps)):
            # Integrate the line through the slope at tau_i and the one before it, at tau_{i-1} (after
            # the first step: at its middle), over the next step.
            previous = half if i == 1 else steps[i - 1]
            excess = steps[i] ** 2 / (2 * previous)
            rows.append((grid[i], segment, [0, 0], [steps[i] + excess, -excess]))
    return _columns(rows)


def _newest_first(weights: Sequence[float], length: int) -> np.ndarray:
    return np.pad(np.asarray(weights, np.float32)[::-1], (0, length - len(weights)))


def _columns(rows: list[tuple]) -> dict[str, np.ndarray]:
    tau, segment, read, add = zip(*rows, strict=True)
    return {
        "tau": np.asarray(tau, np.float32),
        "segment": np.asarray(segment, np.int32),
        "read": np.asarray(read, np.float32),
        "add": np.asarray(add, np.float32),
    }


def combine(weights: jax.Array, slopes: jax.Array) -> jax.Array:
    """Sum slopes (N,B,...) with weights (N,) or (N,B), in float32 and in this order.

    Not a dot product, which would round to bfloat16 on a TPU.
    """
    weights = weights.reshape(weights.shape + (1,) * (slopes.ndim - weights.ndim))
    total = weights[0] * slopes[0]
    for i in range(1, len(slopes)):
        total = total + weights[i] * slopes[i]
    return total


def readable(edges: Sequence[float], jumps: Sequence[bool] | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the lowest and highest time (S,) at which each segment may evaluate the velocity."""
    edges = np.asarray(edges, np.float32)
    inset = MARGIN * np.asarray(np.zeros(len(edges)) if jumps is None else jumps, np.float32)
    return edges[:-1] + inset[:-1], edges[1:] - inset[1:]
