import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_testing import call, random_params

from sfd_jax.errors import SfdError
from sfd_jax.models import DiTConfig, Network, dit_config
from sfd_jax.models.execution import PLAIN, Execution, executing
from sfd_jax.models.lightning_dit import ConvProjector
from sfd_jax.models.positions import rotary_2d, rotate, sincos_2d

TINY = dict(
    width=24,
    depth=3,
    num_heads=2,
    input_size=6,
    patch_size=2,
    in_channels=5,
    num_classes=7,
    repa_features=11,
    repa_depth=2,
    repa_width=13,
)


def build(**overrides):
    return Network("lightning_dit", {**TINY, **overrides})


@pytest.fixture(scope="module")
def params():
    return random_params(build())


@pytest.fixture(scope="module")
def inputs():
    latents = jax.random.normal(jax.random.key(1), (3, 6, 6, 5))
    t_semantic, t_texture = jnp.array([0.1, 0.5, 1.0]), jnp.array([0.0, 0.2, 0.7])
    return latents, t_semantic, t_texture, jnp.array([0, 3, 7])


@pytest.fixture(scope="module")
def velocity(params, inputs):
    return call(build(), params, *inputs)


def close(a, b, tolerance):
    scale = float(jnp.max(jnp.abs(b)))
    assert float(jnp.max(jnp.abs(a - b))) <= tolerance * scale


def test_fresh_network_returns_zero(inputs):
    # Zero modulation and zero last layer, as in adaLN-zero.
    network = build()
    out = call(network, jax.jit(network.init)(jax.random.key(0)), *inputs)
    assert out.shape == inputs[0].shape and out.dtype == jnp.float32
    np.testing.assert_array_equal(out, 0)


def test_initial_distributions():
    params = jax.jit(build(width=64, num_heads=4).init)(jax.random.key(2))
    for path, zero in [("modulation", 0), ("attention", 1)]:
        kernel = jax.tree.leaves(params["blocks"][path])
        assert any(np.any(leaf) for leaf in kernel) == bool(zero)
    assert not np.any(params["final"]["modulation"]["kernel"])
    assert not np.any(params["final"]["linear"]["kernel"])
    qkv = params["blocks"]["attention"]["qkv"]["kernel"]
    bound = np.sqrt(6 / (64 + 3 * 64))
    assert np.abs(qkv).max() <= bound
    # 37k uniform draws: the standard deviation is known to about 0.3 %.
    np.testing.assert_allclose(np.std(qkv), bound / np.sqrt(3), rtol=0.02)
    assert np.any(qkv[0] != qkv[1])  # each layer has a key of its own
    patch = params["patch_embed"]["kernel"]
    assert np.abs(patch).max() <= np.sqrt(6 / (2 * 2 * 5 + 64))
    for table in (
        params["label_embed"]["embedding"],
        params["time_embed_semantic"]["linear1"]["kernel"],
        params["time_embed_texture"]["linear2"]["kernel"],
    ):
        # At least 512 draws: 0.02 to about 3 % (one sigma), so 15 % never fails by chance.
        np.testing.assert_allclose(np.std(table), 0.02, rtol=0.15)
    assert np.any(
        params["time_embed_semantic"]["linear1"]["kernel"] != params["time_embed_texture"]["linear1"]["kernel"]
    )


@pytest.mark.slow
def test_scan_and_remat_change_nothing(inputs):
    shallow = dict(depth=2, repa_depth=1)

    def result(execution):
        def loss(params):
            with executing(execution):
                velocity, repa = network.apply(params, *inputs, return_repa=True)
            return jnp.mean(velocity**2) + jnp.mean(repa**2), velocity

        return jax.jit(jax.grad(loss, has_aux=True))(random_params(network))

    network = build(**shallow)
    wanted, velocity = result(PLAIN)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(wanted))  # every parameter is used
    for change in (dict(remat="full"), dict(remat="dots", scan=False)):
        found, same = result(Execution(**change))
        # The same arithmetic in another order of fusion: a few float32 roundings.
        close(same, velocity, 2e-6)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            close(a, b, 2e-5)


def test_remat_recomputes_as_documented(inputs):
    """Matmuls in the gradient's program: "full" repeats all of a block, "dots" only those of attention."""
    counts, network = {}, build(depth=1, repa_features=0)
    loss = lambda params: jnp.sum(network.apply(params, *inputs))
    for remat in ("none", "dots", "full"):
        with executing(Execution(remat=remat)):
            program = jax.jit(jax.grad(loss)).lower(network.abstract_params())
        counts[remat] = program.as_text().count("dot_general")
    # Logits and values; and qkv, proj, both halves of w12 and the modulation, and w3, whose output is not needed.
    assert counts["dots"] - counts["none"] == 2
    assert counts["full"] - counts["dots"] in (5, 6)


def test_blocks_are_one_loop_or_unrolled(inputs):
    def loops(scan):
        network = build(repa_features=0)
        with executing(Execution(scan=scan)):
            program = jax.jit(network.apply).lower(network.abstract_params(), *inputs)
        return program.as_text().count("stablehlo.while")

    assert loops(True) == 1 and loops(False) == 0


def test_bfloat16_is_near_float32(params, inputs, velocity):
    out, repa = call(build(compute_dtype="bfloat16"), params, *inputs, return_repa=True)
    assert out.dtype == repa.dtype == jnp.float32
    # bfloat16 has 8 bits, 2^-9 = 0.2 % a rounding; three blocks of several matmuls make a few %.
    close(out, velocity, 0.05)
    assert np.any(out != velocity)


def test_repa_reads_the_hidden_states_after_repa_depth_blocks(params, inputs):
    _, repa = call(build(), params, *inputs, return_repa=True)
    assert repa.shape == (3, 9, 11)
    # A network that ends at that depth has the same hidden states there.
    cut = {**params, "blocks": jax.tree.map(lambda p: p[:2], params["blocks"])}
    _, wanted = call(build(depth=2), cut, *inputs, return_repa=True)
    close(repa, wanted, 1e-6)
    other = {**params, "blocks": jax.tree.map(lambda p: p.at[1].add(0.1), params["blocks"])}
    _, changed = call(build(), other, *inputs, return_repa=True)
    assert np.any(changed != repa)


@pytest.mark.slow
def test_a_convolution_projects_tokens_on_their_grid():
    projector = ConvProjector(build(repa_projector="conv").config, rngs=nnx.Rngs(0))
    tokens, bias = (np.asarray(jax.random.normal(jax.random.key(7), shape)) for shape in ((2, 9, 24), (11,)))
    projector.conv.bias[...] = bias
    kernel = np.asarray(projector.conv.kernel[...])
    padded = np.pad(tokens.reshape(2, 3, 3, 24), [(0, 0), (1, 1), (1, 1), (0, 0)])
    wanted = bias + sum(padded[:, y : y + 3, x : x + 3] @ kernel[y, x] for y in range(3) for x in range(3))
    close(projector(tokens), wanted.reshape(2, 9, 11), 1e-5)


def test_each_clock_and_the_label_matter(params, inputs, velocity):
    latents, t_semantic, t_texture, labels = inputs
    network = build()
    for changed in (
        (latents, t_semantic + 0.1, t_texture, labels),
        (latents, t_semantic, t_texture + 0.1, labels),
        (latents, t_texture, t_semantic, labels),
        (latents, t_semantic, t_texture, (labels + 1) % 8),
    ):
        out = call(network, params, *changed)
        assert float(jnp.max(jnp.abs(out[1] - velocity[1]))) > 1e-3


def test_a_single_clock_reads_the_texture_clock(inputs):
    latents, t_semantic, t_texture, labels = inputs
    network = build(two_clocks=False)
    params = random_params(network)
    out = call(network, params, latents, t_semantic, t_texture, labels)
    same = call(network, params, latents, t_semantic + 0.1, t_texture, labels)
    other = call(network, params, latents, t_semantic, t_texture + 0.1, labels)
    np.testing.assert_array_equal(out, same)
    assert np.any(out != other)


def test_samples_are_independent(params, inputs, velocity):
    one = call(build(), params, *(x[1:2] for x in inputs))
    close(one, velocity[1:2], 2e-6)  # another batch size may sum in another order


@pytest.mark.parametrize("use_rope", [True, False])
def test_positions_matter(inputs, use_rope):
    # Without positions a transposed image would give transposed outputs.
    latents, *rest = inputs
    network = build(use_rope=use_rope, patch_size=1)
    params = random_params(network)
    out = call(network, params, latents, *rest)
    turned = call(network, params, jnp.transpose(latents, (0, 2, 1, 3)), *rest)
    assert float(jnp.max(jnp.abs(jnp.transpose(turned, (0, 2, 1, 3)) - out))) > 1e-2


def test_plain_dit_options(inputs):
    plain = dict(
        use_qknorm=False,
        use_swiglu=False,
        use_rope=False,
        use_rmsnorm=False,
        use_shift=False,
        learn_sigma=True,
        repa_features=0,
    )
    network = build(**plain)
    params = random_params(network)
    assert params["blocks"]["modulation"]["kernel"].shape == (3, 24, 4 * 24)
    assert params["final"]["linear"]["kernel"].shape == (24, 2 * 2 * 10)
    assert "norm1" not in params["blocks"]  # LayerNorm without parameters
    assert call(network, params, *inputs).shape == inputs[0].shape
    with pytest.raises(SfdError, match="repa_features"):
        call(network, params, *inputs, return_repa=True)
    qk = build(**{**plain, "use_qknorm": True}).abstract_params()["blocks"]["attention"]
    assert set(qk["q_norm"]) == {"scale", "bias"}  # LayerNorm with parameters


def test_rotary_product_depends_only_on_the_offset():
    # q at a, k at b: the product is the same for all pairs with the same row and column offset.
    grid, width = 5, 12
    tables = rotary_2d(width, grid)
    q, k = jax.random.normal(jax.random.key(0), (2, width))
    spread = lambda x: jnp.broadcast_to(x, (1, grid * grid, 1, width))
    turned_q, turned_k = rotate(spread(q), tables)[0, :, 0], rotate(spread(k), tables)[0, :, 0]
    products = (turned_q @ turned_k.T).reshape(grid, grid, grid, grid)
    np.testing.assert_allclose(products[0, 1, 2, 4], products[2, 0, 4, 3], atol=1e-5)
    np.testing.assert_allclose(products[3, 3, 3, 3], q @ k, atol=1e-5)
    assert abs(products[0, 0, 0, 1] - products[0, 0, 1, 0]) > 1e-3  # rows are not columns


def test_position_table_by_hand():
    table = sincos_2d(8, 3).reshape(3, 3, 8)
    # Row 2, column 1: first the column (sin 1, sin 0.01, cos 1, cos 0.01), then the row.
    wanted = [f(p * w) for p in (1, 2) for f in (np.sin, np.cos) for w in (1.0, 0.01)]
    np.testing.assert_allclose(table[2, 1], wanted, rtol=1e-6)


# The released models count their fixed position table (N x D) as parameters; here it is not one.
RELEASED = {"B": 137_632_304, "XL": 682_765_424, "1p0B": 1_037_191_472}


@pytest.mark.parametrize("size", RELEASED)
def test_released_parameter_counts(size):
    config = dit_config(size, repa_features=768)
    position_table = 16 * 16 * config.width
    assert Network("lightning_dit", config).num_params() + position_table == RELEASED[size]


@pytest.mark.parametrize("size", ["S", "L", "1p6B"])
def test_other_parameter_counts(size):
    c = dit_config(size)
    d, hidden = c.width, int(8 / 3 * c.width)
    head = d // c.num_heads
    attention = 3 * d * d + 3 * d + d * d + d + 2 * head
    mlp = 2 * d * hidden + 2 * hidden + hidden * d + d
    block = attention + mlp + 2 * d + 6 * d * d + 6 * d
    clocks = 2 * (256 * d // 2 + d // 2 + d // 2 * d // 2 + d // 2)
    ends = 48 * d + d + 1001 * d + d + 2 * d * d + 2 * d + 48 * d + 48
    assert Network("lightning_dit", c).num_params() == c.depth * block + clocks + ends


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(num_heads=5), "num_heads"),
        (dict(patch_size=4), "patch_size"),
        (dict(repa_depth=4), "repa_depth"),
        (dict(compute_dtype="float16"), "bfloat16"),
        (dict(repa_projector="convolution"), "unknown model.repa_projector 'convolution'"),
        (dict(width=20, num_heads=2), "head width 10"),
    ],
)
def test_impossible_configs_are_refused(change, message):
    with pytest.raises(SfdError, match=message):
        DiTConfig(**{**TINY, **change})


def test_unknown_sizes_and_fields_are_named():
    with pytest.raises(SfdError, match="'XL'"):
        dit_config("XXL")
    with pytest.raises(SfdError, match="'depth'"):
        dit_config("B", dept=3)


def test_latents_of_another_grid_are_refused(params, inputs):
    with pytest.raises(SfdError, match="latents"):
        call(build(), params, inputs[0][:, :4], *inputs[1:])
