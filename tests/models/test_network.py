import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_testing import call, random_params

from sfd_jax.errors import SfdError
from sfd_jax.models import NETWORKS, Network

SMALL = {
    "lightning_dit": dict(width=8, depth=2, num_heads=1, input_size=2, in_channels=3, num_classes=2),
    "semantic_vae": dict(input_dim=5, bottleneck_dim=2, hidden_dim=6, transformer_heads=2),
    "texture_vae": dict(z_channels=2, ch=4, ch_mult=[1, 2], num_res_blocks=1, norm_groups=2),
    **{
        name: dict(width=8, depth=2, num_heads=2, image_size=6, patch_size=2)
        for name in ("dinov2", "dinov3", "siglip2", "clip", "mae")
    },
    "inception": {},
    "lpips": {},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_abstract_parameters_are_those_of_init(name):
    network = Network(name, SMALL[name])
    abstract = network.abstract_params()
    concrete = jax.eval_shape(network.init, jax.random.key(0))
    assert jax.tree.structure(abstract) == jax.tree.structure(concrete)
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract):
        assert all(isinstance(part.key, str) for part in path), path
        assert leaf.dtype == jnp.float32, path
    assert [leaf.shape for leaf in jax.tree.leaves(abstract)] == [leaf.shape for leaf in jax.tree.leaves(concrete)]


@pytest.mark.parametrize("name", NETWORKS)
def test_config_survives_json(name):
    network = Network(name, SMALL[name])
    again = Network(name, json.loads(json.dumps(network.config_dict())))
    assert again == network and hash(again) == hash(network)


def test_fields_that_moved_out_of_configs_are_ignored():
    """In old checkpoints scan and remat are fields of the network's config."""
    for name in ("lightning_dit", "dinov2"):
        network = Network(name, SMALL[name])
        old = {**network.config_dict(), "remat": "dots", "scan_blocks": None}
        assert Network(name, old) == network


def test_init_depends_only_on_the_key():
    network = Network("semantic_vae", SMALL["semantic_vae"])
    init = jax.jit(network.init)
    first, again, other = (init(jax.random.key(seed)) for seed in (3, 3, 4))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert np.any(first["encoder"]["layers"]["0"]["kernel"] != other["encoder"]["layers"]["0"]["kernel"])


def test_more_than_ten_layers_keep_their_order():
    # String keys sort "10" before "2": the list must be restored by number.
    config = {**SMALL["semantic_vae"], "transformer_blocks": 11}
    network = Network("semantic_vae", config)
    params = random_params(network)
    x = jax.random.normal(jax.random.key(1), (1, 4, 5))
    out, _, _ = call(network, params, x)
    shuffled = jax.tree.map(lambda p: p, params)
    layers = shuffled["decoder"]["layers"]
    layers["2"], layers["10"] = layers["10"], layers["2"]
    assert np.any(call(network, shuffled, x)[0] != out)
    reordered = {k: dict(reversed(v["layers"].items())) for k, v in params.items()}
    reordered = {k: {"layers": v} for k, v in reordered.items()}
    np.testing.assert_array_equal(call(network, reordered, x)[0], out)


def test_wrong_parameters_are_named_with_their_shapes():
    network = Network("semantic_vae", {**SMALL["semantic_vae"], "arch": "linear"})
    params = random_params(network)
    layer = params["encoder"]["layers"]["0"]
    layer["kernel"] = layer["kernel"][:, :3]
    layer["scale"] = layer.pop("bias")
    with pytest.raises(SfdError) as error:
        network.apply(params, jnp.zeros((1, 2, 5)))
    message = str(error.value)
    assert "missing   encoder/layers/0/bias (4,)" in message
    assert "extra     encoder/layers/0/scale (4,)" in message
    assert "misshapen encoder/layers/0/kernel is (5, 3), expected (5, 4)" in message


def test_errors_for_unknown_names_give_the_nearest():
    with pytest.raises(SfdError, match="'semantic_vae'"):
        Network("semantic_vea", {})
    with pytest.raises(SfdError, match="'hidden_dim'"):
        Network("semantic_vae", {"hiden_dim": 4})
    with pytest.raises(SfdError, match="width"):
        Network("dinov2", {"depth": 2, "num_heads": 2})


def test_parameters_keep_their_dtype_until_the_matmul():
    network = Network("lightning_dit", SMALL["lightning_dit"])
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), random_params(network))
    out = call(network, params, jnp.zeros((1, 2, 2, 3)), jnp.zeros(1), jnp.zeros(1), jnp.zeros(1, jnp.int32))
    assert out.dtype == jnp.float32
