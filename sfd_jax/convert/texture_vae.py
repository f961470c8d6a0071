"""Texture VAE: the table of latent-diffusion's and MAR's state dicts, and the architecture from the shapes.

Our paths are their keys with slashes, so rows are made from a list of paths; only the layout of
convolutions changes. Source: latent-diffusion, ldm/modules/diffusionmodules/model.py; MAR,
models/vae.py (key names).
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from sfd_jax.convert.table import Row, Table, shape_of

_BLOCKS = ("encoder/down/{i}/block/{j}", "decoder/up/{i}/block/{j}") + tuple(
    f"{side}/mid/block_{j}" for side in ("encoder", "decoder") for j in (1, 2)
)
_ATTENTIONS = ("encoder/down/{i}/attn/{j}", "decoder/up/{i}/attn/{j}") + tuple(
    f"{side}/mid/attn_1" for side in ("encoder", "decoder")
)
_CONVS = (
    *[f"{block}/{conv}" for block in _BLOCKS for conv in ("conv1", "conv2", "nin_shortcut")],
    *[f"{attn}/{conv}" for attn in _ATTENTIONS for conv in ("q", "k", "v", "proj_out")],
    *[f"{side}/{conv}" for side in ("encoder", "decoder") for conv in ("conv_in", "conv_out")],
    "encoder/down/{i}/downsample/conv",
    "decoder/up/{i}/upsample/conv",
    "quant_conv",
    "post_quant_conv",
)
_NORMS = (
    *[f"{block}/{norm}" for block in _BLOCKS for norm in ("norm1", "norm2")],
    *[f"{attn}/norm" for attn in _ATTENTIONS],
    "encoder/norm_out",
    "decoder/norm_out",
)


def _rows(paths, ours: str, layout: str) -> list[Row]:
    rows = []
    for path in paths:
        key = path.replace("/", ".")
        rows.append(Row(f"{key}.weight", f"{path}/{ours}", layout))
        rows.append(Row(f"{key}.bias", f"{path}/bias"))
    return rows


TABLE = Table(
    network="texture_vae",
    rows=(*_rows(_CONVS, "kernel", "conv"), *_rows(_NORMS, "scale", "same")),
    # Only for training: perceptual loss and discriminator; VA-VAE's alignment with a foundation model.
    skipped=("loss.*", "foundation_model.*", "linear_proj.*"),
)


def recognises(state: Mapping[str, Any]) -> bool:
    """Tell whether a state dict is a texture VAE's, by its keys."""
    return any(re.match(r"(encoder\.down|decoder\.up)\.\d+\.block\.", key) for key in state)


def read_config(
    state: Mapping[str, Any], given: Mapping[str, Any], stored: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Read TextureVAEConfig from keys and shapes, which lack only the groups of GroupNorm; see the package."""

    def indices(pattern: str) -> list[int]:
        return sorted({int(m[1]) for key in state if (m := re.match(pattern, key))})

    ch = shape_of(state, "encoder.conv_in.weight", rank=4)[0]
    levels = 1 + max(indices(r"encoder\.down\.(\d+)\."), default=0)
    widths = [shape_of(state, f"encoder.down.{i}.block.0.conv1.weight", rank=4)[0] for i in range(levels)]
    attention = indices(r"encoder\.down\.(\d+)\.attn\.")
    up_attention = indices(r"decoder\.up\.(\d+)\.attn\.")
    config = dict(
        z_channels=shape_of(state, "post_quant_conv.weight", rank=4)[0],
        ch=ch,
        ch_mult=[max(1, width // ch) for width in widths],
        num_res_blocks=1 + max(indices(r"encoder\.down\.\d+\.block\.(\d+)\."), default=0),
        attention_levels=attention,
        variant="mar" if attention and not up_attention else "ldm",
    )
    notes = [] if "norm_groups" in given else ["norm_groups 32: as in all released ones; the file does not say"]
    return config | dict(given), notes


def wrap(state: dict[str, np.ndarray], metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the file tree that the released code reads."""
    return {"state_dict": state}
