"""The tasks other than diffusion: each loss against numpy, and their checkpoints as the commands read them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sfd_jax.diffusion.losses import cosine_distance
from sfd_jax.distributed import make_mesh
from sfd_jax.errors import SfdError
from sfd_jax.models import Network, SemanticVAEConfig, TextureVAEConfig
from sfd_jax.models.encoders import DinoV2Config
from sfd_jax.randomness import keys_by_row, normal_by_row
from sfd_jax.training import OptimizerConfig, TrainConfig, fit, load_params
from sfd_jax.training.semantic_vae import SemanticVAELoss, semantic_vae_task
from sfd_jax.training.terms import cross_entropy, gaussian_kl, hits
from sfd_jax.training.texture_vae import TextureVAELoss, texture_vae_task
from sfd_jax.training.visual_encoder import VisualEncoderLoss, shift_and_scale, visual_encoder_task


def test_terms_by_hand():
    # KL of N(1, 1) is 1/2 an element; of N(0, e) it is (e - 1 - 1) / 2.
    mean, logvar = jnp.zeros((2, 3, 5)).at[0].set(1.0), jnp.zeros((2, 3, 5)).at[1].set(1.0)
    np.testing.assert_allclose(gaussian_kl(mean, logvar), [7.5, 7.5 * (np.e - 2)], rtol=1e-5)

    a = jnp.array([[[1.0, 0.0], [0.0, 2.0]]])  # (1, 2 tokens, 2 features)
    b = jnp.array([[[3.0, 0.0], [0.0, -1.0]]])
    np.testing.assert_allclose(cosine_distance(a, b, 2), [1.0])  # parallel and opposite: (0 + 2) / 2
    np.testing.assert_allclose(cosine_distance(a, 0 * a, 1), [1.0])
    assert np.isfinite(jax.grad(lambda x: cosine_distance(x, b, 1).sum())(0 * a)).all()

    logits = jnp.log(jnp.array([[0.7, 0.2, 0.1]]))
    expected = -(0.9 * np.log(0.2) + 0.1 * np.log([0.7, 0.2, 0.1]).mean())
    np.testing.assert_allclose(cross_entropy(logits, jnp.array([1]), 0.1), [expected], rtol=1e-6)
    assert hits(jnp.array([[0.0, 1.0], [2.0, 1.0]]), jnp.array([1, 1])) == (1, 2)


@pytest.mark.parametrize("axis", ["token", "feature"])
def test_semantic_vae_loss(axis):
    network = Network("semantic_vae", SemanticVAEConfig(arch="linear", input_dim=7, bottleneck_dim=3))
    weights = SemanticVAELoss(mse_weight=1.5, l1_weight=0.5, cosine_weight=2.0, cosine_axis=axis, kl_weight=0.1)
    task = semantic_vae_task(network, weights)
    params, key = task.init(jax.random.key(1)), jax.random.key(2)
    features = np.random.default_rng(0).standard_normal((2, 5, 7)).astype(np.float32)
    loss, metrics = task.loss(params, {"features": jnp.asarray(features), "row_indices": jnp.arange(2)}, key)

    mean, logvar = (np.asarray(x) for x in network.apply(params, features, method="encode"))
    latents = mean + np.exp(logvar / 2) * np.asarray(normal_by_row(key, jnp.arange(2), mean.shape[1:]))
    out = np.asarray(network.apply(params, jnp.asarray(latents), method="decode"))
    along = {"token": 1, "feature": 2}[axis]
    norms = np.linalg.norm(out, axis=along) * np.linalg.norm(features, axis=along)
    cosine = (1 - (out * features).sum(along) / norms).mean()
    kl = (0.5 * (mean**2 + np.exp(logvar) - 1 - logvar)).sum((1, 2)).mean()
    expected = 1.5 * ((out - features) ** 2).mean() + 0.5 * np.abs(out - features).mean() + 2 * cosine + 0.1 * kl
    np.testing.assert_allclose(loss, expected, rtol=1e-5)  # float32 sums in another order
    np.testing.assert_allclose(metrics["kl"], kl, rtol=1e-5)
    assert metrics["cosine_token"] != metrics["cosine_feature"]


def test_semantic_vae_without_posterior_and_with_classifier():
    network = Network(
        "semantic_vae", SemanticVAEConfig(arch="linear", input_dim=7, bottleneck_dim=3, variational=False)
    )
    task = semantic_vae_task(network, SemanticVAELoss(classification_weight=2.0, num_classes=4))
    params = task.init(jax.random.key(1))
    assert params.keys() == {"network", "heads"}
    batch = {"features": jnp.ones((2, 5, 7)), "labels": jnp.array([0, 3]), "row_indices": jnp.arange(2)}
    loss, metrics = task.loss(params, batch, jax.random.key(0))
    assert "kl" not in metrics
    parts = metrics["mse"] + metrics["cosine_token"] + 2 * metrics["classification"]
    np.testing.assert_allclose(loss, parts, rtol=1e-6)
    with pytest.raises(SfdError, match="classification_weight=0.5 needs loss.num_classes"):
        SemanticVAELoss(classification_weight=0.5)
    with pytest.raises(SfdError, match="cosine_axis 'tokens'"):
        SemanticVAELoss(cosine_axis="tokens")


def test_texture_vae_loss():
    config = TextureVAEConfig(z_channels=2, ch=4, ch_mult=(1, 1), num_res_blocks=1, norm_groups=2)
    network = Network("texture_vae", config)
    weights = TextureVAELoss(l1_weight=0.5, mse_weight=2.0, kl_weight=0.01, perceptual_weight=3.0)
    task = texture_vae_task(network, weights, perceptual=lambda a, b: jnp.full(a.shape[0], 7.0))
    params, key = task.init(jax.random.key(1)), jax.random.key(2)
    pixels = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 6, 6, 3)).astype(np.float32))
    loss, metrics = task.loss(params, {"pixels": pixels, "row_indices": jnp.arange(2)}, key)

    noise = normal_by_row(key, jnp.arange(2), (3, 3, 2))
    out, mean, logvar = (np.asarray(x) for x in network.apply(params, pixels, noise))
    kl = (0.5 * (mean**2 + np.exp(logvar) - 1 - logvar)).sum((1, 2, 3)).mean()
    error = out - np.asarray(pixels)
    expected = 0.5 * np.abs(error).mean() + 2 * (error**2).mean() + 0.01 * kl + 3 * 7
    np.testing.assert_allclose(loss, expected, rtol=1e-5)  # float32 sums in another order
    assert metrics["perceptual"] == 7.0


@pytest.mark.slow
def test_lpips_alone_trains_a_texture_vae():
    config = TextureVAEConfig(z_channels=2, ch=4, ch_mult=(1, 1), num_res_blocks=1, norm_groups=2)
    network, lpips = Network("texture_vae", config), Network("lpips", dict(channels=(5, 7), depths=(1, 2)))
    rng = np.random.default_rng(0)
    frozen = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), jnp.float32), lpips.abstract_params()
    )
    frozen["weights"] = jax.tree.map(jnp.abs, frozen["weights"])
    frozen["slices"]["0"]["0"]["bias"] -= 1.0  # all channels are 0 at many positions: no NaN may come from there
    weights = TextureVAELoss(l1_weight=0.0, mse_weight=0.0, kl_weight=0.0, perceptual_weight=1.0)
    task = texture_vae_task(network, weights, lambda ours, theirs, params: lpips.apply(params, ours, theirs), frozen)
    pixels = rng.uniform(-1, 1, (4, 16, 16, 3)).astype(np.float32)
    batch = {"pixels": jnp.asarray(pixels), "row_indices": jnp.arange(4)}
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(params, state):
        (loss, metrics), grads = jax.value_and_grad(task.loss, has_aux=True)(params, batch, jax.random.key(2), frozen)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, loss, metrics, grads

    params = task.init(jax.random.key(1))
    state, losses = optimizer.init(params), []
    for _ in range(20):
        params, state, loss, metrics, grads = step(params, state)
        losses.append(float(loss))
        assert metrics["perceptual"] == loss
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    assert losses[-1] < 0.8 * losses[0]
    # The gradient reaches the encoder's first convolution.
    for kernel in (grads["decoder"]["conv_out"], grads["decoder"]["conv_in"], grads["encoder"]["conv_in"]):
        assert np.abs(kernel["kernel"]).max() > 0


KEYS = keys_by_row(jax.random.key(0), jnp.arange(64))


def test_shift_and_scale_moves_within_bounds():
    pixels = -np.ones((64, 11, 11, 3), np.float32)
    pixels[:, 5, 5] = 1.0
    keep = shift_and_scale(KEYS, jnp.asarray(pixels), 0.0, 0.0)
    np.testing.assert_allclose(keep, pixels, atol=1e-6)
    moved = np.asarray(shift_and_scale(KEYS, jnp.asarray(pixels), 2.0, 0.0)) + 1
    assert moved.min() > -1e-6 and moved.max() < 2 + 1e-6
    mass = moved[..., 0].sum((1, 2))
    rows = (moved[..., 0].sum(2) * np.arange(11)[None]).sum(1) / mass  # bilinear keeps the centre of mass
    assert rows.min() < 3.5 and rows.max() > 6.5 and np.abs(rows - 5).max() <= 2 + 1e-4
    pixels[:, 3:8, 3:8] = 1.0
    larger = np.asarray(shift_and_scale(KEYS, jnp.asarray(pixels), 0.0, 0.5)) + 1
    area = larger[..., 0].sum((1, 2)) / 2 / 25  # grows with the square of the size
    assert 0.2 < area.min() < 0.4 and 1.9 < area.max() < 2.4


@pytest.mark.slow
def test_visual_encoder_learns_and_its_checkpoint_holds_only_its_network(tmp_path):
    config = DinoV2Config(width=8, depth=1, num_heads=2, image_size=8, patch_size=4, num_registers=2)
    network = Network("dinov2", config)
    task = visual_encoder_task(network, VisualEncoderLoss(num_classes=2, label_smoothing=0.1, shift=1.0))

    def batches(start):
        while True:
            rng = np.random.default_rng(start)
            start += 1
            labels = rng.integers(0, 2, 8).astype(np.int32)
            level = np.where(labels, 0.5, -0.5)[:, None, None, None]
            yield {"pixels": (level + 0.2 * rng.standard_normal((8, 8, 8, 3))).astype(np.float32), "labels": labels}

    train = TrainConfig(
        OptimizerConfig(learning_rate=0.01),
        steps=30,
        global_batch_size=8,
        log_every=10,
        checkpoint_every=20,
        ema_decay=0.5,
    )
    mesh = make_mesh(1, 1, devices=jax.devices()[:1])
    state = fit(task, batches, train, tmp_path, mesh=mesh, progress=False)
    _, metrics = task.loss(state.ema_params, {**next(batches(99)), "row_indices": jnp.arange(8)}, jax.random.key(0))
    assert metrics["accuracy_cls"] == metrics["accuracy_patches"] == (8, 8)

    params, metadata = load_params(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, params, jax.device_get(state.ema_params["network"]))
    assert Network(metadata["network"], metadata["network_config"]) == network
    resumed = fit(task, batches, train, tmp_path, mesh=mesh, progress=False)  # heads are restored too
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), jax.device_get(resumed))
