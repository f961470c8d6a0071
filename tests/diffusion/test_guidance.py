"""Guidance: scale 1 is none, intervals act by group, and unused velocities are not evaluated."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sfd_jax.diffusion import guidance
from sfd_jax.diffusion.clocks import FixedOffset
from sfd_jax.diffusion.sample_config import SolverConfig
from sfd_jax.diffusion.sampling import sample
from sfd_jax.diffusion.sde import SDEConfig, noise_by_step, sample_sde
from sfd_jax.errors import SfdError
from sfd_jax.latents import LatentLayout

LAYOUT = LatentLayout(3, 2)
LABELS = jnp.int32([0, 4, 2])
NULL = 7


def network(gain, rows=None):
    """A network whose output depends on latents, clocks and labels; appends its number of rows to `rows`."""

    def apply(latents, t_semantic, t_texture, labels):
        if rows is not None:
            jax.debug.callback(lambda x: rows.append(len(x)), labels)
        per_row = gain * (labels + 1.0) + 10 * t_semantic + 100 * t_texture
        return latents * per_row[:, None, None, None]

    return apply


def inputs(t_semantic=(0.2, 0.6, 1.0), t_texture=(0.0, 0.3, 0.7)):
    latents = jax.random.normal(jax.random.key(0), (3, 2, 2, 5))
    return latents, jnp.float32(t_semantic), jnp.float32(t_texture)


def velocities(gain=1.0, labels=LABELS):
    return network(gain)(*inputs(), labels)


def test_scale_1_is_no_guidance_in_half_the_rows():
    rows = []
    guided = guidance.classifier_free(network(1, rows), LABELS, null_label=NULL, scale=1.0, layout=LAYOUT)
    np.testing.assert_array_equal(guided(*inputs()), velocities())
    never = lambda *_: pytest.fail("the weak model was evaluated")
    alone = guidance.autoguidance(network(1, rows), never, LABELS, layout=LAYOUT, scale=1.0)
    np.testing.assert_array_equal(alone(*inputs()), velocities())
    jax.effects_barrier()
    assert rows == [3, 3]


def test_classifier_free_guidance_in_one_batch():
    rows = []
    guided = guidance.classifier_free(network(1, rows), LABELS, null_label=NULL, scale=2.5, layout=LAYOUT)
    null = velocities(labels=jnp.full_like(LABELS, NULL))
    # 1e-5: float32, after a subtraction
    np.testing.assert_allclose(guided(*inputs()), null + 2.5 * (velocities() - null), rtol=1e-5)
    jax.effects_barrier()
    assert rows == [6]


def test_autoguidance_with_a_scale_for_each_group():
    guided = guidance.autoguidance(
        network(2), network(1), LABELS, layout=LAYOUT, scale=9.0, scale_semantic=2.0, scale_texture=1.2
    )
    strong, weak = velocities(2), velocities(1)
    scale = np.float32([1.2, 1.2, 1.2, 2, 2])
    np.testing.assert_allclose(guided(*inputs()), weak + scale[None, None, None] * (strong - weak), rtol=1e-5)


@pytest.mark.parametrize("groups", guidance.INTERVAL_GROUPS)
def test_intervals_depend_on_the_clock_of_each_group_and_row(groups):
    make = lambda start: guidance.classifier_free(
        network(1), LABELS, null_label=NULL, scale=3.0, layout=LAYOUT, interval_start=start, interval_groups=groups
    )
    out, always, plain = make(0.6)(*inputs()), make(0.0)(*inputs()), velocities()
    texture_on = np.array([False, False, True]) if groups != "sem" else np.ones(3, bool)
    semantic_on = np.array([False, True, True]) if groups != "tex" else np.ones(3, bool)
    on = np.where(np.arange(5) < 3, texture_on[:, None], semantic_on[:, None])[:, None, None]
    np.testing.assert_allclose(out, np.where(on, always, plain), rtol=1e-6)


def test_velocities_outside_the_interval_are_not_evaluated():
    rows = []
    guided = jax.jit(
        guidance.classifier_free(
            network(1, rows), LABELS, null_label=NULL, scale=3.0, layout=LAYOUT, interval_start=0.5
        )
    )
    early = inputs((0.1, 0.2, 0.3), (0, 0, 0))
    np.testing.assert_allclose(guided(*early), network(1)(*early, LABELS), rtol=1e-6)
    jax.block_until_ready(guided(*inputs()))
    jax.effects_barrier()
    assert rows == [3, 6]


def test_a_group_of_scale_1_does_not_evaluate_the_weak_model():
    rows = []
    guided = jax.jit(
        guidance.autoguidance(
            network(2),
            network(1, rows),
            LABELS,
            layout=LAYOUT,
            scale_semantic=1.0,
            scale_texture=3.0,
            interval_start=0.5,
        )
    )
    semantic_inside = inputs((0.6, 0.7, 0.8), (0.1, 0.2, 0.3))
    np.testing.assert_allclose(guided(*semantic_inside), network(2)(*semantic_inside, LABELS), rtol=1e-6)
    jax.effects_barrier()
    assert rows == []
    jax.block_until_ready(guided(*inputs((0.9, 0.9, 0.9), (0.4, 0.5, 0.6))))
    jax.effects_barrier()
    assert rows == [3]


@pytest.mark.parametrize(
    "solver, moving", [("dopri5", "semantic"), ("euler", "texture"), ("released", "semantic"), ("sde_heun", "texture")]
)
def test_the_weak_model_is_not_evaluated_where_only_the_group_of_scale_1_moves(solver, moving):
    """That is the first stage, where texture stands still, or the last, where semantics do."""
    clocks, start = FixedOffset(0.3), inputs()[0]
    scales = {f"scale_{group}": 1.0 if group == moving else 3.0 for group in ("semantic", "texture")}

    def velocity(evaluated):
        def weak(latents, t_semantic, t_texture, labels):
            jax.debug.callback(lambda *times: evaluated.append(times), t_semantic[0], t_texture[0])
            return network(0.01)(latents, t_semantic, t_texture, labels)

        return guidance.autoguidance(network(0.02), weak, LABELS, layout=LAYOUT, **scales)

    def integrate(velocity_fn):
        if solver == "sde_heun":
            noises = noise_by_step(jax.random.key(1), jnp.arange(3), start.shape[1:])
            config = SDEConfig(num_steps=14, method="heun")
            return sample_sde(velocity_fn, start, noises, layout=LAYOUT, clocks=clocks, config=config)
        how = {"solver": "euler", "mode": "released"} if solver == "released" else {"solver": solver}
        return sample(velocity_fn, start, layout=LAYOUT, clocks=clocks, solver=SolverConfig(num_steps=14, **how))[0]

    told, untold = [], []
    guided, without = velocity(told), velocity(untold)
    both = jax.jit(lambda: (integrate(guided), integrate(lambda *at: without(*at))))()  # a lambda is told nothing
    np.testing.assert_array_equal(*both)
    jax.effects_barrier()
    unneeded = lambda times: [s < 0.299 if moving == "semantic" else x > 0.701 for s, x in times]
    assert told and not any(unneeded(told)) and any(unneeded(untold))


def test_jumps_are_where_the_clocks_pass_the_start():
    at = lambda groups, start=0.1: guidance.jumps(FixedOffset(0.3), interval_start=start, interval_groups=groups)
    np.testing.assert_allclose(at("both"), (0.1, 0.4), atol=1e-6)
    np.testing.assert_allclose(at("tex"), (0.4,), atol=1e-6)
    np.testing.assert_allclose(at("sem"), (0.1,), atol=1e-6)
    assert at("both", 0.0) == ()
    with pytest.raises(SfdError, match="did you mean 'both'"):
        at("boths")
