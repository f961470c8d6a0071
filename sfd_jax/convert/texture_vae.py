"""Texture VAE: the tables of its state dicts, the architecture from the shapes, and what its scaling factor means.

Our paths are latent-diffusion's and MAR's keys with slashes, so rows are made from a list of paths. diffusers has other
names, counts the decoder's levels from the coarsest, and stores the attention's 1x1 convolutions as Linear. Source:
latent-diffusion, ldm/modules/diffusionmodules/model.py; MAR, models/vae.py; diffusers, AutoencoderKL (key names).
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from sfd_jax.convert.table import Row, Table, shape_of
from sfd_jax.errors import SfdError
from sfd_jax.latents import LatentStatistics
from sfd_jax.models.texture_vae import TextureVAEConfig

_BLOCKS = ("encoder/down/{i}/block/{j}", "decoder/up/{up}/block/{j}") + tuple(
    f"{side}/mid/block_{j}" for side in ("encoder", "decoder") for j in (1, 2)
)
_ATTENTIONS = ("encoder/down/{i}/attn/{j}", "decoder/up/{up}/attn/{j}") + tuple(
    f"{side}/mid/attn_1" for side in ("encoder", "decoder")
)
_ATTENTION_CONVS = tuple(f"{attn}/{conv}" for attn in _ATTENTIONS for conv in ("q", "k", "v", "proj_out"))
_CONVS = (
    *[f"{block}/{conv}" for block in _BLOCKS for conv in ("conv1", "conv2", "nin_shortcut")],
    *[f"{side}/{conv}" for side in ("encoder", "decoder") for conv in ("conv_in", "conv_out")],
    "encoder/down/{i}/downsample/conv",
    "decoder/up/{up}/upsample/conv",
    "quant_conv",
    "post_quant_conv",
)
_NORMS = (
    *[f"{block}/{norm}" for block in _BLOCKS for norm in ("norm1", "norm2")],
    *[f"{attn}/norm" for attn in _ATTENTIONS],
    "encoder/norm_out",
    "decoder/norm_out",
)
# Parts of our paths -> those of diffusers.
_DIFFUSERS = {
    "down/": "down_blocks/",
    "up/": "up_blocks/",
    "/block/": "/resnets/",
    "/attn/": "/attentions/",
    "mid/block_1": "mid_block/resnets/0",
    "mid/block_2": "mid_block/resnets/1",
    "mid/attn_1": "mid_block/attentions/0",
    "downsample/": "downsamplers/0/",
    "upsample/": "upsamplers/0/",
    "nin_shortcut": "conv_shortcut",
    "norm_out": "conv_norm_out",
}
# The attention's parts in diffusers, and in its releases before 0.15, from which most VAEs on the hub are.
_NEW = dict(norm="group_norm", q="to_q", k="to_k", v="to_v", proj_out="to_out/0")
_OLD = dict(norm="group_norm", q="query", k="key", v="value", proj_out="proj_attn")
# What diffusers' config.json must say, where it says it.
_ONLY = {"_class_name": "AutoencoderKL", "act_fn": "silu", "mid_block_add_attention": True}
_STABILITY = 0.18215  # of Stable Diffusion 1 and 2; AutoencoderKL's default


class TextureVAEFormat:
    """The key names of one kind of file; an entry of `convert.FORMATS`.

    Args:
      attention: names of the attention's parts in diffusers; None for latent-diffusion's keys.
      skipped: see `Table`.
    """

    reads_config_json = True

    def __init__(self, attention: Mapping[str, str] | None = None, skipped: tuple[str, ...] = ()):
        self._attention = attention

        def rows(paths, ours: str, layout: str) -> list[Row]:
            keys = [(path, self._key(path)) for path in paths]
            weights = [Row(f"{key}.weight", f"{path}/{ours}", layout) for path, key in keys]
            return weights + [Row(f"{key}.bias", f"{path}/bias") for path, key in keys]

        self.TABLE = Table(
            network="texture_vae",
            rows=(
                *rows(_CONVS, "kernel", "conv"),
                *rows(_ATTENTION_CONVS, "kernel", "pointwise" if attention else "conv"),
                *rows(_NORMS, "scale", "same"),
            ),
            skipped=skipped,
            renumber=self._renumber,
        )

    def recognises(self, state: Mapping[str, Any]) -> bool:
        """Tell whether a state dict has this format, by its keys."""
        old = any(".attentions." in key and ".query." in key for key in state)
        blocks = [self._pattern(path) for path in _BLOCKS[:2]]
        return old == (self._attention is _OLD) and any(re.match(block, key) for key in state for block in blocks)

    def read_config(
        self, state: Mapping[str, Any], given: Mapping[str, Any], stored: Mapping[str, Any]
    ) -> tuple[dict[str, Any], list[str]]:
        """Read TextureVAEConfig from keys and shapes, which lack only the groups of GroupNorm; see the package.

        Raises:
          SfdError: a VQ model, or the `config.json` of another architecture or of other weights.
        """
        if "quantize.embedding.weight" in state:
            raise SfdError("it is a VQ model, whose latents are entries of a codebook; use a VAE (AutoencoderKL)")

        def indices(path: str, group: str) -> set[int]:
            return {int(match[group]) for key in state if (match := re.match(self._pattern(path), key))}

        weight = lambda path: shape_of(state, f"{self._key(path)}.weight", rank=4)
        ch = weight("encoder/conv_in")[0]
        levels = 1 + max(indices(_BLOCKS[0], "i"), default=0)
        widths = [weight(f"encoder/down/{i}/block/0/conv1")[0] for i in range(levels)]
        attention = sorted(indices(_ATTENTIONS[0], "i"))
        config = dict(
            z_channels=weight("decoder/conv_in")[1],
            ch=ch,
            ch_mult=[max(1, width // ch) for width in widths],
            num_res_blocks=1 + max(indices(_BLOCKS[0], "j"), default=0),
            attention_levels=attention,
            variant="mar" if attention and not indices(_ATTENTIONS[1], "j") else "ldm",
            use_quant_conv=any(f"{path}.weight" in state for path in ("quant_conv", "post_quant_conv")),
        )
        notes = [] if config["use_quant_conv"] else ["no quant_conv and post_quant_conv, as in SD3's and FLUX's VAE"]
        if "_class_name" in stored:
            _check(stored, dict(latent_channels=config["z_channels"], block_out_channels=widths))
            config["norm_groups"] = stored.get("norm_num_groups", 32)
        elif "norm_groups" not in given:
            notes.append("norm_groups 32: as in all released ones; the file does not say")
        return config | dict(given), notes

    def wrap(self, state: dict[str, np.ndarray], metadata: Mapping[str, Any]) -> dict[str, Any]:
        """Return the file tree that the original code reads."""
        return state if self._attention else {"state_dict": state}

    def _key(self, path: str) -> str:
        """Return their key of a path of ours, its numbers unchanged."""
        if self._attention:
            for ours, theirs in _DIFFUSERS.items():
                path = path.replace(ours, theirs)
            before, _, part = path.rpartition("/")
            path = f"{before}/{self._attention[part]}" if "/attentions/" in path and part in self._attention else path
        return path.replace("/", ".")

    def _pattern(self, path: str) -> str:
        return re.sub(r"\\{(\w+)\\}", r"(?P<\1>\\d+)", re.escape(self._key(path))) + r"\."

    def _renumber(self, config: TextureVAEConfig, indices: dict[str, str]) -> dict[str, Any]:
        if self._attention is None or "up" not in indices:
            return indices
        return indices | {"up": len(config.ch_mult) - 1 - int(indices["up"])}


# Left out are parts for training: perceptual loss and discriminator; VA-VAE's alignment with a foundation model.
LDM = TextureVAEFormat(skipped=("loss.*", "foundation_model.*", "linear_proj.*"))
DIFFUSERS = TextureVAEFormat(_NEW)
DIFFUSERS_OLD = TextureVAEFormat(_OLD)


def scaling_statistics(
    config: TextureVAEConfig, stored: Mapping[str, Any]
) -> tuple[LatentStatistics | None, list[str]]:
    """Return the statistics with which normalising is what a VAE's scaling factor does.

    Diffusion networks of others are trained on (raw - shift_factor) * scaling_factor, or with `latents_mean` and
    `latents_std` on (raw - mean) / std * scaling_factor.

    Args:
      config: the VAE's.
      stored: diffusers' `config.json`, or empty: then 4 channels on a grid of an eighth are taken for Stability's.

    Returns:
      The statistics, None where there is no scaling factor; and notes.

    Raises:
      SfdError: the factors are not numbers, or not of as many channels.
    """
    channels = config.z_channels
    if "_class_name" not in stored and (channels, config.downsampling) != (4, 8):
        return None, []
    factor, mean, std = (stored.get(name) for name in ("scaling_factor", "latents_mean", "latents_std"))
    notes = []
    if factor is None:
        factor = _STABILITY
        notes.append(
            f"scaling factor {factor}: AutoencoderKL's default; config.json does not say"
            if "_class_name" in stored
            else f"scaling factor {factor}: Stability's, with which DiT and SiT were trained; the file does not say "
            "(SDXL's VAE looks the same and has 0.13025: put its config.json beside the file)"
        )
    try:
        mean = np.broadcast_to(np.float32(mean or stored.get("shift_factor") or 0), channels)
        std = np.broadcast_to(np.float32(std or 1) * (1 / float(factor)), channels)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise SfdError(f"the config.json beside it has factors that do not fit {channels} channels: {error}") from error
    empty = np.zeros(0, np.float32)
    return LatentStatistics(mean, std, empty, empty), notes


def _check(stored: Mapping[str, Any], sizes: Mapping[str, Any]) -> None:
    """Raise SfdError if `config.json` is of another architecture or of other weights."""
    for name, only in _ONLY.items():
        if stored.get(name, only) != only:
            raise SfdError(f"the config.json beside it says {name} {stored[name]}; only {only} is supported")
    for name, found in sizes.items():
        if stored.get(name, found) != found:
            raise SfdError(
                f"the config.json beside it says {name} {stored[name]}, but the arrays have {found}: replace it with "
                "that of the weights, or remove it"
            )
