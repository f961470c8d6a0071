"""DINOv2: the tables of its original names and of Hugging Face's, and the architecture from the shapes.

`dinov2` has the names of the original release (one fused qkv); `dinov2_hf` those of
`Dinov2WithRegistersModel` and `Dinov2Model` (query, key and value apart). Source: facebookresearch
dinov2/models/vision_transformer.py; transformers, modeling_dinov2_with_registers.py (key names).
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from sfd_jax.convert.table import Row, Table, dense_rows, shape_of
from sfd_jax.errors import SfdError


def _norm_rows(theirs: str, ours: str) -> tuple[Row, Row]:
    return Row(f"{theirs}.weight", f"{ours}/scale"), Row(f"{theirs}.bias", f"{ours}/bias")


_BLOCK = "blocks.{layer}"
TABLE = Table(
    network="dinov2",
    rows=(
        Row("cls_token", "cls_token"),
        Row("pos_embed", "pos_embed"),
        Row("register_tokens", "register_tokens"),
        Row("mask_token", "mask_token"),
        Row("patch_embed.proj.weight", "patch_embed/kernel", "conv"),
        Row("patch_embed.proj.bias", "patch_embed/bias"),
        *_norm_rows(f"{_BLOCK}.norm1", "blocks/norm1"),
        *dense_rows(f"{_BLOCK}.attn.qkv", "blocks/attention/qkv"),
        *dense_rows(f"{_BLOCK}.attn.proj", "blocks/attention/proj"),
        Row(f"{_BLOCK}.ls1.gamma", "blocks/scale1/gamma"),
        *_norm_rows(f"{_BLOCK}.norm2", "blocks/norm2"),
        *dense_rows(f"{_BLOCK}.mlp.fc1", "blocks/mlp/fc1"),
        *dense_rows(f"{_BLOCK}.mlp.fc2", "blocks/mlp/fc2"),
        *dense_rows(f"{_BLOCK}.mlp.w12", "blocks/mlp/w12"),
        *dense_rows(f"{_BLOCK}.mlp.w3", "blocks/mlp/w3"),
        Row(f"{_BLOCK}.ls2.gamma", "blocks/scale2/gamma"),
        *_norm_rows("norm", "norm"),
    ),
)

# A tuple of their keys is one array of ours, joined in this order.
_LAYER = "encoder.layer.{layer}"
_QKV = tuple(f"{_LAYER}.attention.attention.{part}" for part in ("query", "key", "value"))
HF_TABLE = Table(
    network="dinov2",
    rows=(
        Row("embeddings.cls_token", "cls_token"),
        Row("embeddings.position_embeddings", "pos_embed"),
        Row("embeddings.register_tokens", "register_tokens"),
        Row("embeddings.mask_token", "mask_token"),
        Row("embeddings.patch_embeddings.projection.weight", "patch_embed/kernel", "conv"),
        Row("embeddings.patch_embeddings.projection.bias", "patch_embed/bias"),
        *_norm_rows(f"{_LAYER}.norm1", "blocks/norm1"),
        Row(tuple(f"{part}.weight" for part in _QKV), "blocks/attention/qkv/kernel", "linear"),
        Row(tuple(f"{part}.bias" for part in _QKV), "blocks/attention/qkv/bias"),
        *dense_rows(f"{_LAYER}.attention.output.dense", "blocks/attention/proj"),
        Row(f"{_LAYER}.layer_scale1.lambda1", "blocks/scale1/gamma"),
        *_norm_rows(f"{_LAYER}.norm2", "blocks/norm2"),
        *dense_rows(f"{_LAYER}.mlp.fc1", "blocks/mlp/fc1"),
        *dense_rows(f"{_LAYER}.mlp.fc2", "blocks/mlp/fc2"),
        *dense_rows(f"{_LAYER}.mlp.weights_in", "blocks/mlp/w12"),
        *dense_rows(f"{_LAYER}.mlp.weights_out", "blocks/mlp/w3"),
        Row(f"{_LAYER}.layer_scale2.lambda1", "blocks/scale2/gamma"),
        *_norm_rows("layernorm", "norm"),
    ),
)


class _Format:
    """One of the two sets of names, as a format of `convert.FORMATS`."""

    def __init__(self, table: Table):
        self.TABLE, self._theirs = table, {row.ours: row.theirs for row in table.rows}

    def recognises(self, state: Mapping[str, Any]) -> bool:
        """Say whether a state dict is a DINOv2's under these names."""
        return sum(self._theirs[ours] in state for ours in ("pos_embed", "patch_embed/kernel", "mask_token")) >= 2

    def read_config(
        self, state: Mapping[str, Any], given: Mapping[str, Any], stored: Mapping[str, Any]
    ) -> tuple[dict[str, Any], list[str]]:
        """Read the architecture from the keys and shapes; heads are 64 wide unless stated.

        Args:
          state: their arrays by key.
          given: fields of DinoV2Config that the user states; they win.
          stored: the file's own config; not needed.

        Returns:
          The fields of DinoV2Config, and a note for each that the shapes do not determine.

        Raises:
          SfdError: the user must state the number of heads.
        """
        notes: list[str] = []
        theirs = self._theirs
        width, _, patch, _ = shape_of(state, theirs["patch_embed/kernel"], rank=4)
        patches = shape_of(state, theirs["pos_embed"], rank=3)[1] - 1
        side = round(patches**0.5)
        if side * side != patches:
            raise SfdError(f"{theirs['pos_embed']} has {patches} patches, which is not a square grid")
        prefix = theirs["blocks/norm1/scale"].partition("{layer}")[0]
        blocks = [int(match[1]) for key in state if (match := re.match(re.escape(prefix) + r"(\d+)\.", key))]
        if not blocks:
            raise SfdError(f"the state dict has no {prefix}*: it is not a complete DINOv2")
        registers = state.get(theirs["register_tokens"])
        fused = theirs["blocks/mlp/w12/kernel"].format(layer=min(blocks)) in state
        config: dict[str, Any] = dict(
            width=width,
            depth=1 + max(blocks),
            image_size=side * patch,
            patch_size=patch,
            num_registers=0 if registers is None else tuple(registers.shape)[1],
            ffn="swiglu" if fused else "mlp",
        )
        if "num_heads" not in given:
            if width % 64:
                raise SfdError(
                    f"the shapes do not determine the number of heads, and the released head width of 64 "
                    f"does not divide the width {width}: give --set num_heads=NUMBER"
                )
            config["num_heads"] = width // 64
            notes.append(f"num_heads {width // 64}: released heads are 64 wide")
        return config | dict(given), notes

    def wrap(self, state: dict[str, np.ndarray], metadata: Mapping[str, Any]) -> dict[str, Any]:
        """Return the file tree that the released code reads: the state dict itself."""
        return state


ORIGINAL, HUGGING_FACE = _Format(TABLE), _Format(HF_TABLE)
