import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_testing import call, random_params

from sfd_jax.errors import SfdError
from sfd_jax.models import Network, SemanticVAEConfig, TextureVAEConfig, to_bytes
from sfd_jax.models.execution import Execution, executing
from sfd_jax.models.posterior import sample_posterior, split_moments

SEMANTIC = dict(
    input_dim=7,
    bottleneck_dim=3,
    hidden_dim=10,
    num_layers=3,
    num_res_blocks=1,
    transformer_heads=2,
    transformer_blocks=2,
)
TEXTURE = dict(z_channels=3, ch=4, ch_mult=(1, 2, 2), num_res_blocks=1, norm_groups=2)


def made(name, **config):
    network = Network(name, config)
    return network, random_params(network)


@pytest.mark.parametrize("arch", ["linear", "mlp", "resnet", "transformer"])
def test_only_the_transformer_mixes_tokens(arch):
    network, params = made("semantic_vae", **SEMANTIC, arch=arch)
    features = jax.random.normal(jax.random.key(1), (2, 5, 7))
    noise = jax.random.normal(jax.random.key(2), (2, 5, 3))
    out, mean, logvar = call(network, params, features, noise)
    assert out.shape == features.shape and mean.shape == logvar.shape == noise.shape
    # No positions: permuted tokens give permuted outputs (another order of sums in attention).
    order = jnp.array([3, 0, 4, 1, 2])
    permuted, _, _ = call(network, params, features[:, order], noise[:, order])
    np.testing.assert_allclose(permuted, out[:, order], rtol=1e-4, atol=1e-4)
    changed, _, _ = call(network, params, features.at[:, 0].add(1.0), noise)
    moved = np.any(np.abs(changed - out)[:, 1:] > 1e-5)
    assert moved == (arch == "transformer")
    assert np.any(np.abs(changed - out)[:, 0] > 1e-3)


def test_noise_samples_the_posterior():
    network, params = made("semantic_vae", **SEMANTIC)
    features = jax.random.normal(jax.random.key(1), (2, 5, 7))
    noise = jax.random.normal(jax.random.key(2), (2, 5, 3))
    out, mean, logvar = call(network, params, features, noise)
    wanted = call(network, params, mean + jnp.exp(logvar / 2) * noise, method="decode")
    np.testing.assert_allclose(out, wanted, rtol=1e-5, atol=1e-5)
    at_mean, _, _ = call(network, params, features)
    np.testing.assert_array_equal(at_mean, call(network, params, mean, method="decode"))


def test_plain_autoencoder_has_no_variance():
    network, params = made("semantic_vae", **SEMANTIC, variational=False)
    features = jax.random.normal(jax.random.key(1), (2, 5, 7))
    out, latents, logvar = call(network, params, features, jnp.ones((2, 5, 3)))
    assert logvar is None and latents.shape == (2, 5, 3)
    np.testing.assert_array_equal(out, call(network, params, latents, method="decode"))


def test_log_variance_is_clamped():
    mean, logvar = split_moments(jnp.array([[1.0, 2.0, -99.0, 99.0]]))
    np.testing.assert_array_equal(mean, [[1.0, 2.0]])
    np.testing.assert_array_equal(logvar, [[-30.0, 20.0]])
    sample = sample_posterior(jnp.array([3.0]), jnp.log(jnp.array([4.0])), jnp.array([-1.0]))
    np.testing.assert_allclose(sample, [1.0], rtol=1e-6)


@pytest.mark.parametrize("variant", ["ldm", "mar"])
def test_texture_vae_shapes_and_attention(variant):
    network, params = made("texture_vae", **TEXTURE, variant=variant)
    pixels = jax.random.uniform(jax.random.key(1), (2, 8, 12, 3), minval=-1.0)
    noise = jnp.zeros((2, 2, 3, 3))
    out, mean, logvar = call(network, params, pixels, noise)
    assert out.shape == pixels.shape and mean.shape == logvar.shape == noise.shape
    assert "attn" in params["encoder"]["down"]["2"] and "attn" not in params["encoder"]["down"]["1"]
    assert ("attn" in params["decoder"]["up"]["2"]) == (variant == "ldm")
    assert len(params["decoder"]["up"]["0"]["block"]) == 2


@pytest.mark.parametrize("attention", [(-1,), ()])
def test_equal_blocks_of_the_texture_vae_are_a_loop_or_unrolled(attention):
    network, params = made("texture_vae", **{**TEXTURE, "num_res_blocks": 3}, attention_levels=attention)
    pixels, results = jax.random.uniform(jax.random.key(1), (2, 8, 8, 3), minval=-1.0), {}
    for scan in (True, False):
        with executing(Execution(scan=scan)):
            program = jax.jit(network.apply).lower(params, pixels)
        # Three levels a side; one on each side begins with a block of another width.
        assert program.as_text().count("stablehlo.while") == (5 if scan else 0)
        results[scan] = program.compile()(params, pixels)
    for loop, unrolled in zip(results[True], results[False], strict=True):
        np.testing.assert_allclose(loop, unrolled, rtol=1e-4, atol=1e-4 * np.abs(unrolled).max())


def test_downsampling_pads_at_the_bottom_and_right():
    from flax import nnx

    from sfd_jax.models.texture_vae import Downsample, Upsample

    config = TextureVAEConfig(**TEXTURE)
    layer = Downsample(config, 1, rngs=nnx.Rngs(0))
    # A kernel that picks its last tap reads pixel 2i + 2, which is padding for the last i.
    layer.conv.kernel[...] = jnp.zeros((3, 3, 1, 1)).at[2, 2].set(1.0)
    image = jnp.arange(16.0).reshape(1, 4, 4, 1)
    np.testing.assert_array_equal(layer(image)[0, :, :, 0], [[10.0, 0.0], [0.0, 0.0]])
    layer = Upsample(config, 1, rngs=nnx.Rngs(0))
    layer.conv.kernel[...] = jnp.zeros((3, 3, 1, 1)).at[1, 1].set(1.0)
    up = layer(jnp.array([[1.0, 2.0], [3.0, 4.0]]).reshape(1, 2, 2, 1))[0, :, :, 0]
    np.testing.assert_array_equal(up[1:3, 1:3], [[1.0, 2.0], [3.0, 4.0]])
    np.testing.assert_array_equal(up[:2, :2], np.ones((2, 2)))


def test_bytes_are_truncated_from_an_offset_of_128():
    pixels = jnp.array([-2.0, -1.0, -0.999, 0.0, 0.9999, 1.0, 2.0])
    # 127.5 x + 128: -127, 0.5, 0.6275, 128, 255.487, 255.5, 383
    np.testing.assert_array_equal(to_bytes(pixels), [0, 0, 0, 128, 255, 255, 255])
    assert to_bytes(pixels).dtype == jnp.uint8


def test_bfloat16_is_near_float32():
    network, params = made("texture_vae", **TEXTURE)
    half = Network("texture_vae", {**TEXTURE, "compute_dtype": "bfloat16"})
    pixels = jax.random.uniform(jax.random.key(1), (1, 8, 8, 3), minval=-1.0)
    mean, _ = call(network, params, pixels, method="encode")
    rounded, _ = call(half, params, pixels, method="encode")
    assert rounded.dtype == jnp.float32
    # 2^-9 a rounding, through a dozen layers.
    assert float(jnp.max(jnp.abs(mean - rounded))) < 0.05 * float(jnp.max(jnp.abs(mean)))


def test_released_parameter_counts():
    # Totals of the released state dicts (semvae_full and vae_full in the parity pack).
    assert Network("semantic_vae", {}).num_params() == 57_924_896
    assert Network("texture_vae", {}).num_params() == 69_836_067


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: SemanticVAEConfig(arch="transfomer"), "transformer"),
        (lambda: SemanticVAEConfig(transformer_heads=5), "transformer_heads"),
        (lambda: TextureVAEConfig(ch=20), "norm_groups"),
        (lambda: TextureVAEConfig(variant="sd"), "mar"),
        (lambda: TextureVAEConfig(attention_levels=(5,)), "5 levels"),
    ],
)
def test_impossible_configs_are_refused(make, message):
    with pytest.raises(SfdError, match=message):
        make()


def test_images_that_do_not_divide_are_refused():
    network, params = made("texture_vae", **TEXTURE)
    with pytest.raises(SfdError, match="downsampling"):
        call(network, params, jnp.zeros((1, 10, 8, 3)), method="encode")
