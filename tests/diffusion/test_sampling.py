"""Sampling: fields whose flow is known in closed form, both modes, every pair of clocks."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sfd_jax.diffusion import guidance
from sfd_jax.diffusion.clocks import Clocks, FixedOffset, Sequential, Synchronous
from sfd_jax.diffusion.sampling import (
    SolverConfig,
    released_points,
    sample,
    staged_points,
    trajectory,
)
from sfd_jax.errors import SfdError
from sfd_jax.latents import LatentLayout

LAYOUT = LatentLayout(3, 2)
SFD = FixedOffset(0.3)


class Learned(Clocks):
    """A smooth pair with slopes other than 0 and 1, and one breakpoint."""

    tau_end = 2.0
    breakpoints = (0.8,)

    def times(self, tau):
        return 1 - (1 - tau / 2) ** 2, jnp.where(tau < 0.8, tau / 4, 0.2 + (tau - 0.8) / 1.5)


def coupled(latents, t_semantic, t_texture):
    """Semantics decay; texture is driven by the current semantics."""
    texture, semantic = LAYOUT.split(latents)
    drive = jnp.mean(semantic, axis=-1, keepdims=True)
    return LAYOUT.join(jnp.broadcast_to(drive, texture.shape), -semantic)


def exact(noise, clocks):
    """Integrate `coupled`: texture gains mean(semantics) times the integral of exp(-t_semantic).

    The integral runs over t_texture, so it depends on how far semantics lead.
    """
    tau = np.linspace(0, clocks.tau_end, 200_001)
    t_semantic, t_texture = (np.asarray(t, np.float64) for t in clocks.times(jnp.float32(tau)))
    decay = np.exp(-t_semantic)
    gain = np.sum((decay[1:] + decay[:-1]) / 2 * np.diff(t_texture))
    texture, semantic = LAYOUT.split(np.asarray(noise, np.float64))
    drive = semantic.mean(-1, keepdims=True)
    return np.concatenate([texture + gain * drive, semantic * math.exp(-1)], axis=-1)


def noise(size=3):
    return jax.random.normal(jax.random.key(0), (size, 2, 2, 5))


def run(velocity_fn, config, clocks=SFD, start=None, **kwargs):
    start = noise() if start is None else start
    go = jax.jit(lambda x: sample(velocity_fn, x, layout=LAYOUT, clocks=clocks, solver=config, **kwargs))
    return go(start)


@pytest.mark.parametrize("clocks", [SFD, Sequential(), Synchronous(), Learned()])
@pytest.mark.parametrize("name", ["dopri5", "ab2", "rk4"])
def test_staged_sampling_follows_the_exact_flow(clocks, name):
    latents, stats = run(coupled, SolverConfig(solver=name, num_steps=40), clocks)
    # ab2 at 39 steps has an error of order h^2; the others reach float32.
    np.testing.assert_allclose(latents, exact(noise(), clocks), atol=2e-3 if name == "ab2" else 2e-5)
    assert stats.converged.all()
    assert len(stats.nfe_by_stage) == len(clocks.breakpoints) + 1
    assert int(stats.nfe_by_stage.sum()) == int(stats.nfe) == int(stats.sample_nfe.sum(1).max())


def test_the_exact_answers_differ_by_clocks():
    """Otherwise the test above could not distinguish the pairs."""
    gain = lambda clocks: (exact(noise(), clocks) - np.asarray(noise()))[0, 0, 0, 0]
    lead = 0.3
    drive = float(noise()[0, 0, 0, 3:].mean())
    by_hand = math.exp(-lead) - math.exp(-1) + lead * math.exp(-1)
    np.testing.assert_allclose(gain(SFD), drive * by_hand, rtol=1e-5)
    np.testing.assert_allclose(gain(Sequential()), drive * math.exp(-1), rtol=1e-5)
    np.testing.assert_allclose(gain(Synchronous()), drive * (1 - math.exp(-1)), rtol=1e-5)


def test_groups_are_frozen_outside_their_stages():
    taus = [0.0, 0.2, 0.3, 1.0, 1.2, 1.3]
    states = jax.jit(lambda x: trajectory(coupled, x, taus, layout=LAYOUT, clocks=SFD, solver=SolverConfig()))(noise())
    texture, semantic = LAYOUT.split(states)
    for still in (1, 2):  # texture waits in stage I
        np.testing.assert_array_equal(texture[still], texture[0])
    for still in (4, 5):  # semantics are done in stage III
        np.testing.assert_array_equal(semantic[still], semantic[3])
    start = LAYOUT.split(noise())[1]
    t = np.minimum(taus, 1)[:, None, None, None, None]
    np.testing.assert_allclose(semantic, start[None] * np.exp(-t), atol=1e-5)
    np.testing.assert_allclose(states[-1], exact(noise(), SFD), atol=2e-5)


def test_a_trajectory_of_a_fixed_grid_has_the_given_times():
    config = SolverConfig(solver="heun", num_steps=60)
    states = trajectory(coupled, noise(), [0.5, 1.3], layout=LAYOUT, clocks=SFD, solver=config)
    semantic = LAYOUT.split(states)[1]
    start = LAYOUT.split(noise())[1]
    np.testing.assert_allclose(semantic[0], start * math.exp(-0.5), atol=1e-4)  # order h^2
    with pytest.raises(SfdError, match="must increase"):
        trajectory(coupled, noise(), [0.5, 0.2], layout=LAYOUT, clocks=SFD)
    with pytest.raises(SfdError, match="staged"):
        trajectory(coupled, noise(), [0.5], layout=LAYOUT, clocks=SFD, solver=SolverConfig(mode="released"))


def test_released_euler_by_hand():
    """The released masks on the released grid, written out with a loop."""
    config = SolverConfig(solver="euler", mode="released", num_steps=14)
    grid = released_points(1.3, 14)
    expected = np.asarray(noise())
    for tau, following in zip(grid[:-1], grid[1:], strict=True):
        step = following - tau
        velocity = np.array(coupled(expected, None, None))
        velocity[..., :3] *= tau >= np.float32(0.3)
        velocity[..., 3:] *= tau <= np.float32(1.0)
        expected = expected + step * velocity
    latents, stats = run(coupled, config)
    np.testing.assert_allclose(latents, expected, atol=1e-6)
    assert int(stats.nfe) == 13 == int(stats.nfe_by_stage.sum())


def test_the_released_grid_is_that_of_torch():
    assert (np.diff(released_points(1.3, 100)) > 0).all()
    np.testing.assert_array_equal(released_points(1.3, 11, timestep_shift=1.0), released_points(1.3, 11))
    shifted = released_points(1.3, 11, timestep_shift=0.3)
    u = np.linspace(0, 1, 11)
    np.testing.assert_allclose(shifted, 1.3 * 0.3 * u / (1 - 0.7 * u), atol=1e-6)
    assert shifted[0] == 0 and shifted[-1] == np.float32(1.3)
    assert shifted[1] < 1.3 - shifted[-2]  # a shift below 1 is finer near the noise
    torch = pytest.importorskip("torch", reason="needs the extra `torch`")
    for points in range(2, 200):
        ours, theirs = released_points(1.3, points), torch.linspace(0, 1.3, points).numpy()
        np.testing.assert_allclose(ours, theirs, rtol=2e-7)  # a fused multiply-add apart
        # Where a point falls on a breakpoint its last bit decides: 14, 27, 40, ... points.
        np.testing.assert_array_equal(ours >= np.float32(0.3), theirs >= np.float32(0.3))
        np.testing.assert_array_equal(ours <= 1, theirs <= 1)


def test_staged_mode_has_less_error_with_fewer_evaluations():
    """On a random network, whose texture velocity jumps from 0 where its clock starts."""
    weights = [jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(22, 64), (64, 20)])]

    def network(latents, t_semantic, t_texture):
        rows = latents.reshape(len(latents), -1)
        rows = jnp.concatenate([rows, t_semantic[:, None], t_texture[:, None]], axis=1)
        return (jnp.tanh(rows @ weights[0] / 4) @ weights[1] / 4).reshape(latents.shape)

    released, stats_released = run(network, SolverConfig(mode="released"))
    staged, stats_staged = run(network, SolverConfig())
    answer, _ = run(network, SolverConfig(rtol=1e-5))
    error = lambda latents: np.abs(latents - answer).max()
    assert error(staged) <= error(released) / 5
    assert int(stats_staged.nfe) <= 0.4 * int(stats_released.nfe)


@pytest.mark.parametrize("shift", [None, 0.3, 3.0])
@pytest.mark.parametrize("num_steps", [4, 5, 14, 50, 101])
def test_staged_points_include_the_edges_and_keep_the_number_of_steps(shift, num_steps):
    points = staged_points(SFD.edges, num_steps, shift)
    assert sum(len(p) - 1 for p in points) == num_steps - 1
    for p, start, end in zip(points, SFD.edges[:-1], SFD.edges[1:], strict=True):
        assert p[0] == np.float32(start) and p[-1] == np.float32(end) and (np.diff(p) > 0).all()


def test_staged_points_are_near_the_released_ones():
    # 13 steps of 0.1 fit the stages of 0.3, 0.7 and 0.3 exactly.
    np.testing.assert_allclose(
        np.concatenate([p[:-1] for p in staged_points(SFD.edges, 14)]), np.arange(13) / 10, atol=1e-7
    )
    for released in (staged_points([0.0, 1.3], 30, 0.3), [released_points(1.3, 30, 0.3)]):
        np.testing.assert_allclose(released[0], released_points(1.3, 30, 0.3), atol=1e-6)
    with pytest.raises(SfdError, match="at least 4"):
        staged_points(SFD.edges, 3)


def test_the_solver_stops_where_a_guidance_interval_starts():
    """The velocity jumps where a group's clock passes 0.1: at tau 0.1 and 0.4."""

    def velocity(latents, t_semantic, t_texture):
        on = LAYOUT.per_channel(t_texture >= 0.1, t_semantic >= 0.1)[:, None, None, :]
        return 1.0 + 2.0 * on

    latents, stats = run(velocity, SolverConfig(), jumps=(0.1, 0.4))
    # Each group has velocity 1 for a tenth of its time and 3 for the rest; 1e-5 for the margins.
    np.testing.assert_allclose(latents, noise() + 0.1 + 2.7, atol=1e-5)
    without_jumps, _ = run(velocity, SolverConfig())
    assert np.abs(without_jumps - (noise() + 0.1 + 2.7)).max() > 100 * 1e-5
    assert len(stats.nfe_by_stage) == 3  # jumps cut stages into segments but add no stages


def test_sharding_the_batch_changes_nothing():
    if jax.device_count() < 4:
        pytest.skip("needs 4 devices: XLA_FLAGS=--xla_force_host_platform_device_count=8")
    rows = NamedSharding(Mesh(np.array(jax.devices()[:4]), "data"), PartitionSpec("data"))
    whole, stats = run(coupled, SolverConfig(), start=noise(8))
    split, stats_split = run(coupled, SolverConfig(), start=jax.device_put(noise(8), rows))
    assert split.sharding.is_equivalent_to(rows, 4)
    np.testing.assert_allclose(split, whole, atol=1e-6)  # rounding of another fusion
    np.testing.assert_array_equal(stats_split.sample_nfe, stats.sample_nfe)


def test_impossible_settings_are_refused():
    with pytest.raises(SfdError, match="did you mean 'dopri5'"):
        SolverConfig(solver="dopri")
    with pytest.raises(SfdError, match="did you mean 'released'"):
        SolverConfig(mode="release")
    with pytest.raises(SfdError, match="num_steps=1"):
        SolverConfig(num_steps=1)
    with pytest.raises(SfdError, match="rtol"):
        SolverConfig(rtol=0.0)
    with pytest.raises(SfdError, match="timestep_shift"):
        SolverConfig(timestep_shift=-1.0)
    with pytest.raises(SfdError, match="dopri5 chooses its steps by atol and rtol"):
        SolverConfig(nfe=30)
    with pytest.raises(SfdError, match="rk4 in staged mode needs at least 12 network evaluations"):
        run(coupled, SolverConfig(solver="rk4", nfe=11))
    with pytest.raises(SfdError, match="ab2 in released mode needs at least 2 network evaluations"):
        run(coupled, SolverConfig(solver="ab2", mode="released", nfe=1))


def counted(velocity_fn, seen):
    """Record the number of rows of each network evaluation."""

    def apply(latents, t_semantic, t_texture, labels):
        jax.debug.callback(lambda x: seen.append(len(x)), t_semantic)
        return velocity_fn(latents, t_semantic, t_texture)

    return apply


@pytest.mark.parametrize("mode", ["staged", "released"])
@pytest.mark.parametrize(("name", "nfe", "used"), [("euler", 7, 7), ("heun", 9, 8), ("rk4", 15, 12), ("ab2", 9, 9)])
def test_nfe_is_not_exceeded(name, nfe, used, mode):
    seen = []
    velocity_fn = guidance.conditional(counted(coupled, seen), jnp.zeros(3, jnp.int32))
    _, stats = run(velocity_fn, SolverConfig(solver=name, mode=mode, nfe=nfe))
    jax.effects_barrier()
    assert len(seen) == used == int(stats.nfe) == int(stats.nfe_by_stage.sum())


def test_the_nfe_of_staged_dopri5_is_counted_right():
    seen = []
    velocity_fn = guidance.conditional(counted(coupled, seen), jnp.zeros(3, jnp.int32))
    _, stats = run(velocity_fn, SolverConfig())
    jax.effects_barrier()
    assert seen == [3] * int(stats.nfe)


def test_before_the_guidance_interval_no_null_rows_are_computed():
    """Euler with 13 steps of 0.1; a group is guided from clock 0.45 on: semantics at tau 0.45."""
    seen = []
    velocity_fn = guidance.classifier_free(
        counted(coupled, seen), jnp.zeros(3, jnp.int32), null_label=1, scale=2.0, layout=LAYOUT, interval_start=0.45
    )
    run(velocity_fn, SolverConfig(solver="euler", nfe=13))
    jax.effects_barrier()
    assert seen == 5 * [3] + 8 * [6]
