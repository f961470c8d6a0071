"""Files of visual encoders as the hub has them: config.json beside the weights, prefixes, other towers, refusals."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from sfd_jax.convert import FORMATS
from sfd_jax.convert.checkpoints import export_checkpoint, import_checkpoint
from sfd_jax.convert.table import export_state
from sfd_jax.errors import SfdError
from sfd_jax.models import Network

SIZES = dict(width=24, depth=2, num_heads=2, image_size=15, patch_size=5)
TYPES = {"dinov3": "dinov3_vit", "siglip2": "siglip", "clip": "clip_vision_model", "mae": "vit_mae"}


def state_of(name):
    network = Network(name, SIZES)
    random = np.random.default_rng(0)
    draw = lambda leaf: random.standard_normal(leaf.shape, np.float32)
    return export_state(FORMATS[name].TABLE, jax.tree.map(draw, network.abstract_params()), network)


def written(folder, state, config=None):
    save_file({key: np.ascontiguousarray(array) for key, array in state.items()}, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return folder


@pytest.mark.parametrize("name", TYPES)
def test_sizes_come_from_config_json_and_files_come_back(tmp_path, name):
    state, config = state_of(name), {"model_type": TYPES[name], "num_attention_heads": 3, "layer_norm_eps": 1e-3}
    imported = import_checkpoint(written(tmp_path, state, config))
    assert (imported.network.name, imported.notes) == (name, [])
    found = imported.network.config
    assert (found.width, found.depth, found.num_heads, found.patch_size, found.epsilon) == (24, 2, 3, 5, 1e-3)
    back, _ = export_checkpoint(imported.params, imported.metadata)
    jax.tree.map(np.testing.assert_array_equal, back, state)


@pytest.mark.parametrize("name", ["clip", "siglip2"])
def test_a_file_of_both_towers_gives_the_image_tower(tmp_path, name):
    state = {f"vision_model.{key}": array for key, array in state_of(name).items()}
    beside = ("text_model.embeddings.position_embedding.weight", "logit_scale", "vision_model.embeddings.position_ids")
    beside += (
        ("vision_model.head.probe",) if name == "siglip2" else ("visual_projection.weight", "text_projection.weight")
    )
    config = {"model_type": TYPES[name].removesuffix("_vision_model"), "text_config": {"num_attention_heads": 1}}
    config |= {"vision_config": {"model_type": TYPES[name], "num_attention_heads": 6}}
    whole = state | {key: np.zeros((2, 2), np.float32) for key in beside}
    imported = import_checkpoint(written(tmp_path, whole, config))
    assert imported.network.name == name and imported.network.config.num_heads == 6
    assert "text_model.* (1)" in imported.notes[-1] and "logit_scale (1)" in imported.notes[-1]
    alone = import_checkpoint(written(tmp_path, state, config))
    jax.tree.map(np.testing.assert_array_equal, imported.params, alone.params)
    (tmp_path / "config.json").unlink()
    with pytest.raises(SfdError, match="give --set num_heads"):
        import_checkpoint(tmp_path)


def test_maes_decoder_is_left_out(tmp_path):
    state = {f"vit.{key}": array for key, array in state_of("mae").items()}
    state["decoder.mask_token"] = np.zeros((1, 1, 8), np.float32)
    imported = import_checkpoint(written(tmp_path, state, {"model_type": "vit_mae", "num_attention_heads": 2}))
    assert imported.network.name == "mae" and "decoder.* (1)" in imported.notes[-1]


def naflex(state):
    state["embeddings.patch_embedding.weight"] = state["embeddings.patch_embedding.weight"].reshape(24, -1)


def gated(state):
    for layer in range(2):
        state[f"layer.{layer}.mlp.gate_proj.weight"] = state[f"layer.{layer}.mlp.up_proj.weight"]


def only(**arrays):
    return lambda state: (state.clear(), state.update(arrays))


ONE = np.zeros((4, 4), np.float32)
REFUSED = {
    "NaFlex": ("siglip2", naflex, {}, "SigLIP 2 NaFlex"),
    "gated": ("dinov3", gated, {"use_gated_mlp": True}, "gated MLP"),
    "ConvNeXt": ("dinov3", only(**{"stages.0.layers.0.depthwise_conv.weight": ONE}), {}, "ConvNeXt"),
    "DINOv3's first names": (
        "dinov3",
        only(storage_tokens=ONE, mask_token=ONE, b=ONE),
        {},
        "names of its first release",
    ),
    "CLIP's first names": ("clip", only(**{"visual.conv1.weight": ONE}), {}, "names of its first release"),
    "text alone": (
        "clip",
        only(**{"text_model.final_layer_norm.weight": ONE, "text_projection.weight": ONE}),
        {},
        "text",
    ),
    "a config of others": ("clip", lambda state: None, {"model_type": "siglip"}, "is of a 'siglip'"),
    "a config of other sizes": ("mae", lambda state: None, {"hidden_size": 768}, "hidden_size 768.* have 24"),
    "an activation of others": ("clip", lambda state: None, {"hidden_act": "relu"}, "no activation 'relu'"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_none_of_ours_is_refused_with_a_sentence(tmp_path, what):
    name, change, config, sentence = REFUSED[what]
    change(state := state_of(name))
    written(tmp_path, state, {"model_type": TYPES[name], "num_attention_heads": 2} | config)
    with pytest.raises(SfdError, match=sentence):
        import_checkpoint(tmp_path)


@pytest.mark.parametrize("config", ["{", "[" * 10**5, " " * 2**19])
def test_a_config_json_that_cannot_be_read_is_named(tmp_path, config):
    with pytest.raises(SfdError, match=r"config\.json' cannot be read"):
        import_checkpoint(written(tmp_path, state_of("mae"), config))


def test_a_config_json_of_another_program_is_passed_over(tmp_path):
    imported = import_checkpoint(written(tmp_path, load_wide(), '{"lr": 1}'))
    assert imported.network.config.num_heads == 1 and "released heads are 64 wide" in imported.notes[0]


def load_wide():
    network = Network("mae", SIZES | dict(width=64, depth=1))
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), network.abstract_params())
    return export_state(FORMATS["mae"].TABLE, zeros, network)
