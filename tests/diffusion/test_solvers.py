"""The integrators on equations with known answers."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sfd_jax.diffusion import dopri5 as tableau
from sfd_jax.diffusion.dopri5 import dopri5, dopri5_shared
from sfd_jax.diffusion.solvers import METHODS, TABLEAUS, Field, Tableau, integrate_grid
from sfd_jax.errors import SfdError

TIGHT = dict(atol=1e-6, rtol=1e-3, max_nfe=2000)
ADAPTIVE = {"dopri5": dopri5, "dopri5_shared": dopri5_shared}


def field(slope):
    """A field from slope(y, tau), with tau spread over y (B,N)."""
    return Field(
        velocity=lambda y, tau, segment: slope(y, tau[:, None]),
        rate=lambda tau, segment: jnp.ones((len(tau), 1)),
    )


def grid(*edges, steps=8):
    """Even points in each segment."""
    return [np.linspace(a, b, steps + 1, dtype=np.float32) for a, b in itertools.pairwise(edges)]


DECAY = field(lambda y, tau: -y)
ONES = jnp.ones((2, 3))


@pytest.mark.parametrize("method", [m for m in METHODS if m != "dopri5"])
def test_decay_and_measured_order(method):
    errors = []
    for steps in (4, 8):
        solution = integrate_grid(DECAY, ONES, grid(0, 1, steps=steps), method=method)
        errors.append(float(jnp.abs(solution.final - math.exp(-1)).max()))
    order = {"euler": 1, "heun": 2, "midpoint": 2, "ab2": 2, "rk4": 4}[method]
    # So few steps give the order to a third; more would reach float32's limit with rk4.
    assert abs(math.log2(errors[0] / errors[1]) - order) < 0.34
    nfe = 8 + 1 if method == "ab2" else 8 * len(TABLEAUS[method].nodes)
    assert solution.nfe == nfe and (solution.sample_nfe == nfe).all()


def test_the_tableau_of_dopri5_is_of_order_5(monkeypatch):
    table = Tableau(tuple(tableau.NODES[:6]), tuple(tableau.ROWS[i, :i] for i in range(6)), tableau.ROWS[6, :6])
    monkeypatch.setitem(TABLEAUS, "dopri5 at fixed steps", table)
    errors = [
        float(jnp.abs(solution.final - math.exp(-2)).max())
        for steps in (3, 6)
        for solution in [integrate_grid(DECAY, ONES, grid(0, 2, steps=steps), method="dopri5 at fixed steps")]
    ]
    assert abs(math.log2(errors[0] / errors[1]) - 5) < 1  # more steps would reach float32's limit


@pytest.mark.parametrize("name", ADAPTIVE)
def test_adaptive_decay_stays_within_the_tolerance(name):
    solution = ADAPTIVE[name](DECAY, ONES, [0, 1], **TIGHT)
    assert solution.converged.all()
    # `dopri5` bounds the answer, the released controller each step.
    np.testing.assert_allclose(solution.final, math.exp(-1), rtol=1e-4 if name == "dopri5" else 1e-3)
    # Six evaluations per step, one at the start; the released controller has one more for its first step.
    assert int(solution.nfe) % 6 == (1 if name == "dopri5" else 2) and int(solution.nfe) < 40


@pytest.mark.parametrize("method", METHODS)
def test_a_constant_velocity_is_integrated_exactly(method):
    constant = field(lambda y, tau: jnp.full_like(y, 2.5))
    if method == "dopri5":
        solution = dopri5(constant, ONES, [0, 0.3, 1.3], **TIGHT)
    else:
        solution = integrate_grid(constant, ONES, grid(0, 0.3, 1.3, steps=3), method=method)
    np.testing.assert_allclose(solution.final, 1 + 2.5 * 1.3, rtol=1e-6)  # float32 sums


@pytest.mark.parametrize("method", METHODS)
def test_no_step_crosses_an_edge(method):
    """A slope that jumps at the edges is harmless to a method that stops there."""
    edges, taus = [0, 0.37, 1.0, 1.3], []
    jumping = Field(
        velocity=lambda y, tau, segment: jax.debug.callback(lambda t: taus.append(t.copy()), tau) or jnp.ones_like(y),
        rate=lambda tau, segment: jnp.asarray([3.0, -5.0, 7.0])[segment][:, None],
    )
    if method == "dopri5":
        solution = dopri5(jumping, ONES, edges, **TIGHT, keep_edges=True)
    else:
        solution = integrate_grid(jumping, ONES, grid(*edges, steps=3), method=method, keep_edges=True)
    levels = 1 + np.cumsum([3 * 0.37, -5 * 0.63, 7 * 0.3])
    np.testing.assert_allclose(solution.at_edges[:, 0, 0], levels, rtol=1e-5)
    np.testing.assert_allclose(solution.final[1], levels[-1], rtol=1e-5)
    jax.effects_barrier()
    # All evaluations of a segment are between its edges.
    segments = np.repeat(np.arange(3), np.asarray(solution.sample_nfe)[0])
    times = np.asarray(taus)[:, 0]
    assert len(times) == len(segments)
    assert all(edges[s] <= t + 1e-6 and t <= edges[s + 1] + 1e-6 for s, t in zip(segments, times, strict=True))


def test_edges_take_no_evaluations_of_their_own_in_dopri5():
    """On a smooth field, further edges cost at most the steps that end on them."""
    one = dopri5(DECAY, ONES, [0, 3], **TIGHT)
    three = dopri5(DECAY, ONES, [0, 1, 2, 3], **TIGHT, keep_edges=True)
    assert int(three.nfe) % 6 == 1 and int(three.nfe) <= int(one.nfe) + 12
    np.testing.assert_allclose(three.at_edges[:, 0, 0], np.exp([-1.0, -2.0, -3.0]), rtol=1e-4)
    np.testing.assert_array_equal(three.sample_nfe.sum(1), np.full(2, int(three.nfe)))


STIFFNESS = jnp.asarray([1.0, 8.0, 30.0])


def oscillator(speed):
    """y'' = -speed^2 y as a pair, one speed for each sample."""
    return field(lambda y, tau: speed[:, None] * jnp.stack([y[:, 1], -y[:, 0]], axis=1))


def test_a_sample_does_not_depend_on_the_rest_of_the_batch():
    start = jnp.tile(jnp.asarray([[1.0, 0.0]]), (3, 1))
    run = jax.jit(lambda y, speed: dopri5(oscillator(speed), y, [0, 0.3, 1.0, 1.3], **TIGHT))
    together = run(start, STIFFNESS)
    for i in range(3):
        alone = run(start[i : i + 1], STIFFNESS[i : i + 1])
        np.testing.assert_array_equal(alone.sample_nfe[0], together.sample_nfe[i])
        # The same operations on the same numbers; only XLA's choice of fusion may differ.
        np.testing.assert_allclose(alone.final[0], together.final[i], atol=1e-6)
        angle = 1.3 * float(STIFFNESS[i])
        exact = [math.cos(angle), -math.sin(angle)]
        # A rotation preserves errors, so the total is at most the sum over the steps.
        bound = int(together.sample_nfe[i].sum()) / 6 * tableau.STEP_TOLERANCE * TIGHT["rtol"]
        np.testing.assert_allclose(together.final[i], exact, atol=bound)
        # Compare with the evaluations and the error of the released controller on this sample alone.
        released = dopri5_shared(oscillator(STIFFNESS[i : i + 1]), start[i : i + 1], [0, 1.3], **TIGHT)
        error, released_error = (np.abs(x - np.asarray(exact)).max() for x in (together.final[i], released.final[0]))
        assert error <= 1.1 * released_error and int(together.sample_nfe[i].sum()) <= int(released.nfe)
    own = np.asarray(together.sample_nfe).sum(1)
    assert own[0] < own[1] < own[2] == int(together.nfe)  # no sample waits for another


def test_a_jump_of_the_velocity_is_evaluated_on_both_sides():
    """The network itself jumps at 0.4: given `jumps`, the solver is exact; without, it is not."""
    jumping = field(lambda y, tau: jnp.where(tau < 0.4, 1.0, -2.0) + 0 * y)
    solution = dopri5(jumping, ONES, [0, 0.4, 1], **TIGHT, jumps=[False, True, False])
    np.testing.assert_allclose(solution.final, 1 + 0.4 - 1.2, atol=1e-5)  # a margin of 1e-6 times 3
    without_jumps = dopri5(jumping, ONES, [0, 1], **TIGHT)
    assert np.abs(without_jumps.final - (1 + 0.4 - 1.2)).max() > 100 * 1e-5
    fixed = integrate_grid(jumping, ONES, grid(0, 0.4, 1), method="heun", jumps=[False, True, False])
    np.testing.assert_allclose(fixed.final, 1 + 0.4 - 1.2, atol=1e-5)


def test_samples_that_do_not_converge_are_marked_and_do_not_change_others():
    # The second sample reaches a pole at tau = 1/2, the third is NaN from the start.
    start = jnp.asarray([[0.1], [2.0], [jnp.nan]])
    solution = dopri5(field(lambda y, tau: y**2), start, [0, 1], **TIGHT)
    np.testing.assert_array_equal(solution.converged, [True, False, False])
    np.testing.assert_allclose(solution.final[0], 1 / 9, rtol=1e-3)
    assert jnp.isnan(solution.final[1:]).all() and int(solution.nfe) < TIGHT["max_nfe"]
    limited = dopri5(oscillator(STIFFNESS), jnp.ones((3, 2)), [0, 9], **TIGHT | dict(max_nfe=50))
    assert int(limited.nfe) == 50 and not limited.converged[2]
    assert not dopri5_shared(DECAY, start, [0, 1], **TIGHT).converged.any()


def test_a_step_rejected_for_overflow_leaves_no_nan():
    # Flat, then steep: a long step into the steep part evaluates the field far away, where it is NaN.
    # The shorter step after it must not inherit that.
    def slope(y, tau):
        steep = jnp.where(jnp.abs(y) > 1.2, jnp.nan, -50 * y)
        return jnp.where(tau < 0.5, 0 * y, steep)

    solution = dopri5(field(slope), ONES, [0, 1], **TIGHT)
    assert solution.converged.all()
    np.testing.assert_allclose(solution.final, math.exp(-25), atol=1e-5)
    # A NaN that no step can avoid ends the integration of the sample.
    cliff = field(lambda y, tau: jnp.where(tau > 0.5, jnp.nan, 0.0) + 0 * y)
    assert not dopri5(cliff, ONES, [0, 1], **TIGHT).converged.any()


@pytest.mark.parametrize("name", [*METHODS, "dopri5_shared"])
def test_the_network_is_traced_once(name):
    traces = []
    counting = field(lambda y, tau: traces.append(1) or -y)
    if name in ADAPTIVE:
        run = functools.partial(ADAPTIVE[name], counting, edges=[0, 0.3, 1, 1.3], **TIGHT)
    else:
        run = functools.partial(integrate_grid, counting, points=grid(0, 0.3, 1, 1.3), method=name)
    compiled = jax.jit(lambda y: run(y0=y).final)
    compiled(ONES), compiled(2 * ONES)
    assert len(traces) == (3 if name == "dopri5_shared" else 1)


TORCHDIFFEQ = {"euler": "euler", "heun": "heun2", "midpoint": "midpoint", "rk4": "rk4"}


@pytest.mark.parametrize("name", [*TORCHDIFFEQ, "dopri5", "dopri5 with a jump"])
def test_agrees_with_torchdiffeq(name):
    torch = pytest.importorskip("torch", reason="needs the extra `torch`")
    torchdiffeq = pytest.importorskip("torchdiffeq", reason="needs the extra `dev`")
    matrix = np.float32([[0, 3, 0], [-3, 0, 1], [0.5, 0, -1]])
    jump = 0.6 if "jump" in name else -1.0
    nfe = [0]

    def theirs(t, y):
        nfe[0] += 1
        return y @ torch.from_numpy(matrix) + torch.where(t < jump, 0.0, 4.0) * torch.sin(7 * t)

    ours = field(lambda y, tau: y @ matrix + jnp.where(tau < jump, 0.0, 4.0) * jnp.sin(7 * tau))
    start = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    times = torch.linspace(0, 1.3, 14)
    tolerances = dict(method=TORCHDIFFEQ.get(name, "dopri5"), atol=1e-6, rtol=1e-3)
    reference = torchdiffeq.odeint(theirs, torch.from_numpy(start), times, **tolerances)[-1].numpy()
    if name in TORCHDIFFEQ:
        solution = integrate_grid(ours, jnp.asarray(start), [times.numpy()], method=name)
        tolerance = 2e-6  # float32 sums in another order
    else:
        solution = dopri5_shared(ours, jnp.asarray(start), [0, 1.3], **TIGHT)
        # After the jump the controller chooses steps from rounding noise: torchdiffeq's own answers
        # in float32 and float64 are 2e-3 apart there.
        tolerance = 5e-3 if "jump" in name else 2e-5
    np.testing.assert_allclose(solution.final, reference, atol=tolerance)
    assert int(solution.nfe) == nfe[0]


def test_unknown_methods_are_named():
    with pytest.raises(SfdError, match="did you mean 'euler'"):
        integrate_grid(DECAY, ONES, grid(0, 1), method="euller")


def test_values_near_zero_do_not_shorten_steps():
    """The error is relative to the norm of the sample, not to each value."""
    driven = field(lambda y, tau: jnp.cos(3 * tau) + 0 * y)
    starts = jnp.asarray([[1.0, 2.0], [-0.2, 2.0]])  # the second sample's first value crosses zero
    solution = dopri5(driven, starts, [0, 1.3], **TIGHT)
    np.testing.assert_allclose(solution.final, starts + math.sin(3.9) / 3, atol=2e-3)
    np.testing.assert_array_equal(solution.sample_nfe[0], solution.sample_nfe[1])


def test_steps_before_an_edge():
    proposed, remaining = jnp.float32([0.4, 0.4, 0.4, 0.4]), jnp.float32([0.2, 0.43, 0.5, 0.7])
    np.testing.assert_allclose(tableau._fit(proposed, remaining), [0.2, 0.43, 0.25, 0.4])
