"""The tables: every array is converted in both directions, and architectures are read from shapes."""

import jax
import ml_dtypes
import numpy as np
import pytest

from sfd_jax.convert import FORMATS
from sfd_jax.convert.table import export_state, import_params, kept_as_stored, key_shapes
from sfd_jax.errors import SfdError
from sfd_jax.models import SIZES, Network
from sfd_jax.models.encoders import DINOV2_SIZES

# Small networks in every architecture; sizes distinct, so that a swapped axis does not fit.
DIT = dict(width=24, depth=3, num_heads=2, input_size=6, patch_size=2, in_channels=5, num_classes=7)
VAE = dict(z_channels=3, ch=8, ch_mult=(1, 2, 3), num_res_blocks=1, norm_groups=4)
SEMVAE = dict(input_dim=11, bottleneck_dim=3, hidden_dim=10, num_layers=3, num_res_blocks=2)
DINO = dict(width=24, depth=3, num_heads=2, image_size=15, patch_size=5, num_registers=2)
NETWORKS = {
    "dit": ("lightning_dit", DIT),
    "dit_repa": ("lightning_dit", DIT | dict(repa_features=13, repa_width=17)),
    "dit_conv": ("lightning_dit", DIT | dict(repa_features=13, repa_projector="conv")),
    "dit_plain": (
        "lightning_dit",
        DIT | dict(two_clocks=False, use_qknorm=False, use_swiglu=False, use_rope=False, use_rmsnorm=False),
    ),
    "dit_layernorm_qk": ("lightning_dit", DIT | dict(use_rmsnorm=False, learn_sigma=True)),
    "dit_no_shift": ("lightning_dit", DIT | dict(use_shift=False, mlp_ratio=3.0, two_clocks=False)),
    "semvae_linear": ("semantic_vae", dict(arch="linear", input_dim=11, bottleneck_dim=3)),
    "semvae_mlp": ("semantic_vae", SEMVAE | dict(arch="mlp")),
    "semvae_resnet": ("semantic_vae", SEMVAE | dict(arch="resnet", variational=False)),
    "semvae_transformer": (
        "semantic_vae",
        dict(
            arch="transformer",
            input_dim=11,
            bottleneck_dim=3,
            hidden_dim=10,
            transformer_heads=5,
            transformer_blocks=3,
        ),
    ),
    "vae": ("texture_vae", VAE | dict(attention_levels=(2,))),
    "vae_mar": ("texture_vae", VAE | dict(attention_levels=(1, 2), variant="mar")),
    "vae_no_attention": ("texture_vae", VAE | dict(attention_levels=())),
    "vae_diffusers": ("texture_vae_diffusers", VAE | dict(attention_levels=(1,))),
    "vae_diffusers_old": ("texture_vae_diffusers_old", VAE | dict(attention_levels=(2,), use_quant_conv=False)),
    "dinov2": ("dinov2", DINO),
    "dinov2_swiglu": ("dinov2", DINO | dict(ffn="swiglu", num_registers=0)),
    "dinov2_hf": ("dinov2_hf", DINO),
    "dinov2_hf_swiglu": ("dinov2_hf", DINO | dict(ffn="swiglu")),
    "dinov3": ("dinov3", DINO | dict(num_heads=3, image_size=224, patch_size=16)),
    "siglip2": ("siglip2", DINO | dict(num_registers=0, mlp_width=40)),
    "clip": ("clip", DINO | dict(num_registers=0)),
    "mae": ("mae", DINO | dict(num_registers=0)),
    "inception": ("inception", {}),
}


def make(name):
    format, config = NETWORKS[name]
    module = FORMATS[format]
    return format, module, Network(module.TABLE.network, config)


def random_params(network, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), network.abstract_params())


@pytest.mark.parametrize("name", NETWORKS)
def test_round_trip_is_exact_and_the_architecture_is_read(name):
    format, module, network = make(name)
    params = random_params(network)
    state = export_state(module.TABLE, params, network)
    assert {f for f, m in FORMATS.items() if m.recognises(state)} == {format}

    # Fields that the shapes do not determine are given: heads without q/k norm, groups.
    config = network.config_dict()
    silent = {"num_heads", "transformer_heads", "norm_groups"} if name != "dit" else set()
    given = {k: v for k, v in config.items() if k in silent}
    fields, _ = module.read_config(state, given, {})
    assert Network(network.name, fields).config == network.config

    back = import_params(module.TABLE, state, network)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    again = export_state(module.TABLE, back, network)
    assert again.keys() == state.keys()
    assert all(again[key].tobytes() == state[key].tobytes() for key in state)
    shapes = key_shapes(module.TABLE, network)
    assert {k: state[k].shape for k in shapes} == shapes


def test_hugging_face_names_hold_the_same_network():
    """Split query, key, value and back: both files of one network import to the same parameters."""
    _, _, network = make("dinov2")
    params = random_params(network)
    state = export_state(FORMATS["dinov2_hf"].TABLE, params, network)
    qkv = params["blocks"]["attention"]["qkv"]["kernel"][1]
    key = state["encoder.layer.1.attention.attention.key.weight"]
    np.testing.assert_array_equal(key, qkv[:, 24:48].T)
    jax.tree.map(
        np.testing.assert_array_equal,
        import_params(FORMATS["dinov2_hf"].TABLE, state, network),
        import_params(FORMATS["dinov2"].TABLE, export_state(FORMATS["dinov2"].TABLE, params, network), network),
    )


@pytest.mark.parametrize("size", SIZES)
def test_released_sizes_are_read_without_memory(size):
    network = Network("lightning_dit", SIZES[size] | dict(repa_features=768))
    table = FORMATS["lightning_dit"].TABLE
    shapes = key_shapes(table, network) | {key: array.shape for key, array in table.fixed(network.config).items()}
    state = {key: jax.ShapeDtypeStruct(shape, np.float32) for key, shape in shapes.items()}
    fields, _ = FORMATS["lightning_dit"].read_config(state, {}, {})
    assert Network("lightning_dit", fields).config == network.config


def test_heads_not_in_the_shapes_come_from_the_released_size_or_the_user():
    plain = dict(use_qknorm=False, use_rope=False, use_rmsnorm=False)
    module = FORMATS["lightning_dit"]

    def state_of(config):
        network = Network("lightning_dit", config)
        shapes = key_shapes(module.TABLE, network) | {
            key: array.shape for key, array in module.TABLE.fixed(network.config).items()
        }
        return {key: jax.ShapeDtypeStruct(shape, np.float32) for key, shape in shapes.items()}

    fields, notes = module.read_config(state_of(SIZES["XL"] | plain), {}, {})
    assert fields["num_heads"] == 16 and any("num_heads" in note for note in notes)
    with pytest.raises(SfdError, match="num_heads"):
        module.read_config(state_of(DIT | plain), {}, {})
    assert module.read_config(state_of(DIT | plain), {"num_heads": 2}, {})[0]["num_heads"] == 2


def test_a_file_without_tables_asks_for_grid_and_rotary_embedding():
    _, module, network = make("dit")
    state = export_state(module.TABLE, random_params(network), network)
    state = {k: v for k, v in state.items() if k != "pos_embed" and not k.startswith("feat_rope")}
    with pytest.raises(SfdError, match=r"input_size.*use_rope"):
        module.read_config(state, {}, {})
    fields, _ = module.read_config(state, {"input_size": 6, "use_rope": True}, {})
    assert Network("lightning_dit", fields).config == network.config


def test_every_missing_extra_and_misshapen_array_is_named_at_once():
    _, module, network = make("dit_repa")
    state = export_state(module.TABLE, random_params(network), network)
    state["blocks.1.attn.projection.weight"] = state.pop("blocks.1.attn.proj.weight")
    state["blocks.2.mlp.w3.bias"] = np.zeros(5, np.float32)
    state["x_embedder.proj.bias"] = np.zeros(24, np.int32)
    state["pos_embed"] = state["pos_embed"][:, :-1]
    del state["final_layer.linear.bias"]
    with pytest.raises(SfdError) as error:
        import_params(module.TABLE, state, network, source="'some.pt'")
    message = str(error.value)
    for line in (
        "'some.pt' does not fit lightning_dit",
        "missing   blocks.1.attn.proj.weight (24, 24)",
        "missing   final_layer.linear.bias (20,)",
        "extra     blocks.1.attn.projection.weight (24, 24)",
        "misshapen blocks.2.mlp.w3.bias is (5,), expected (24,)",
        "misshapen pos_embed is (1, 8, 24), expected (1, 9, 24)",
        "not float x_embedder.proj.bias is int32",
    ):
        assert line in message


def test_export_is_as_strict():
    _, module, network = make("semvae_mlp")
    params = random_params(network)
    params["encoder"]["layers"]["1"]["gate"]["bias_"] = params["encoder"]["layers"]["1"]["gate"].pop("bias")
    params["decoder"]["layers"]["0"]["up"]["kernel"] = np.zeros((3, 9), np.float32)
    with pytest.raises(SfdError) as error:
        export_state(module.TABLE, params, network)
    for line in (
        "missing   encoder/layers/1/gate/bias (10,)",
        "extra     encoder/layers/1/gate/bias_ (10,)",
        "misshapen decoder/layers/0/up/kernel is (3, 9), expected (3, 10)",
    ):
        assert line in str(error.value)


@pytest.mark.parametrize("key", ["blocks.0.norm1.weight", "blocks.2.attn.q_norm.weight", "x_embedder.proj.bias"])
@pytest.mark.parametrize("change", ["rename", "reshape"])
def test_one_changed_key_is_the_one_that_is_named(key, change):
    """The architecture is read by majority, so that one odd array does not change it."""
    _, module, network = make("dit")
    state = export_state(module.TABLE, random_params(network), network)
    array = state.pop(key)
    state[key + "_" if change == "rename" else key] = array if change == "rename" else array[1:]
    with pytest.raises(SfdError) as error:
        fields, _ = module.read_config(state, {}, {})
        import_params(module.TABLE, state, Network("lightning_dit", fields))
    faults = [line for line in str(error.value).splitlines() if line.startswith("  ")]
    assert len(faults) == (2 if change == "rename" else 1) and all(key in line for line in faults)


def test_a_changed_fixed_table_is_refused():
    _, module, network = make("dit")
    state = export_state(module.TABLE, random_params(network), network)
    state["pos_embed"] = state["pos_embed"] + 1e-3
    with pytest.raises(SfdError, match="pos_embed is a fixed table"):
        import_params(module.TABLE, state, network)


@pytest.mark.parametrize(
    "name, key, other",
    [
        ("vae", "loss.discriminator.w", "lossy.w"),
        ("inception", "fc.num_batches_tracked", "fc.num_batches"),
    ],
)
def test_deliberate_skips_are_in_the_table(name, key, other):
    _, module, network = make(name)
    state = export_state(module.TABLE, random_params(network), network)
    import_params(module.TABLE, state | {key: np.zeros(3, np.int64)}, network)
    with pytest.raises(SfdError, match=f"extra     {other}"):
        import_params(module.TABLE, state | {other: np.zeros(3)}, network)


def test_half_precision_and_foreign_tables_come_back_bit_for_bit():
    _, module, network = make("dit")
    state = export_state(module.TABLE, random_params(network), network)
    state["blocks.0.attn.qkv.weight"] = state["blocks.0.attn.qkv.weight"].astype(ml_dtypes.bfloat16)
    state["final_layer.linear.weight"] = state["final_layer.linear.weight"].astype(np.float16)
    # Another mathematical library: the last bit of the cosines differs.
    state["feat_rope.freqs_cos"] = np.nextafter(state["feat_rope.freqs_cos"], np.float32(2))
    kept = kept_as_stored(module.TABLE, state, network)
    assert set(kept["dtypes"]) == {"blocks.0.attn.qkv.weight", "final_layer.linear.weight"}
    assert set(kept["fixed"]) == {"feat_rope.freqs_cos"}
    params = import_params(module.TABLE, state, network)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))
    back = export_state(module.TABLE, params, network, kept)
    assert all(back[key].dtype == state[key].dtype for key in state)
    assert all(back[key].tobytes() == state[key].tobytes() for key in state)


def test_released_dinov2_sizes_have_heads_of_64():
    assert all(size["width"] == 64 * size["num_heads"] for size in DINOV2_SIZES.values())
