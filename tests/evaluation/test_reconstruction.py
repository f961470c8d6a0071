"""Texture VAE metrics against plain implementations of their definitions."""

import jax
import numpy as np
import pytest

from sfd_jax.distributed import make_mesh
from sfd_jax.errors import SfdError
from sfd_jax.evaluation import Extractor, image_set_of
from sfd_jax.evaluation.reconstruction import evaluate_reconstruction, psnr, ssim
from sfd_jax.models import Network

GENERATOR = np.random.default_rng(0)
IMAGES = GENERATOR.integers(0, 256, (13, 16, 24, 3), dtype=np.uint8)
LPIPS = dict(channels=(3, 5), depths=(1, 2))


def random_checkpoint(name, config, seed):
    network = Network(name, config)
    leaves, tree = jax.tree.flatten(network.abstract_params())
    generator = np.random.default_rng(seed)
    leaves = [
        (generator.standard_normal(x.shape) / np.sqrt(max(1, np.prod(x.shape[:-1])))).astype(np.float32) for x in leaves
    ]
    return jax.tree.unflatten(tree, leaves), {"network": name, "network_config": network.config_dict()}


def extractor():
    weights = np.random.default_rng(1).standard_normal((16 * 24 * 3, 4)).astype(np.float32) / 100
    return Extractor("stand-in", {"w": weights}, lambda p, x: {"features": x.reshape(len(x), -1) @ p["w"]})


def test_psnr_by_hand():
    black = np.zeros((2, 4, 4, 3), np.uint8)
    other = black.copy()
    other[0] = 255  # the largest error: 0 dB
    other[1] = 16  # 20 log10(255 / 16)
    np.testing.assert_allclose(psnr(black, other), [0.0, 20 * np.log10(255 / 16)], atol=1e-5)
    assert np.isfinite(psnr(black, black)).all()


def test_ssim_by_its_definition():
    a = GENERATOR.uniform(-1, 1, (2, 13, 17, 3)).astype(np.float32)
    b = np.clip(a + 0.3 * GENERATOR.standard_normal(a.shape), -1, 1).astype(np.float32)
    gauss = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    window = np.outer(gauss, gauss)
    window = (window / window.sum())[..., None]
    values = []
    for x, y in zip(a.astype(np.float64), b.astype(np.float64), strict=True):
        here = []
        for i in range(13 - 10):
            for j in range(17 - 10):
                u, v = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
                mean_u, mean_v = (u * window).sum((0, 1)), (v * window).sum((0, 1))
                var_u, var_v = ((u - mean_u) ** 2 * window).sum((0, 1)), ((v - mean_v) ** 2 * window).sum((0, 1))
                cov = ((u - mean_u) * (v - mean_v) * window).sum((0, 1))
                c1, c2 = 0.02**2, 0.06**2
                here.append(
                    (2 * mean_u * mean_v + c1) * (2 * cov + c2) / ((mean_u**2 + mean_v**2 + c1) * (var_u + var_v + c2))
                )
        values.append(np.mean(here))
    np.testing.assert_allclose(ssim(a, b), values, rtol=1e-4)  # E[x^2] - E[x]^2 in float32
    np.testing.assert_allclose(ssim(a, a), 1.0, atol=1e-5)


def lpips_in_numpy(params, pixels, others):
    """LPIPS of single images (H, W, 3), by loops."""

    def convolve(x, kernel, bias):
        padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
        out = np.zeros((*x.shape[:2], kernel.shape[-1]))
        for i in range(3):
            for j in range(3):
                out += padded[i : i + x.shape[0], j : j + x.shape[1]] @ kernel[i, j]
        return np.maximum(out + bias, 0)

    def features(x):
        x = (x - [-0.030, -0.088, -0.188]) / [0.458, 0.448, 0.450]
        found = []
        for i, name in enumerate(sorted(params["slices"])):
            if i:
                height, width = x.shape[0] // 2, x.shape[1] // 2
                x = x[: 2 * height, : 2 * width].reshape(height, 2, width, 2, -1).max(axis=(1, 3))
            for layer in sorted(params["slices"][name]):
                x = convolve(x, params["slices"][name][layer]["kernel"], params["slices"][name][layer]["bias"])
            found.append(x / (np.linalg.norm(x, axis=-1, keepdims=True) + 1e-10))
        return found

    return sum(
        ((u - v) ** 2 @ params["weights"][str(i)][0, 0]).mean()
        for i, (u, v) in enumerate(zip(features(pixels), features(others), strict=True))
    )


def test_lpips_by_its_definition():
    params, metadata = random_checkpoint("lpips", LPIPS, 2)
    network = Network("lpips", metadata["network_config"])
    a, b = GENERATOR.uniform(-1, 1, (2, 3, 11, 14, 3)).astype(np.float32)
    ours = np.asarray(network.apply(params, a, b))
    np.testing.assert_allclose(ours, [lpips_in_numpy(params, x, y) for x, y in zip(a, b, strict=True)], rtol=1e-5)
    np.testing.assert_array_equal(network.apply(params, a, a), np.zeros(3))


def test_lpips_of_vgg16_has_its_size():
    # VGG16's thirteen convolutions, and 64 + 128 + 256 + 512 + 512 weights.
    assert Network("lpips", {}).num_params() == 14_714_688 + 1472


@pytest.mark.slow
def test_reconstruction_is_measured_over_every_image_once():
    config = dict(ch=4, ch_mult=(1,), num_res_blocks=1, attention_levels=(), z_channels=3, norm_groups=2)
    vae = random_checkpoint("texture_vae", config, 3)
    lpips = random_checkpoint("lpips", LPIPS, 2)
    images = image_set_of("images", IMAGES)
    whole = evaluate_reconstruction(images, vae, extractor(), lpips, seed=5)
    assert set(whole) == {"rfid", "psnr", "ssim", "lpips"}
    mesh = make_mesh(devices=jax.devices()[:1])
    pieces = evaluate_reconstruction(images, vae, extractor(), lpips, seed=5, batch_size=5, mesh=mesh)
    for name, value in whole.items():
        # A byte may round differently: 1 of 15,000 by one step changes PSNR by about 1e-6 relative.
        assert pieces[name] == pytest.approx(value, rel=1e-4), name
    assert whole["psnr"] == pytest.approx(psnr_written_out(vae, seed=5), rel=1e-4)


def psnr_written_out(vae, seed):
    """Mean PSNR of posterior samples, the noise of image i depends on (seed, i) alone."""
    network = Network("texture_vae", vae[1]["network_config"])

    @jax.jit
    def reconstruct(params, pixels):
        mean, logvar = network.apply(params, pixels, method="encode")
        keys = [jax.random.fold_in(jax.random.key(seed), i) for i in range(len(pixels))]
        noise = jax.numpy.stack([jax.random.normal(key, mean.shape[1:]) for key in keys])
        return network.apply(params, mean + jax.numpy.exp(logvar / 2) * noise, method="decode")

    made = np.asarray(reconstruct(vae[0], IMAGES / np.float32(127.5) - 1))
    made = np.clip(127.5 * made + 128, 0, 255).astype(np.uint8)
    errors = ((made.astype(float) - IMAGES) ** 2).mean(axis=(1, 2, 3))
    return (10 * np.log10(255**2 / errors)).mean()


def test_other_networks_are_refused():
    lpips = random_checkpoint("lpips", LPIPS, 2)
    with pytest.raises(SfdError, match="holds 'lpips', expected 'texture_vae'"):
        evaluate_reconstruction(image_set_of("images", IMAGES), lpips, extractor())
