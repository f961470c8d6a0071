"""The composed encoders: tiles, flips, posterior noise by index, PCA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sfd_jax.errors import SfdError
from sfd_jax.models import Network
from sfd_jax.models.encoders import DinoV2, Tiling, VisualEncoder
from sfd_jax.models.encoders.tiles import join_tiles, split_tiles
from sfd_jax.models.latent_encoder import LatentEncoder

TEXTURE = Network(
    "texture_vae",
    dict(ch=4, ch_mult=(1, 2), num_res_blocks=1, attention_levels=(), z_channels=3, norm_groups=2),
)
VISUAL = VisualEncoder(
    Network("dinov2", dict(width=8, depth=1, num_heads=2, image_size=6, patch_size=3, num_registers=1)),
    Tiling(tile_size=8, grid=4),
)
SEMANTIC = Network(
    "semantic_vae",
    dict(input_dim=8, bottleneck_dim=5, hidden_dim=6, transformer_blocks=1, transformer_heads=2),
)


@pytest.fixture(scope="module")
def params():
    networks = {"texture_vae": TEXTURE, "visual": VISUAL.network, "semantic_vae": SEMANTIC}
    random = np.random.default_rng(3)
    return {
        name: jax.tree.map(lambda leaf: random.normal(0, 0.3, leaf.shape).astype(np.float32), network.abstract_params())
        for name, network in networks.items()
    }


def images(count, size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), np.uint8)


def encode(params, pixels, index, **settings):
    encoder = LatentEncoder(TEXTURE, VISUAL, **{"semantic": SEMANTIC, "flips": False, **settings})
    return jax.jit(encoder)(params, pixels, jnp.asarray(index, jnp.int32))


def test_tiles_are_rows_of_parts_and_join_undoes_split():
    grid = jnp.arange(2 * 6 * 6 * 3).reshape(2, 6, 6, 3)
    parts = split_tiles(grid, 2)
    np.testing.assert_array_equal(parts[1], grid[0, :3, 3:])
    np.testing.assert_array_equal(parts[6], grid[1, 3:, :3])
    np.testing.assert_array_equal(join_tiles(parts, 2), grid)


def test_tilings_follow_from_pixels_and_from_latents_alike():
    for image_size, tile_size, grid, tiles in (
        (256, 256, 16, 1),
        (512, 256, 16, 2),
        (512, 512, 32, 1),
        (128, 256, 8, 1),
    ):
        tiling = Tiling.of_pixels(image_size, tile_size, downsampling=16)
        assert tiling == Tiling(min(image_size, tile_size), grid) and tiling.tiles_a_side(image_size) == tiles
        assert tiling == Tiling.of_latents(image_size, image_size // 16, tile_size // 16)
    assert Tiling.whole(32, 12, VISUAL.network) == Tiling(32, 4)
    for wrong, said in (
        (lambda: Tiling.of_pixels(512, 250, 16), "images of 250 px do not divide by 16, .*tile_size.: use 240 or 256"),
        (lambda: Tiling.of_pixels(400, 256, 16), "images of 400 px do not divide by 256, the tile_size"),
        (lambda: Tiling.of_latents(250, 16, 16), "images of 250 px do not divide by 16, the latents a side"),
        (lambda: Tiling.of_latents(384, 24, 16), "tile_grid=16 does not divide a grid of 24 latents"),
        (lambda: Tiling.whole(32, 10, VISUAL.network), "images of 10 px do not divide by 3"),
    ):
        with pytest.raises(SfdError, match=said):
            wrong()


def test_an_encoder_that_does_not_keep_to_the_grid_is_named(params, monkeypatch):
    monkeypatch.setattr(
        DinoV2, "patch_features", lambda self, pixels, grid: self.tokens(pixels, grid + 1)["patch_tokens"]
    )
    with pytest.raises(SfdError, match=r"'dinov2' gives patch features \(2, 25, 8\), expected \(2, 16, 8\)"):
        jax.eval_shape(VISUAL.features, params["visual"], images(2, 8))


def test_quarters_are_encoded_separately(params):
    """A 16 px image is four 8 px quarters for the visual encoder, and one image for the texture VAE."""
    pixels = images(2, 16)
    whole = encode(params, pixels, [0, 1], semantic_posterior="mean", repa=True)
    assert whole["texture"].shape == (2, 8, 8, 3) and whole["semantic"].shape == (2, 8, 8, 5)
    quarter = encode(params, pixels[:, 8:, :8], [0, 1], semantic_posterior="mean", repa=True)
    # Another batch shape may sum in another order: a few float32 ulp of values of order 1.
    np.testing.assert_allclose(whole["semantic"][:, 4:, :4], quarter["semantic"], atol=1e-5)
    features = whole["repa_features"].reshape(2, 8, 8, 8)[:, 4:, :4].reshape(2, 16, 8)
    # float16 keeps 11 bits.
    np.testing.assert_allclose(features, quarter["repa_features"], atol=4e-3)


def test_flips_are_the_encoding_of_the_mirrored_image(params):
    means = dict(texture_posterior="mean", semantic_posterior="mean")
    pixels = images(2, 8)
    both = encode(params, pixels, [0, 1], flips=True, **means)
    mirrored = encode(params, pixels[:, :, ::-1], [0, 1], **means)
    for group in ("texture", "semantic"):
        np.testing.assert_allclose(both[f"{group}_flip"], mirrored[group], atol=1e-6)
        assert np.abs(both[f"{group}_flip"] - both[group]).max() > 1e-3


def test_noise_depends_only_on_the_index(params):
    pixels = images(3, 8)
    batch = encode(params, pixels, [7, 8, 9])
    turned = encode(params, pixels[::-1], [9, 8, 7])
    for name, values in batch.items():
        np.testing.assert_array_equal(values, turned[name][::-1])
    same_image = encode(params, np.repeat(pixels[:1], 3, 0), [7, 8, 7])
    for group in ("texture", "semantic"):
        values = np.asarray(same_image[group])
        np.testing.assert_array_equal(values[0], values[2])
        assert (values[0] != values[1]).all()


def test_pca_projects_centred_features(params):
    random = np.random.default_rng(0)
    pca = {
        "mean": random.standard_normal(8).astype(np.float32),
        "components": random.standard_normal((8, 2)).astype(np.float32),
    }
    pixels = images(2, 8)
    found = encode({**params, "pca": pca}, pixels, [0, 1], semantic=None)
    features = jax.jit(VISUAL.features)(params["visual"], pixels / np.float32(127.5) - 1)
    expected = (np.asarray(features) - pca["mean"]) @ pca["components"]
    np.testing.assert_allclose(found["semantic"].reshape(2, 16, 2), expected, atol=1e-5)


def test_texture_only_and_unequal_grids(params):
    index = jax.ShapeDtypeStruct((1,), jnp.int32)
    alone = jax.eval_shape(LatentEncoder(TEXTURE, flips=False), params, images(1, 8), index)
    assert alone["semantic"].shape == (1, 4, 4, 0)
    with pytest.raises(SfdError, match="do not divide by 8, the tile_size"):
        jax.eval_shape(LatentEncoder(TEXTURE, VISUAL, SEMANTIC), params, images(1, 12), index)
    coarse = VisualEncoder(VISUAL.network, Tiling(tile_size=8, grid=2))
    with pytest.raises(SfdError, match="have a grid of 4 x 4 and semantic ones of 2 x 2"):
        jax.eval_shape(LatentEncoder(TEXTURE, coarse, SEMANTIC), params, images(1, 8), index)
