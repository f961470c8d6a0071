import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_testing import call, random_params

from sfd_jax.errors import SfdError
from sfd_jax.models import Network
from sfd_jax.models.encoders import ENCODERS, DinoV2Config, Tiling, VisualEncoder, dinov2_config
from sfd_jax.models.encoders.vit import IMAGENET, preprocess
from sfd_jax.models.inception import average_pool, max_pool_same
from sfd_jax.models.positions import rotary_of_patches, rotate
from sfd_jax.models.resize import resize_bicubic, resize_bilinear_tf1

TINY = dict(width=8, depth=2, num_heads=2, image_size=15, patch_size=5, num_registers=3)


@pytest.fixture(scope="module")
def encoder():
    network = Network("dinov2", TINY)
    return network, random_params(network)


def test_tokens_of_any_image_size(encoder):
    network, params = encoder
    images = jax.random.normal(jax.random.key(1), (2, 10, 20, 3))
    out = call(network, params, images)
    assert out["patch_tokens"].shape == (2, 8, 8)
    assert out["cls_token"].shape == (2, 8) and out["register_tokens"].shape == (2, 3, 8)
    with pytest.raises(SfdError, match="do not divide by 5, the encoder's patch_size"):
        call(network, params, images[:, :9])


def test_each_patch_has_its_token(encoder):
    # Without attention a token depends only on its own patch.
    network, params = encoder
    mute = {**params, "blocks": {**params["blocks"], "scale1": {"gamma": jnp.zeros((2, 8))}}}
    image = jax.random.normal(jax.random.key(1), (1, 10, 15, 3))
    out = call(network, mute, image)
    changed = call(network, mute, image.at[0, 7, 3].add(1.0))  # row 1, column 0: patch 3
    moved = np.any(changed["patch_tokens"] != out["patch_tokens"], axis=(0, 2))
    np.testing.assert_array_equal(np.flatnonzero(moved), [3])
    np.testing.assert_array_equal(changed["cls_token"], out["cls_token"])
    np.testing.assert_array_equal(changed["register_tokens"], out["register_tokens"])


def test_positions(encoder):
    network, params = encoder
    table = params["pos_embed"][:, 1:]
    np.testing.assert_array_equal(network.apply(params, 3, 3, method="positions"), table)
    # Every resize keeps a constant table.
    constant = {**params, "pos_embed": jnp.ones_like(params["pos_embed"])}
    resized = network.apply(constant, 2, 4, method="positions")
    np.testing.assert_allclose(resized, np.ones((1, 8, 8)), rtol=1e-6)
    # Without registers: no antialias, so another result.
    config = {**TINY, "num_registers": 0}
    bare = Network("dinov2", config)
    bare_params = {k: v for k, v in params.items() if k != "register_tokens"}
    assert np.any(
        np.abs(bare.apply(bare_params, 2, 2, method="positions") - network.apply(params, 2, 2, method="positions"))
        > 1e-3
    )
    images = jnp.ones((1, 15, 15, 3))
    assert call(bare, bare_params, images)["register_tokens"].shape == (1, 0, 8)


def test_every_parameter_but_the_mask_token_is_trained(encoder):
    network, params = encoder
    images = jax.random.normal(jax.random.key(1), (2, 15, 15, 3))

    def loss(params):
        out = network.apply(params, images)
        return jnp.mean(out["patch_tokens"] ** 4) + jnp.mean(out["cls_token"] ** 4)

    gradient = jax.jit(jax.grad(loss))(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.any(leaf) != (path[0].key == "mask_token"), path
    # Fresh weights give tokens that differ from patch to patch: training can start.
    fresh = call(network, jax.jit(network.init)(jax.random.key(2)), images)["patch_tokens"]
    assert float(jnp.std(fresh, axis=1).mean()) > 0.1


def test_preprocessing_of_a_constant_image():
    # Weights of a resize sum to one, so a constant stays constant: (0.75 - mean) / std.
    out = preprocess(jnp.full((1, 8, 12, 3), 0.5), 7)
    mean, std = np.array(IMAGENET, np.float32)
    wanted = (0.75 - mean) / std
    np.testing.assert_allclose(out, np.broadcast_to(wanted, (1, 7, 7, 3)), rtol=1e-5)


def test_bicubic_by_hand():
    # Doubling reads at quarter positions. On a ramp, a = -0.75 gives t^3 - 1.5 t^2 + 1.5 t there
    # (a = -0.5 would give t itself): 0.296875 at t = 0.25.
    ramp = jnp.broadcast_to(jnp.arange(8.0)[None, None, :, None], (1, 3, 8, 1))
    row = resize_bicubic(ramp, 3, 16)[0, 1, :, 0]
    np.testing.assert_allclose(row[7], 3 + 0.296875, rtol=1e-6)
    np.testing.assert_allclose(row[8], 3 + 0.703125, rtol=1e-6)


SIZES = dict(width=16, depth=1, num_heads=2, image_size=16, patch_size=4)


@pytest.mark.parametrize("name", sorted(ENCODERS))
def test_each_encoder_keeps_to_any_grid(name):
    """Through the seam of extraction and REPA: bytes in, tokens of each tile out, also at a size of no table."""
    network = Network(name, SIZES)
    params, encoder = random_params(network), VisualEncoder(network, Tiling(16, 6))
    images = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), np.uint8)
    features = jax.jit(encoder.features)(params, images)
    assert features.shape == (1, 144, 16)
    corner = jax.jit(encoder.features)(params, images[:, 16:, 16:])
    np.testing.assert_allclose(features.reshape(12, 12, 16)[6:, 6:].reshape(1, 36, 16), corner, atol=1e-5)


def test_pixels_that_fit_are_not_resized():
    pixels = jax.random.uniform(jax.random.key(0), (1, 8, 8, 3), minval=-1.0)
    text = jax.jit(lambda x: preprocess(x, 8)).lower(pixels).as_text()
    assert "dot_general" not in text
    np.testing.assert_array_equal(preprocess(pixels, 8, ((0.5,) * 3, (0.5,) * 3)), pixels)


def test_rotary_positions_turn_by_the_difference_of_places():
    # Of two patches the product of query and key depends on their distance; leading tokens are not turned.
    tables = rotary_of_patches(8, 3, 3, 2, 100.0)
    query, key = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))
    turn = lambda x: rotate(jnp.broadcast_to(x, (1, 11, 1, 8)), tables)[0, :, 0]
    products = jnp.einsum("ne,me->nm", turn(query), turn(key), precision="highest")
    np.testing.assert_allclose(products[:2, :2], products[0, 0], rtol=1e-5)
    np.testing.assert_allclose(products[2, 6], products[6, 10], rtol=1e-4)  # one row and column further
    assert abs(products[2, 3] - products[2, 5]) > 1e-3  # a column is not a row


def test_tensorflow_1_bilinear_by_hand():
    # Output i reads position i * 2 / 5; beyond the last pixel it is clamped.
    row = jnp.array([0.0, 10.0]).reshape(1, 1, 2, 1)
    out = resize_bilinear_tf1(jnp.repeat(row, 2, axis=1), 3, 5)
    np.testing.assert_allclose(out[0, 0, :, 0], [0, 4, 8, 10, 10], rtol=1e-6)
    assert out.shape == (1, 3, 5, 1)


def test_average_pool_leaves_padding_out():
    np.testing.assert_allclose(average_pool(jnp.ones((1, 4, 4, 2))), 1.0, rtol=1e-6)
    image = jnp.arange(9.0).reshape(1, 3, 3, 1)
    np.testing.assert_allclose(average_pool(image)[0, 0, 0, 0], (0 + 1 + 3 + 4) / 4, rtol=1e-6)
    np.testing.assert_array_equal(max_pool_same(-image)[0, 0, 0, 0], 0.0)


def test_released_parameter_counts():
    # ViT-B/14 with registers and Inception: totals of the released state dicts.
    assert Network("dinov2", dinov2_config("B")).num_params() == 86_583_552
    assert Network("inception", {}).num_params() == 23_885_392
    # DINOv2's model card: 21 M, 300 M, 1,100 M.
    counts = {s: Network("dinov2", dinov2_config(s)).num_params() / 1e6 for s in ("S", "L", "g")}
    assert [round(counts[s]) for s in ("S", "L", "g")] == [22, 304, 1136]


def test_inception_shapes():
    network = Network("inception", {})
    images = jax.ShapeDtypeStruct((2, 31, 47, 3), jnp.uint8)
    out = jax.eval_shape(network.apply, network.abstract_params(), images)
    shapes = {name: leaf.shape for name, leaf in out.items()}
    assert shapes == {"pool": (2, 2048), "spatial": (2, 2023), "logits_unbiased": (2, 1008)}


def test_unknown_sizes_are_refused():
    with pytest.raises(SfdError, match="B, L, S, g"):
        dinov2_config("X")
    with pytest.raises(SfdError, match="ffn"):
        DinoV2Config(**{**TINY, "ffn": "gelu"})
