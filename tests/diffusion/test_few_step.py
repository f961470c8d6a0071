"""Few-step sampling: mean velocities of a flow that is known in closed form on two clocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sfd_jax.diffusion.clocks import Clocks, FixedOffset, Synchronous
from sfd_jax.diffusion.few_step import (
    FewStepConfig,
    draw_intervals,
    interval,
    mean_target,
    mean_velocity,
    motion,
    sample_few_step,
    step_ends,
)
from sfd_jax.latents import LatentLayout

LAYOUT = LatentLayout(3, 2)
SFD = FixedOffset(0.3)
# Texture and semantics are independent and normal.
MEAN, STD = (0.7, -1.5), (0.4, 1.6)


class Smooth(Clocks):
    """A pair with rates other than 0 and 1, and one breakpoint."""

    tau_end = 2.0
    breakpoints = (0.8,)

    def times(self, tau):
        return 1 - (1 - tau / 2) ** 2, jnp.where(tau < 0.8, tau / 4, 0.2 + (tau - 0.8) / 1.5)


def spread(texture, semantic):
    return LAYOUT.per_channel(texture, semantic).reshape(-1, 1, 1, 5)


def std_at(t):
    return jnp.sqrt(spread(*STD) ** 2 * t**2 + (1 - t) ** 2)


def position(latents, t, end):
    """Move latents along the exact flow, each group from its time to its end."""
    return spread(*MEAN) * end + std_at(end) / std_at(t) * (latents - spread(*MEAN) * t)


def exact(latents, t_semantic, t_texture, ends):
    """Answer (position - latents) / (end - t), with the division by (end - t) carried out."""
    t, end = spread(t_texture, t_semantic), spread(ends[1], ends[0])
    slope = (spread(*STD) ** 2 * (end + t) + end + t - 2) / (std_at(t) * (std_at(end) + std_at(t)))
    return spread(*MEAN) + slope * (latents - spread(*MEAN) * t)


def velocity_at(latents, at, clocks):
    times = clocks.times(at.tau)
    return exact(latents, *times, times)


def intervals(clocks):
    """Return random intervals, with starts at breakpoints and ends at them and at the data among them."""
    tau, rho = np.sort(np.random.default_rng(0).uniform(0, clocks.tau_end, (2, 24)), axis=0)
    tau[: len(clocks.edges) - 1] = clocks.edges[:-1]
    rho[: len(clocks.edges) - 1] = clocks.edges[1:]
    rho[-8:] = clocks.tau_end
    rho[6:9] = tau[6:9]
    return interval(jnp.float32(tau), jnp.float32(rho), clocks)


@pytest.mark.parametrize("clocks", [SFD, Smooth(), Synchronous()], ids=lambda clocks: type(clocks).__name__)
def test_exact_mean_velocity(clocks):
    at = intervals(clocks)
    latents = jax.random.normal(jax.random.key(1), (24, 2, 2, 5))
    times, ends = clocks.times(at.tau), clocks.times(at.rho)
    reached = position(latents, spread(times[1], times[0]), spread(ends[1], ends[0]))
    velocity = velocity_at(latents, at, clocks)

    @jax.jit
    def compute(latents, velocity):
        flow = motion(at, clocks, LAYOUT).rate * velocity

        def mean(latents, tau):
            answer = exact(latents, *clocks.times(tau), ends)
            return mean_velocity(answer, at._replace(tau=tau), clocks, LAYOUT)

        inside = at.tau + jnp.where(at.rho > at.tau, 1e-4, 0)  # derivatives by tau do not exist on a breakpoint
        of_point = jax.jvp(mean, (latents, inside), (motion(at, clocks, LAYOUT).rate * velocity, jnp.ones(24)))
        return mean(latents, at.tau), flow, of_point, mean_target(exact, latents, velocity, at, clocks, LAYOUT)

    mean, flow, (near, derivative), target = compute(latents, velocity)
    length = (at.rho - at.tau)[:, None, None, None]
    # One step is exact, for any tau and rho; at rho = tau the mean velocity is the velocity.
    np.testing.assert_allclose(latents + length * mean, reached, atol=3e-6)
    np.testing.assert_allclose(mean[6:9], flow[6:9], atol=1e-6)
    # The identity of MeanFlow, and its form with a way for each group.
    long = np.asarray(at.rho - at.tau > 1e-2)
    np.testing.assert_allclose(near[long], (flow + length * derivative)[long], atol=5e-3)
    answer = exact(latents, *times, ends)
    np.testing.assert_allclose(target, answer, atol=1e-5)

    # Steps that end anywhere lead from noise to the data's distribution, each sample along its own path.
    for taus in (step_ends(clocks, 1), step_ends(clocks, 4), [0, clocks.tau_end / 7, clocks.tau_end]):
        made = jax.jit(lambda noise, taus: sample_few_step(exact, noise, taus, clocks=clocks, layout=LAYOUT))(
            latents, taus
        )
        np.testing.assert_allclose(made, position(latents, 0.0, 1.0), atol=1e-5)


def test_a_wrong_answer_is_no_fixed_point():
    """The velocity, which is right for intervals of length 0 only, is moved by the identity elsewhere."""
    at = intervals(SFD)
    latents = jax.random.normal(jax.random.key(1), (24, 2, 2, 5))
    velocity = velocity_at(latents, at, SFD)
    wrong = lambda latents, t_semantic, t_texture, ends: exact(latents, t_semantic, t_texture, (t_semantic, t_texture))
    move = motion(at, SFD, LAYOUT)
    off = np.abs(jax.jit(lambda *given: mean_target(wrong, *given, at, SFD, LAYOUT))(latents, velocity) - velocity)
    assert off[np.broadcast_to((move.rate > 0) & (move.way > 0.2), off.shape)].max() > 0.1
    assert off[np.broadcast_to((move.rate > 0) & (move.way == 0), off.shape)].max() == 0


def test_a_group_that_stands_still_cannot_move():
    at = interval(jnp.float32([0.0, 1.0]), jnp.float32([0.3, 1.3]), SFD)
    texture, semantic = LAYOUT.split(jax.jit(lambda ones: mean_velocity(ones, at, SFD, LAYOUT))(np.ones((2, 2, 2, 5))))
    assert (texture[0] == 0).all() and (semantic[1] == 0).all() and (semantic[0] == 1).all() and (texture[1] == 1).all()


def test_draws_depend_on_the_row_alone():
    draw = jax.jit(lambda rows: draw_intervals(jax.random.key(3), rows, SFD, FewStepConfig()))
    at, part = draw(jnp.arange(4000)), draw(jnp.arange(1000, 5000))
    assert all((a[1000:] == b[:3000]).all() for a, b in zip(at, part, strict=True))
    assert (at.tau >= 0).all() and (at.tau <= at.rho).all() and (at.rho <= 1.3).all()
    edges = np.float32(SFD.edges)
    assert (edges[at.stage] <= at.tau).all() and (at.tau <= edges[at.stage + 1]).all()
    assert 0.17 < np.mean(at.tau == at.rho) < 0.23 and 0.22 < np.mean(at.tau == 0) < 0.28
    assert 0.47 < np.mean((at.rho > at.tau) & np.isin(at.rho, edges)) < 0.53


def test_the_first_step_takes_half_of_the_time():
    np.testing.assert_allclose(step_ends(SFD, 1), [0, 1.3], rtol=1e-6)
    np.testing.assert_allclose(step_ends(SFD, 2), [0, 0.65, 1.3], rtol=1e-6)
    np.testing.assert_allclose(step_ends(SFD, 3), [0, 0.65, 0.975, 1.3], rtol=1e-6)
    assert len(step_ends(SFD, 8)) == 9 and step_ends(SFD, 8).dtype == np.float32
