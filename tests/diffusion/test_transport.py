"""Paths, predictions, the stochastic equation and the likelihood, for data whose score is known: Gaussians.

With data of mean m and covariance S, and each channel at its own time t_c, x_t has mean A m and covariance A S A + B^2,
A = diag(alpha(t_c)), B = diag(sigma(t_c)). A network that returns that score, or the velocity or noise that belongs to
it, is exact, so samplers must return m and S, and likelihoods the density of N(m, S), for every pair of clocks.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sfd_jax.diffusion.clocks import FixedOffset, Sequential, Synchronous
from sfd_jax.diffusion.likelihood import log_likelihood, rademacher_by_row
from sfd_jax.diffusion.losses import Draws, LossConfig, velocity_loss
from sfd_jax.diffusion.paths import DDPMPath, GVPPath, LinearPath, VPPath
from sfd_jax.diffusion.predictions import NoisePrediction, ScorePrediction, VelocityPrediction, velocity_from
from sfd_jax.diffusion.sampling import SolverConfig, sample
from sfd_jax.diffusion.sde import Diffusion, SDEConfig, noise_by_step, sample_sde
from sfd_jax.errors import SfdError
from sfd_jax.latents import LatentLayout

LAYOUT = LatentLayout(1, 1)
MEAN = np.array([0.5, -0.8], np.float32)
COVARIANCE = np.array([[1.3, -0.6], [-0.6, 0.7]], np.float32)  # texture and semantics depend on each other
PATHS = [LinearPath(), GVPPath(), VPPath(), DDPMPath()]
PREDICTIONS = [VelocityPrediction(), NoisePrediction(), ScorePrediction()]


def exact(path, prediction):
    """Return the network that predicts exactly; its conversions are closed-form means, not those of the package."""

    def network(latents, t_semantic, t_texture):
        t = prediction.clip(LAYOUT.per_channel(t_texture, t_semantic), path)  # (B,C)
        alpha, sigma = path.alpha(t), path.sigma(t)
        variance = alpha**2 * np.diag(COVARIANCE)[None] + sigma**2
        mixed = alpha[:, 0] * alpha[:, 1] * COVARIANCE[0, 1]
        away = latents.reshape(-1, 2) - alpha * MEAN[None]
        inverse = 1 / (variance[:, 0] * variance[:, 1] - mixed**2)
        whitened = (variance[:, ::-1] * away - mixed[:, None] * away[:, ::-1]) * inverse[:, None]
        if isinstance(prediction, ScorePrediction):
            out = -whitened
        elif isinstance(prediction, NoisePrediction):
            out = sigma * whitened
        else:
            data = MEAN[None] + (alpha * whitened) @ COVARIANCE
            out = path.d_alpha(t) * data + path.d_sigma(t) * sigma * whitened
        return out.reshape(latents.shape)

    return network


class DDPMTable(DDPMPath):
    """DDPM's schedule as its authors compute it: a table of 1,000 steps, read between them by linear interpolation."""

    TABLE = np.sqrt(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))

    def alpha(self, t):
        return jnp.interp(1000 * (1 - t) - 1, jnp.arange(1000), self.TABLE)

    def sigma(self, t):
        return jnp.interp(1000 * (1 - t) - 1, jnp.arange(1000), np.sqrt(1 - self.TABLE**2))


def test_the_ddpm_path_passes_through_the_steps():
    t = 1 - np.arange(1, 1001) / 1000
    np.testing.assert_allclose(DDPMPath().alpha(np.float32(t)), DDPMTable.TABLE, rtol=2e-6)
    np.testing.assert_allclose(DDPMPath().sigma(np.float32(t)), np.sqrt(1 - DDPMTable.TABLE**2), rtol=5e-5)
    assert DDPMPath().alpha(1.0) == 1 and DDPMPath().sigma(1.0) == 0


FLOWS = [
    (FixedOffset(0.3), LinearPath(), VelocityPrediction()),
    (FixedOffset(0.3), GVPPath(), ScorePrediction()),
    (Sequential(), GVPPath(), NoisePrediction()),
    (Synchronous(), VPPath(), ScorePrediction()),
    (Synchronous(), DDPMPath(), NoisePrediction()),
]


@pytest.mark.parametrize(("clocks", "path", "prediction"), FLOWS)
def test_the_flow_of_an_exact_network_gives_the_data(clocks, path, prediction):
    """The affine flow is known from three starts; its image of N(0, 1) has the data's mean and covariance."""
    network = exact(DDPMTable() if isinstance(path, DDPMPath) else path, prediction)
    velocity_fn = velocity_from(network, prediction, path, LAYOUT)
    start = jnp.concatenate([jnp.zeros((1, 2)), jnp.eye(2)]).reshape(3, 1, 1, 2)
    config = SolverConfig(solver="rk4", num_steps=100)
    ends, _ = jax.jit(lambda x: sample(velocity_fn, x, layout=LAYOUT, clocks=clocks, solver=config))(start)
    ends = np.asarray(ends, np.float64).reshape(3, 2)
    jacobian = ends[1:] - ends[0]
    # VP and DDPM start from alpha(0) = 0.006 instead of 0, and eps = 1e-3 cuts off the ends of their paths.
    bound = 2e-2 if path.steep_end else 3e-3
    np.testing.assert_allclose(ends[0], MEAN, atol=bound)
    np.testing.assert_allclose(jacobian.T @ jacobian, COVARIANCE, atol=bound)


SDES = [
    (FixedOffset(0.3), LinearPath(), VelocityPrediction(), "sigma", "increasing_decreasing", "mean", "euler"),
    (Sequential(), GVPPath(), ScorePrediction(), "decreasing", "linear", "tweedie", "euler"),
    (Synchronous(), VPPath(), NoisePrediction(), "sbdm", "constant", "euler", "heun"),
    (FixedOffset(0.3), LinearPath(), NoisePrediction(), "constant", "sigma", "none", "heun"),
    (FixedOffset(0.02), GVPPath(), VelocityPrediction(), "linear", "sbdm", "mean", "euler"),
]


def run_sde(case, start, noises, num_steps):
    clocks, path, prediction, texture, semantic, last_step, method = case
    config = SDEConfig(method, num_steps, Diffusion(texture), Diffusion(semantic), last_step, last_step_size=0.01)
    velocity_fn = velocity_from(exact(path, prediction), prediction, path, LAYOUT)
    options = dict(layout=LAYOUT, clocks=clocks, path=path, config=config, first_t=prediction.interval(path)[0])
    return jax.jit(lambda x: sample_sde(velocity_fn, x, noises, **options))(start)


@pytest.mark.parametrize("case", SDES, ids=lambda case: "-".join(case[3:]))
def test_the_sde_of_an_exact_network_gives_the_data(case):
    """Samples are affine in start and noise, so one row for each impulse gives mean and covariance exactly.

    There is no sampling error, only that of the steps, of first order: 0.003 to 0.005 long, the last one 0.01.
    """
    num_steps = 400
    rows = jnp.arange(3 + 2 * (num_steps + 5))
    impulse = lambda first: (rows[:, None] == first + jnp.arange(2)[None]).astype(jnp.float32)[:, None, None, :]
    ends = run_sde(case, impulse(1), lambda step: impulse(3 + 2 * step), num_steps)
    ends = np.asarray(ends, np.float64).reshape(-1, 2)
    responses = ends[1:] - ends[0]
    np.testing.assert_allclose(ends[0], MEAN, atol=0.02)
    np.testing.assert_allclose(responses.T @ responses, COVARIANCE, atol=0.02)


def test_the_noise_of_the_sde_is_standard_normal_and_independent():
    """By sampling: mean and covariance within five standard errors of 5,000 samples, and 0.04 of 100 steps."""
    count = 5_000
    start = jax.random.normal(jax.random.key(0), (count, 1, 1, 2))
    noises = noise_by_step(jax.random.key(1), jnp.arange(count), (1, 1, 2))
    samples = np.asarray(run_sde(SDES[0], start, noises, 100), np.float64).reshape(-1, 2)
    variance = np.diag(COVARIANCE)
    np.testing.assert_array_less(np.abs(samples.mean(0) - MEAN), 5 * np.sqrt(variance / count) + 0.04)
    error = np.sqrt((np.outer(variance, variance) + COVARIANCE**2) / count)
    np.testing.assert_array_less(np.abs(np.cov(samples.T) - COVARIANCE), 5 * error + 0.04)


def test_a_sample_of_the_sde_depends_on_its_row_alone():
    noise = lambda rows: noise_by_step(jax.random.key(1), jnp.asarray(rows), (1, 1, 2))
    whole = run_sde(SDES[0], jnp.zeros((6, 1, 1, 2)), noise(range(6)), 10)
    part = run_sde(SDES[0], jnp.zeros((2, 1, 1, 2)), noise([4, 1]), 10)
    np.testing.assert_array_equal(part, whole[np.array([4, 1])])
    assert len(np.unique(whole[..., 0])) == 6


@pytest.mark.parametrize(
    ("clocks", "path", "prediction", "solver"),
    [
        (FixedOffset(0.3), LinearPath(), VelocityPrediction(), "dopri5"),
        (Sequential(), GVPPath(), VelocityPrediction(), "rk4"),
        (Synchronous(), VPPath(), ScorePrediction(), "rk4"),
    ],
)
def test_the_likelihood_of_an_exact_network_is_the_density(clocks, path, prediction, solver):
    """The mean over all probes, two up to sign, is the trace itself."""
    data = np.array([[0.5, -0.8], [2.0, -1.5], [-1.0, 1.0]], np.float32).reshape(3, 1, 1, 2)
    velocity_fn = velocity_from(exact(path, prediction), prediction, path, LAYOUT)
    config = SolverConfig() if solver == "dopri5" else SolverConfig(solver=solver, num_steps=100)
    go = jax.jit(lambda probe: log_likelihood(velocity_fn, data, probe, layout=LAYOUT, clocks=clocks, solver=config)[0])
    ones = jnp.ones((3, 1, 1, 2))
    ours = (go(ones) + go(ones.at[..., 1].set(-1))) / 2
    away = data.reshape(3, 2) - MEAN
    density = -np.log(2 * np.pi) - np.log(np.linalg.det(COVARIANCE)) / 2
    density -= np.sum(away @ np.linalg.inv(COVARIANCE) * away, axis=1) / 2
    # As above: the ends of the VP path are cut off.
    np.testing.assert_allclose(ours, density, atol=3e-2 if isinstance(path, VPPath) else 1e-3)


def test_probes_depend_on_the_row_alone():
    probe = lambda rows: rademacher_by_row(jax.random.key(0), jnp.asarray(rows), (4, 4, 2))
    np.testing.assert_array_equal(probe([5, 2]), probe(range(8))[jnp.array([5, 2])])
    assert set(np.unique(probe(range(8)))) == {-1, 1}


# --- The loss with two clocks ------------------------------------------------------------------------


def loss(config, t, predict=None):
    data, noise = jax.random.normal(jax.random.key(2), (2, len(t), 2, 2, 2))
    draws = Draws(noise, jnp.asarray(t, jnp.float32), jnp.zeros(len(t), jnp.int32))
    predict = predict or (lambda latents, *_: jnp.sin(latents))
    terms = velocity_loss(predict, data, draws, layout=LAYOUT, clocks=FixedOffset(0.3), config=config)
    return terms, data, noise


PLAIN = LossConfig(cosine_weight=0.0, repa_weight=0.0, semantic_weight=1.0, label_dropout=0.0)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
@pytest.mark.parametrize("prediction", PREDICTIONS, ids=lambda prediction: type(prediction).__name__)
def test_the_true_answer_has_no_loss(path, prediction):
    """Also at both ends, where a clock waits, and on every path: the loss must be finite there."""
    t = [0.0, 0.1, 0.5, 0.9, 1.0]
    _, data, noise = loss(PLAIN, t)

    def predict(latents, t_semantic, t_texture, labels):
        at = prediction.clip(LAYOUT.per_channel(t_texture, t_semantic)[:, None, None, :], path)
        np.testing.assert_allclose(latents, path.alpha(at) * data + path.sigma(at) * noise, atol=1e-6)
        if isinstance(prediction, VelocityPrediction):
            return path.d_alpha(at) * data + path.d_sigma(at) * noise
        return noise if isinstance(prediction, NoisePrediction) else -noise / path.sigma(at)

    config = dataclasses.replace(PLAIN, path=path, prediction=prediction)
    np.testing.assert_allclose(loss(config, t, predict)[0].velocity, 0, atol=1e-8)
    assert (np.asarray(loss(config, t)[0].velocity) > 0.01).all()


@pytest.mark.parametrize("weight", ["velocity", "likelihood"])
def test_each_group_is_weighted_at_its_own_clock_and_not_where_it_waits(weight):
    config = dataclasses.replace(PLAIN, path=GVPPath(), prediction=NoisePrediction(weight=weight))
    terms, _, _ = loss(config, [0.1, 0.5])  # tau = 0.13: texture waits at 0; tau = 0.65: times 0.65 and 0.35

    def expected(t):
        alpha, sigma = np.sin(np.pi / 2 * t), np.cos(np.pi / 2 * t)
        g = np.pi / 2 * (sigma / alpha * sigma**2 + sigma * alpha)
        return (g / sigma) ** 2 if weight == "velocity" else g / sigma**2

    semantic, texture = np.asarray(terms.error_semantic), np.asarray(terms.error_texture)
    expected = [expected(0.13) * semantic[0], expected(0.65) * semantic[1] + expected(0.35) * texture[1]]
    np.testing.assert_allclose(terms.velocity, np.array(expected) / 2, rtol=1e-5)


def test_unknown_values_are_refused():
    with pytest.raises(SfdError, match="form"):
        Diffusion("quadratic")
    with pytest.raises(SfdError, match="weight"):
        NoisePrediction(weight="velocities")
    with pytest.raises(SfdError, match="staged"):
        solver = SolverConfig(mode="released")
        ones = jnp.ones((1, 1, 1, 2))
        log_likelihood(lambda x, *_: x, ones, ones, layout=LAYOUT, clocks=Synchronous(), solver=solver)
