"""The loss: known answers, gradients at zero, and randomness by row of the batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sfd_jax.diffusion.clocks import Clocks, FixedOffset
from sfd_jax.diffusion.losses import (
    TERMS,
    Draws,
    LossConfig,
    LossTerm,
    cosine_similarity,
    draw,
    loss_metrics,
    make_terms,
    sample_time,
    spatial_norm,
    velocity_loss,
)
from sfd_jax.diffusion.paths import LinearPath, Path
from sfd_jax.errors import SfdError
from sfd_jax.latents import LatentLayout

LAYOUT = LatentLayout(3, 2)
CLOCKS = FixedOffset(0.3)
PLAIN = LossConfig(cosine_weight=0.0, repa_weight=0.0)


def batch(size=4, seed=0):
    keys = jax.random.split(jax.random.key(seed), 2)
    data, noise = (jax.random.normal(key, (size, 2, 7, 5)) for key in keys)
    t = jnp.linspace(0.05, 0.95, size)
    return data, Draws(noise, t, jnp.arange(size))


def loss(predict, config, **kwargs):
    data, draws = batch()
    return velocity_loss(predict, data, draws, layout=LAYOUT, clocks=CLOCKS, config=config, **kwargs)


def truth(latents, t_semantic, t_texture, labels):
    data, draws = batch()
    return data - draws.noise


def test_path_ends_at_noise_and_data():
    data, draws = batch()
    path, like = LinearPath(), jnp.ones((4, 1, 1, 1))
    np.testing.assert_array_equal(path.interpolate(data, draws.noise, 0 * like), draws.noise)
    np.testing.assert_array_equal(path.interpolate(data, draws.noise, like), data)
    np.testing.assert_array_equal(path.velocity(data, draws.noise, like), data - draws.noise)


def test_the_network_sees_each_group_at_its_own_clock():
    data, draws = batch()
    seen = []
    loss(lambda *args: seen.append(args) or truth(*args), PLAIN)
    latents, t_semantic, t_texture, labels = seen[0]
    np.testing.assert_allclose(t_semantic, np.minimum(1.3 * draws.t, 1), rtol=1e-6)
    np.testing.assert_allclose(t_texture, np.maximum(1.3 * draws.t - 0.3, 0), atol=1e-7)
    np.testing.assert_array_equal(labels, draws.labels)
    t = np.where(np.arange(5) < 3, t_texture[:, None], t_semantic[:, None])[:, None, None]
    np.testing.assert_allclose(latents, t * data + (1 - t) * draws.noise, atol=1e-6)


def test_a_perfect_prediction_has_no_loss():
    terms = loss(truth, LossConfig(repa_weight=0.0))
    np.testing.assert_array_equal(terms.velocity, np.zeros(4))
    np.testing.assert_allclose(terms.cosine, np.zeros(4), atol=2e-7)  # float32 near 1
    np.testing.assert_array_equal(terms.total, terms.velocity + terms.cosine)


def test_terms_by_hand():
    features = jax.random.normal(jax.random.key(5), (4, 14, 11))
    config = LossConfig(semantic_weight=3.0, cosine_weight=0.5, repa_weight=0.25, repa_kind="cos_mse")
    # Off by 1 in texture, by 2 in semantics; the projection is the opposite of the features.
    off = LAYOUT.per_channel(1.0, 2.0)[None, None, None, :]
    terms = loss(lambda *args: (truth(*args) + off, -features), config, repa_features=features)
    np.testing.assert_allclose(terms.velocity, np.full(4, (3 * 1 + 2 * 3 * 4) / 5), rtol=1e-5)
    np.testing.assert_allclose(terms.error_texture, np.ones(4), rtol=1e-5)
    np.testing.assert_allclose(terms.error_semantic, np.full(4, 4.0), rtol=1e-5)
    target = np.asarray(truth(*[None] * 4), np.float64)
    predicted = target + np.asarray(off)
    norms = np.linalg.norm(predicted, axis=-1) * np.linalg.norm(target, axis=-1)
    cosine = 1 - (predicted * target).sum(-1) / norms
    np.testing.assert_allclose(terms.cosine, cosine.mean((1, 2)), rtol=1e-5)
    repa = (2 + 4 * np.mean(np.square(features), (1, 2))) / 2
    np.testing.assert_allclose(terms.repa, repa, rtol=1e-5)
    total = terms.velocity + 0.5 * terms.cosine + 0.25 * terms.repa
    np.testing.assert_allclose(terms.total, total, rtol=1e-6)


def test_features_are_spatially_normalised_before_they_are_compared():
    rng = np.random.default_rng(1)
    features, projected = rng.standard_normal((2, 4, 14, 11)) * 3 + rng.standard_normal((2, 1, 1, 11)) * 5
    features[:, :, 4] = 2.0  # of one channel: only epsilon is left of the deviation
    half = features.astype(np.float16)  # as stored
    exact = half.astype(np.float64)
    mean, deviation = exact.mean(1, keepdims=True), exact.std(1, ddof=1, keepdims=True)
    wanted = (exact - 0.6 * mean) / (deviation + 1e-6)
    np.testing.assert_allclose(wanted[:, :, 4], 0.4 * 2.0 / 1e-6)
    np.testing.assert_allclose(jax.jit(spatial_norm)(half, 0.6), wanted, rtol=1e-5, atol=1e-5)

    config = LossConfig(repa_kind="mse", repa_spatial_norm=0.6)
    terms = loss(lambda *args: (truth(*args), projected), config, repa_features=half)
    np.testing.assert_allclose(terms.repa, np.mean((projected - wanted) ** 2, (1, 2)), rtol=1e-5)


def test_another_path():
    @dataclasses.dataclass(frozen=True)
    class Circle(Path):
        def alpha(self, t):
            return jnp.sin(t * jnp.pi / 2)

        def sigma(self, t):
            return jnp.cos(t * jnp.pi / 2)

    circle = Circle()
    data, draws = batch()

    def predict(latents, t_semantic, t_texture, labels):
        t = LAYOUT.per_channel(t_texture, t_semantic)[:, None, None, :]
        return circle.velocity(data, draws.noise, t)

    np.testing.assert_array_equal(loss(predict, dataclasses.replace(PLAIN, path=circle)).total, np.zeros(4))
    assert (loss(predict, PLAIN).total > 0.1).all()


def test_cosine_has_no_gradient_where_the_network_returns_zero():
    target = jax.random.normal(jax.random.key(0), (3, 5))
    grad = jax.grad(lambda x: cosine_similarity(x, target).sum())
    np.testing.assert_array_equal(grad(jnp.zeros((3, 5))), np.zeros((3, 5)))
    np.testing.assert_array_equal(cosine_similarity(jnp.zeros((3, 5)), target), np.zeros(3))
    # Elsewhere the gradient is the true one: orthogonal to the vector, of length sin / |x|.
    x = jax.random.normal(jax.random.key(1), (3, 5))
    slope = grad(x)
    np.testing.assert_allclose(jnp.sum(slope * x, -1), np.zeros(3), atol=1e-6)
    sine = jnp.sqrt(1 - cosine_similarity(x, target) ** 2)
    length = jnp.linalg.norm(slope, axis=-1) * jnp.linalg.norm(x, axis=-1)
    np.testing.assert_allclose(length, sine, rtol=1e-4)


def test_cosine_agrees_with_pytorch():
    torch = pytest.importorskip("torch", reason="needs the extra `torch`")
    a, b = (np.array(jax.random.normal(jax.random.key(i), (3, 5))) for i in (0, 1))
    a[0] *= 1e-9  # shorter than eps: both divide by eps
    theirs = torch.nn.functional.cosine_similarity(torch.from_numpy(a), torch.from_numpy(b), dim=-1)
    np.testing.assert_allclose(cosine_similarity(a, b), theirs, atol=1e-6)


def test_part_of_a_batch_draws_the_same_values():
    data = jnp.zeros((6, 2, 3, 5))
    labels = jnp.arange(6)
    make = lambda part, **kwargs: draw(
        jax.random.key(3), data[part], labels[part], config=LossConfig(label_dropout=0.5), null_label=9, **kwargs
    )
    whole, part = make(slice(None)), make(slice(4, 6), row_indices=jnp.arange(4, 6))
    for a, b in zip(whole, part, strict=True):
        np.testing.assert_array_equal(a[4:], b)
    assert len(np.unique(whole.noise)) == whole.noise.size  # no two samples share their noise


def test_sharding_does_not_change_the_draws():
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices: XLA_FLAGS=--xla_force_host_platform_device_count=8")
    data, labels = jnp.zeros((16, 2, 3, 5)), jnp.arange(16)
    make = jax.jit(lambda x, y: draw(jax.random.key(3), x, y, config=LossConfig(), null_label=99))
    rows = NamedSharding(Mesh(np.array(jax.devices()[:8]), "data"), PartitionSpec("data"))
    for a, b in zip(make(data, labels), make(*jax.device_put((data, labels), rows)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_label_dropout_and_times_have_their_distributions():
    size = 4000
    draws = draw(jax.random.key(0), jnp.zeros((size, 1, 1, 1)), jnp.zeros(size, int), config=LossConfig(), null_label=9)
    assert set(np.unique(draws.labels)) == {0, 9}
    # A tenth, within 5 standard deviations of a binomial.
    assert abs(np.mean(draws.labels == 9) - 0.1) < 5 * np.sqrt(0.09 / size)
    # sigmoid(N(0,1)) has quartiles sigmoid(-0.674), 1/2, sigmoid(0.674); 0.02 is 4 deviations.
    quartiles = np.quantile(draws.t, (0.25, 0.5, 0.75))
    np.testing.assert_allclose(quartiles, (0.3376, 0.5, 0.6624), atol=0.02)
    uniform = sample_time(jax.random.key(1), "uniform", (size,))
    np.testing.assert_allclose(np.quantile(uniform, (0.25, 0.5, 0.75)), (0.25, 0.5, 0.75), atol=0.03)


def test_metrics_by_quarter_of_each_clock_add_up():
    terms = loss(lambda *args: jnp.zeros_like(truth(*args)), PLAIN)
    metrics = loss_metrics(terms)
    for group in ("semantic", "texture"):
        quarters = [metrics[f"error_{group}_q{q}"] for q in (1, 2, 3, 4)]
        for i in (0, 1):
            np.testing.assert_allclose(sum(q[i] for q in quarters), metrics[f"error_{group}"][i], rtol=1e-6)
    # t = .05 .35 .65 .95: semantic clock .065 .455 .845 1, texture clock 0 .155 .545 .935
    assert [metrics[f"error_semantic_q{q}"][1] for q in (1, 2, 3, 4)] == [1, 1, 0, 2]
    assert [metrics[f"error_texture_q{q}"][1] for q in (1, 2, 3, 4)] == [2, 0, 1, 1]


def test_impossible_settings_are_refused():
    with pytest.raises(SfdError, match="did you mean 'cos_mse'"):
        LossConfig(repa_kind="cosmse")
    with pytest.raises(SfdError, match="loss.time"):
        LossConfig(time="normal")
    with pytest.raises(SfdError, match="label_dropout=1.5"):
        LossConfig(label_dropout=1.5)
    with pytest.raises(SfdError, match="repa_features"):
        loss(truth, LossConfig())
    with pytest.raises(SfdError, match="null label"):
        draw(jax.random.key(0), jnp.zeros((1, 1)), jnp.zeros(1), config=LossConfig(), null_label=None)


@dataclasses.dataclass(frozen=True)
class Energy(LossTerm):
    reads_hidden = True
    per_sample: bool = True

    def __call__(self, at):
        energy = jnp.sum(at.velocity**2, axis=(1, 2, 3)) + jnp.sum(at.projected, axis=(1, 2))
        return energy if self.per_sample else energy.mean()


def test_a_custom_term_is_weighted_and_logged():
    predict = lambda latents, *_: (jnp.ones_like(latents), jnp.ones((4, 4, 7)))
    plain, config = LossConfig(repa_weight=0.0), LossConfig(repa_weight=0.0, terms={"energy": Energy(0.5)})
    terms = loss(predict, config)
    assert config.reads_hidden and not plain.reads_hidden
    np.testing.assert_allclose(terms.terms["energy"], [70 + 28] * 4)
    np.testing.assert_allclose(terms.total, loss(predict, plain).total + 49, rtol=1e-6)
    assert [float(x) for x in loss_metrics(terms)["loss_energy"]] == [4 * 98, 4]
    with pytest.raises(
        SfdError, match=r"loss term 'energy' returns shape \(\) instead of one value per sample, \(4,\)"
    ):
        loss(predict, LossConfig(repa_weight=0.0, terms={"energy": Energy(per_sample=False)}))


@dataclasses.dataclass(frozen=True)
class Bent(Clocks):
    tau_end = 1.0
    breakpoints = ()

    def init(self, key):
        return {"bend": jnp.float32(0)}

    def times(self, tau):
        return tau, tau - jax.nn.sigmoid(self.params["bend"]) * tau * (1 - tau)


@dataclasses.dataclass(frozen=True)
class Haste(LossTerm):
    def __call__(self, at):
        rates = at.clocks.rates(at.draws.t * at.clocks.tau_end, jnp.zeros(len(at.data), jnp.int32))
        return sum(rate**2 for rate in rates)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_gradients_reach_the_parameters_of_clocks(weight):
    """Through the point on the path, the network's times and, in a term, the rates."""
    data, draws = batch()
    config = LossConfig(repa_weight=0.0, terms={"haste": Haste(weight)} if weight else {})
    predict = lambda latents, t_semantic, t_texture, labels: latents * t_texture[:, None, None, None]

    def total(bend):
        clocks = Bent().bind({"bend": bend})
        return velocity_loss(predict, data, draws, layout=LAYOUT, clocks=clocks, config=config).total.sum()

    bend, step = jnp.float32(0.3), 0.05
    difference = (total(bend + step) - total(bend - step)) / (2 * step)
    assert abs(difference) > 0.05
    np.testing.assert_allclose(jax.grad(total)(bend), difference, rtol=5e-3)


def test_terms_of_weight_0_are_left_out_and_wrong_ones_named(monkeypatch):
    monkeypatch.setitem(TERMS, "energy", Energy)
    assert make_terms({"energy": {"weight": 2.0}}) == {"energy": Energy(2.0)}
    assert make_terms({"energy": {"weight": 0.0}}) == {}
    with pytest.raises(SfdError, match="loss.terms.weight=-1.0"):
        make_terms({"energy": {"weight": -1.0}})
    with pytest.raises(SfdError, match="no loss terms 'enrgy': did you mean 'energy'"):
        make_terms({"enrgy": {}})
    monkeypatch.setitem(TERMS, "velocity", Energy)
    with pytest.raises(SfdError, match="the loss has a part called 'velocity' already"):
        LossConfig(terms=make_terms({"velocity": {}}))
