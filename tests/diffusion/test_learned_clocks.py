"""Learned clocks: the curve's special cases and shape, and known answers of the corrected loss."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sfd_jax.diffusion.clocks import FixedOffset, Sequential, Synchronous, clocks_config, make_clocks
from sfd_jax.diffusion.learned_clocks import (
    Curve,
    Learned,
    LocalWeights,
    TrainedCurve,
    at_tau,
    corrected_loss,
)
from sfd_jax.errors import SfdError
from sfd_jax.latents import LatentLayout

LAYOUT = LatentLayout(2, 2)
STRAIGHT = (1.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize("clocks, lead", [(FixedOffset(0.3), 0.3), (Synchronous(), 0.0), (Sequential(), 1.0)])
def test_the_pairs_of_the_paper_are_curves(clocks, lead):
    place = np.linspace(0, 3, 61, dtype=np.float32)
    tau = np.interp(place, [0, 1, 2, 3], [0, lead, 1, 1 + lead]).astype(np.float32)
    of_curve = Curve(lead, lead, STRAIGHT).times(place)
    np.testing.assert_allclose(of_curve, clocks.times(jnp.asarray(tau)), atol=3e-7)
    frozen = Learned(lead, lead)
    assert len(frozen.breakpoints) == len(clocks.breakpoints)
    times = np.array(frozen.times(jnp.linspace(0, 1, 41)))
    np.testing.assert_allclose(times[1], np.interp(times[0] + times[1], *_sum_and_texture(clocks)), atol=2e-6)


def _sum_and_texture(clocks):
    """The curve as texture over the sum of both times, which rises everywhere."""
    semantic, texture = map(np.array, clocks.times(jnp.linspace(0, clocks.tau_end, 14001)))
    return semantic + texture, texture


def test_random_curves_are_monotone_and_convex_and_run_at_constant_speed():
    start = Learned(energy_ratio=2.0)
    trained = TrainedCurve(start, gain=10.0)
    for seed in range(2):
        rng = np.random.default_rng(seed)
        draw = lambda shape, rng=rng: jnp.asarray(0.3 * rng.standard_normal(shape), jnp.float32)
        bound = trained.bind({"wait": draw(()), "rest": draw(()), "shape": draw((4,))})
        semantic, texture = (np.diff(np.array(t)) for t in jax.jit(bound.times)(jnp.linspace(0, 3, 301)))
        assert semantic.min() >= 0 and texture.min() >= 0
        assert (semantic[:-1] * texture[1:] - semantic[1:] * texture[:-1]).min() > -1e-8  # turns to the left only

        frozen = bound.freeze()
        assert make_clocks(clocks_config(frozen)) == frozen
        tau = jnp.linspace(0, 1, 1001)
        stage = jnp.searchsorted(jnp.asarray(frozen.breakpoints), tau).astype(jnp.int32)
        times, rates = map(np.array, jax.jit(lambda tau, f=frozen, s=stage: (f.times(tau), f.rates(tau, s)))(tau))
        np.testing.assert_allclose(times[:, -1], 1, atol=1e-6)
        speed = rates[0] ** 2 + 2 * rates[1] ** 2
        np.testing.assert_allclose(speed / 3, float(frozen.curve.kinetic_energy(2.0)), rtol=1e-3)
        np.testing.assert_allclose(np.trapezoid(rates, tau), 1, atol=3e-3)
        np.testing.assert_allclose(frozen.wait, float(bound.curve.wait), atol=1e-4)
        np.testing.assert_allclose(times[0][times[1] == 0].max(), frozen.wait, atol=3e-3)  # tau in steps of 0.001


def test_a_shape_needs_four_weights():
    with pytest.raises(SfdError, match="give 4 weights of which one is positive"):
        Learned(shape=(1.0, 2.0))


def test_the_loss_of_a_curve_does_not_depend_on_how_tau_runs_and_is_the_usual_one_of_the_fixed_offset():
    """One pair of data and noise and any smooth predictor, integrated over a fine grid of tau."""
    n, rng = 20_000, np.random.default_rng(0)
    pair = rng.standard_normal((2, 1, 1, 1, 4)).astype(np.float32)
    data, noise = (jnp.broadcast_to(x, (n, 1, 1, 4)) for x in pair)
    labels = jnp.zeros(n, jnp.int32)
    predict = lambda x, s, t, _: jnp.sin(2 * x) + (s * (1 - t) + t**2)[:, None, None, None]
    weights, u = LocalWeights(), (jnp.arange(n) + 0.5) / n

    def of(clocks):
        @jax.jit
        def loss(tau):
            return corrected_loss(predict, data, noise, labels, *at_tau(clocks, tau), layout=LAYOUT, weights=weights)

        return float(loss(u * clocks.tau_end).mean())

    same = [of(FixedOffset(0.3)), of(Learned(0.3, 0.3, energy_ratio=4.0))]
    np.testing.assert_allclose(same, same[0], rtol=2e-3)
    trained = TrainedCurve(Learned(0.2, 0.5, (0.2, 0.3, 0.3, 0.2)))
    trained = trained.bind(trained.init(None))
    wait, rest, shape = jax.device_get(trained.curve)
    frozen = Learned(float(wait), float(rest), tuple(map(float, shape)))
    np.testing.assert_allclose(of(trained), of(frozen), rtol=2e-3)
    assert abs(of(frozen) / same[0] - 1) > 0.02

    # The usual loss at the released times, without groups that stand still.
    tau = 1.3 * jax.nn.sigmoid(jax.scipy.stats.norm.ppf(u))
    semantic, texture = FixedOffset(0.3).times(tau)
    t = LAYOUT.per_channel(texture, semantic)[:, None, None]
    error = (predict(t * data + (1 - t) * noise, semantic, texture, None) - (data - noise)) ** 2
    moving = LAYOUT.per_channel(jnp.where(tau > 0.3, 1.0, 0.0), jnp.where(tau < 1, 2.0, 0.0))[:, None, None]
    np.testing.assert_allclose(same[0], float(jnp.mean(error * moving)), rtol=2e-3)


def gaussian(covariance):
    """Return (draw, predict) for latents with a covariance and the velocity's conditional mean, which is linear."""
    covariance = jnp.asarray(covariance, jnp.float32)
    root = jnp.asarray(np.linalg.cholesky(np.asarray(covariance) + 1e-4 * np.eye(4)), jnp.float32)

    def draw(key, n):
        data, noise = jax.random.normal(key, (2, n, 1, 1, 4))
        return data @ root.T, noise

    def predict(x, semantic, texture, _):
        t = LAYOUT.per_channel(texture, semantic)
        of_x = t[:, :, None] * covariance[None] * t[:, None, :] + jax.vmap(jnp.diag)((1 - t) ** 2 + 1e-4)
        with_u = covariance[None] * t[:, None, :] - jax.vmap(jnp.diag)(1 - t)
        return jnp.einsum("bij,bj->bi", with_u, jnp.linalg.solve(of_x, x[:, 0, 0, :, None])[..., 0])[:, None, None]

    return draw, predict


INDEPENDENT = np.eye(4)
FUNCTION = np.array([[1, 0], [0.6, 0.8], [1, 0], [0, 1]])  # of two semantic channels; texture comes first
FUNCTION = FUNCTION @ FUNCTION.T
EQUAL = LocalWeights("uniform", 1.0, 0.0)


def likelihood(t_semantic, t_texture):
    """The weights whose loss is the log likelihood: by the chain rule the same for every curve."""
    return tuple(jnp.minimum(t / (1 - t), 30.0) for t in (t_semantic, t_texture))


@pytest.mark.parametrize(
    "covariance, weights, moves", [(INDEPENDENT, EQUAL, False), (FUNCTION, EQUAL, True), (FUNCTION, likelihood, False)]
)
def test_gradient_of_the_curve(covariance, weights, moves):
    draw, predict = gaussian(covariance)
    trained = TrainedCurve(Learned(0.3, 0.3, (0.7, 0.1, 0.1, 0.1)))
    params, labels = trained.init(None), jnp.zeros(256, jnp.int32)

    def loss(params, key):
        data, noise = draw(key, 256)
        tau = 3 * (jnp.arange(256) + jax.random.uniform(jax.random.fold_in(key, 1), (256,))) / 256
        places = at_tau(trained.bind(params), tau)
        return corrected_loss(predict, data, noise, labels, *places, layout=LAYOUT, weights=weights).mean()

    grads = jax.jit(lambda keys: jax.lax.map(lambda key: jax.grad(loss)(params, key), keys))
    grads = {name: np.array(grad) for name, grad in grads(jax.random.split(jax.random.key(0), 64)).items()}
    score = {name: grad.mean(axis=0) / (grad.std(axis=0) / 8) for name, grad in grads.items()}
    if not moves:
        assert max(np.abs(value).max() for value in score.values()) < 4, score
        return
    assert score["wait"] < -4 and score["rest"] < -4, score  # down the gradient is semantics first

    @jax.jit
    def learn(params):
        optimizer = optax.adam(0.1)

        def step(state, key):
            updates, opt_state = optimizer.update(jax.grad(loss)(state[0], key), state[1])
            return (optax.apply_updates(state[0], updates), opt_state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(jax.random.key(1), 100))[0][0]

    wait, rest, _ = trained.bind(learn(params)).curve
    assert wait > 0.7 and rest > 0.6, (wait, rest)
