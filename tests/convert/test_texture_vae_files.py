"""Texture VAEs of others: key names of diffusers, its config.json, the scaling factor; and SiT beside them."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from sfd_jax.cli.convert import main
from sfd_jax.convert import FORMATS
from sfd_jax.convert.table import export_state, import_params, key_shapes
from sfd_jax.convert.texture_vae import DIFFUSERS, scaling_statistics
from sfd_jax.diffusion.paths import DDPMPath
from sfd_jax.diffusion.predictions import NoisePrediction, transport_of
from sfd_jax.errors import SfdError
from sfd_jax.latents import LatentStatistics
from sfd_jax.models import Network, TextureVAEConfig
from sfd_jax.training.checkpoint import load_params

NETWORK = Network("texture_vae", dict(z_channels=4, ch=4, ch_mult=(1, 2), num_res_blocks=1, norm_groups=2))
CONFIG = {"_class_name": "AutoencoderKL", "latent_channels": 4, "block_out_channels": [4, 8], "norm_num_groups": 2}
STABILITY = TextureVAEConfig(z_channels=4, ch_mult=(1, 2, 4, 4), attention_levels=())
SPELLINGS = ("texture_vae", "texture_vae_diffusers", "texture_vae_diffusers_old")


def drawn(network, format):
    """Return a state dict of theirs with small random weights."""
    random = np.random.default_rng(0)
    draw = lambda leaf: np.float32(0.3 * random.standard_normal(leaf.shape))
    return export_state(FORMATS[format].TABLE, jax.tree.map(draw, network.abstract_params()), network)


def test_stabilitys_keys_and_shapes():
    """248 arrays at full size, written down from diffusers' and latent-diffusion's code."""
    network = Network("texture_vae", STABILITY)
    assert network.num_params() == 83_653_863
    ldm, new, old = (key_shapes(FORMATS[name].TABLE, network) for name in SPELLINGS)
    assert len(ldm) == len(new) == len(old) == 248
    up = "decoder.up_blocks"
    for state in (new, old):
        assert state["encoder.down_blocks.1.downsamplers.0.conv.weight"] == (256, 256, 3, 3)
        assert state["encoder.down_blocks.2.resnets.0.conv_shortcut.weight"] == (512, 256, 1, 1)
        assert "encoder.down_blocks.3.downsamplers.0.conv.bias" not in state
        # The decoder's levels are counted from the coarsest.
        assert state[f"{up}.0.resnets.2.conv2.weight"] == state[f"{up}.0.upsamplers.0.conv.weight"] == (512, 512, 3, 3)
        assert state[f"{up}.2.resnets.0.conv_shortcut.weight"] == (256, 512, 1, 1)
        assert state[f"{up}.3.resnets.0.conv1.weight"] == (128, 256, 3, 3)
        assert f"{up}.3.upsamplers.0.conv.bias" not in state
        assert state["decoder.conv_norm_out.weight"] == (128,) and state["quant_conv.weight"] == (8, 8, 1, 1)
        assert state["encoder.mid_block.resnets.1.norm2.bias"] == (512,)
    attention = "decoder.mid_block.attentions.0"
    assert new[f"{attention}.to_out.0.weight"] == new[f"{attention}.to_q.weight"] == (512, 512)
    assert old[f"{attention}.proj_attn.weight"] == old[f"{attention}.query.weight"] == (512, 512)
    assert ldm["decoder.up.0.block.0.nin_shortcut.weight"] == (128, 256, 1, 1)


def test_all_spellings_are_one_network():
    params = []
    for format in SPELLINGS:
        state = drawn(NETWORK, format)
        assert [name for name, module in FORMATS.items() if module.recognises(state)] == [format]
        fields, notes = FORMATS[format].read_config(state, {}, CONFIG)
        assert Network("texture_vae", fields).config == dataclasses.replace(NETWORK.config, attention_levels=(1,))
        assert notes == []
        params.append(import_params(FORMATS[format].TABLE, state, NETWORK))
    jax.tree.map(np.testing.assert_array_equal, *params[:2])
    jax.tree.map(np.testing.assert_array_equal, *params[1:])


SCALES = {  # config.json -> mean and standard deviation
    "none given": ({}, 0, 1 / 0.18215),
    "SDXL": ({"scaling_factor": 0.13025}, 0, 1 / 0.13025),
    "SD3": ({"scaling_factor": 1.5305, "shift_factor": 0.0609}, 0.0609, 1 / 1.5305),
    "by channel": (
        {"scaling_factor": 0.5, "shift_factor": None, "latents_mean": [1, 2, 3, 4], "latents_std": [2, 3, 4, 5]},
        [1, 2, 3, 4],
        [4, 6, 8, 10],
    ),
}


@pytest.mark.parametrize("what", SCALES)
def test_normalising_is_what_the_scaling_factor_does(what):
    config, mean, std = SCALES[what]
    statistics, notes = scaling_statistics(STABILITY, CONFIG | config)
    raw = np.random.default_rng(1).standard_normal((1, 2, 2, 4), np.float32)
    np.testing.assert_allclose(statistics.normalise_texture(raw), (raw - np.float32(mean)) / np.float32(std), rtol=1e-6)
    assert any("AutoencoderKL's default" in note for note in notes) == (what == "none given")


def test_without_config_json_a_scale_is_assumed_for_stabilitys_shape_alone():
    statistics, notes = scaling_statistics(STABILITY, {})
    assert statistics.texture_std.tolist() == [np.float32(1 / 0.18215)] * 4 and "SDXL's VAE looks the same" in notes[0]
    assert scaling_statistics(TextureVAEConfig(), {}) == (None, [])  # f16d32


def test_quant_convs_may_lack_but_not_one_of_them():
    state, format = drawn(NETWORK, "texture_vae"), FORMATS["texture_vae"]
    whole = [key for key in state if "quant_conv" not in key]
    fields, notes = format.read_config({key: state[key] for key in whole}, {}, CONFIG)
    assert not fields["use_quant_conv"] and "as in SD3's" in notes[0]
    half = {key: array for key, array in state.items() if not key.startswith("post_quant_conv")}
    assert format.read_config(half, {}, CONFIG)[0]["use_quant_conv"]  # so that the missing ones are named


REFUSED = {
    "another class": ({"_class_name": "AutoencoderDC"}, "_class_name AutoencoderDC; only AutoencoderKL"),
    "another activation": ({"act_fn": "relu"}, "act_fn relu; only silu is supported"),
    "no attention": ({"mid_block_add_attention": False}, "mid_block_add_attention False"),
    "other channels": ({"latent_channels": 16}, "latent_channels 16, but the arrays have 4: replace it"),
    "other widths": ({"block_out_channels": [4, 4]}, "block_out_channels .4, 4., but the arrays have .4, 8."),
    "a factor of zero": ({"scaling_factor": 0}, "factors that do not fit 4 channels"),
    "factors of others": ({"latents_mean": [1, 2], "scaling_factor": 1}, "factors that do not fit 4 channels"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_config_json_of_others_is_refused_with_a_sentence(what):
    config, sentence = REFUSED[what]
    with pytest.raises(SfdError, match=sentence):
        DIFFUSERS.read_config(drawn(NETWORK, "texture_vae_diffusers"), {}, CONFIG | config)
        scaling_statistics(NETWORK.config, CONFIG | config)


@pytest.mark.parametrize(
    "key, shape, sentence",
    [
        ("quantize.embedding.weight", (4, 4), "a VQ model"),
        ("encoder.conv_in.weight", (4, 3, 3, 3, 3), "encoder.conv_in.weight is .*, expected 4 axes"),  # of videos
    ],
)
def test_other_networks_of_these_names_are_refused(key, shape, sentence):
    with pytest.raises(SfdError, match=sentence):
        DIFFUSERS.read_config(drawn(NETWORK, "texture_vae_diffusers") | {key: np.zeros(shape)}, {}, {})


def sit(state, x, t, label, heads, grid, patch):
    """Return the prediction (C, H, W) of a SiT or DiT for one latent (C, H, W), from their papers and key names.

    In float64, but for the angles of the time, where float32 matters at large steps.
    """
    linear = lambda key, x: x @ np.float64(state[f"{key}.weight"]).T + state[f"{key}.bias"]
    silu = lambda x: x / (1 + np.exp(-x))
    norm = lambda x: (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    gelu = lambda x: x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    channels, width = x.shape[0], state["x_embedder.proj.bias"].size
    x = x.reshape(channels, grid, patch, grid, patch).transpose(1, 3, 0, 2, 4).reshape(grid * grid, -1)
    kernel = np.float64(state["x_embedder.proj.weight"]).reshape(width, -1)
    x = x @ kernel.T + state["x_embedder.proj.bias"] + state["pos_embed"][0]
    angles = np.float64(np.float32(t) * np.float32(10000.0 ** -(np.arange(128) / 128)))
    time = np.concatenate([np.cos(angles), np.sin(angles)])
    time = linear("t_embedder.mlp.2", silu(linear("t_embedder.mlp.0", time)))
    condition = silu(time + state["y_embedder.embedding_table.weight"][label])
    for i in range(max(int(key.split(".")[1]) for key in state if key.startswith("blocks.")) + 1):
        shift, scale, gate, shift2, scale2, gate2 = np.split(
            linear(f"blocks.{i}.adaLN_modulation.1", condition), 6
        )  # of attention, then of the MLP
        qkv = linear(f"blocks.{i}.attn.qkv", norm(x) * (1 + scale) + shift)
        q, k, v = qkv.reshape(-1, 3, heads, width // heads).transpose(1, 2, 0, 3)
        scores = np.exp(q @ k.transpose(0, 2, 1) / np.sqrt(width // heads))
        mixed = (scores / scores.sum(-1, keepdims=True) @ v).transpose(1, 0, 2).reshape(-1, width)
        x = x + gate * linear(f"blocks.{i}.attn.proj", mixed)
        hidden = gelu(linear(f"blocks.{i}.mlp.fc1", norm(x) * (1 + scale2) + shift2))
        x = x + gate2 * linear(f"blocks.{i}.mlp.fc2", hidden)
    shift, scale = np.split(linear("final_layer.adaLN_modulation.1", condition), 2)
    x = linear("final_layer.linear", norm(x) * (1 + scale) + shift)
    x = x.reshape(grid, grid, patch, patch, -1).transpose(4, 0, 2, 1, 3).reshape(-1, grid * patch, grid * patch)
    return x[:channels]  # the rest is the learned sigma


def test_a_sit_or_dit_is_converted_with_the_scale_of_its_vae(tmp_path, capsys):
    """The network equals SiT's or DiT's, whichever is stated, and its statistics undo the factor 0.18215."""
    plain = dict(two_clocks=False, use_qknorm=False, use_swiglu=False, use_rope=False, use_rmsnorm=False)
    config = dict(width=24, depth=2, num_heads=3, input_size=8, patch_size=2, in_channels=4, num_classes=5)
    state = drawn(Network("lightning_dit", config | plain | dict(learn_sigma=True)), "lightning_dit")
    (tmp_path / "vae").mkdir()
    save_file(drawn(NETWORK, SPELLINGS[2]), tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    (tmp_path / "vae" / "config.json").write_text(json.dumps(CONFIG | {"scaling_factor": 0.18215}))
    save_file(state, tmp_path / "SiT.safetensors")
    assert main([str(tmp_path / "vae"), f"--out={tmp_path / 'ours'}"]) == 0
    arguments = [str(tmp_path / "SiT.safetensors"), "--set=num_heads=3"]
    with pytest.raises(SfdError, match="--prediction=velocity for SiT, --prediction=noise --path_type=ddpm for DiT"):
        main([*arguments, f"--out={tmp_path / 'none'}"])
    latents = np.random.default_rng(2).standard_normal((3, 8, 8, 4), np.float32)
    t, labels = np.array([0.5, 0.875, 1.0], np.float32), np.array([3, 5, 0], np.int32)
    steps = [499, 124, 0]  # the time that DiT reads
    for name, times, flags in (("sit", t, ["velocity"]), ("dit", steps, ["noise", "--path_type=ddpm"])):
        flags = ["--prediction=" + flags[0], *flags[1:], f"--statistics={tmp_path / 'ours'}"]
        assert main([*arguments, *flags, f"--out={tmp_path / name}"]) == 0
        assert "sigma is kept" in (said := capsys.readouterr().out) and "no latent statistics" not in said
        params, metadata = load_params(tmp_path / name)
        network = Network("lightning_dit", metadata["network_config"])
        output = jax.jit(network.apply)(params, latents, t, t, labels)
        for row in range(3):
            expected = sit(state, np.float64(latents[row].transpose(2, 0, 1)), times[row], labels[row], 3, 4, 2)
            np.testing.assert_allclose(output[row].transpose(2, 0, 1), expected, atol=1e-5 * np.abs(expected).max())
    assert transport_of(metadata["config"]) == {"path": DDPMPath(), "prediction": NoisePrediction()}
    _, metadata = load_params(tmp_path / "sit")
    statistics = LatentStatistics.from_dict(metadata["latent_statistics"])
    np.testing.assert_allclose(statistics.denormalise_texture(latents), latents / 0.18215, rtol=1e-6)
    assert metadata["config"] == {
        "latents": {"texture_channels": 4, "semantic_channels": 0},
        "clocks": {"name": "synchronous", "delta_t": 0.0},
    }
    with pytest.raises(SfdError, match="holds 'lightning_dit', expected 'texture_vae'"):
        main([*arguments, *flags[:2], f"--out={tmp_path / 'other'}", f"--statistics={tmp_path / 'sit'}"])
    with pytest.raises(SfdError, match=r"code of REPA, whose time runs from 1 \(noise\)"):
        FORMATS["lightning_dit"].read_config(state | {"projectors.0.0.weight": np.zeros(1)}, {}, {})
