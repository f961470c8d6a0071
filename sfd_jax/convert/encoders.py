"""Visual encoders as stored by Hugging Face transformers: their tables, and how the architecture is read.

Shapes determine most of an architecture; `config.json` beside the weights has heads, activation and epsilon. Text
towers, pooling heads and decoders are skipped by name. Source: transformers, the modeling_*.py of dinov3_vit, siglip,
clip, vit_mae and dinov2_with_registers (key names).
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from sfd_jax.convert.file_kinds import fits
from sfd_jax.convert.table import Row, Table, dense_rows, shape_of
from sfd_jax.errors import SfdError
from sfd_jax.models.network import NETWORKS

_HUB = "use the model.safetensors of its Hugging Face repository"
# Keys of similar files that are not supported -> what these files are.
_OTHERS = {
    "*stages.0.layers.0.depthwise_conv.weight": "a DINOv3 ConvNeXt, which has no patch tokens; use a DINOv3 ViT",
    "storage_tokens": f"a DINOv3 with the key names of its first release; {_HUB}",
    "visual.conv1.weight": f"a CLIP with the key names of its first release; {_HUB}",
}
_TOWERS = ("text_model.*", "logit_scale", "logit_bias", "text_projection.*", "visual_projection.*", "*position_ids")
# config.json -> fields of our configs.
_FIELDS = {"num_attention_heads": "num_heads", "layer_norm_eps": "epsilon", "hidden_act": "activation"}
_FIELDS |= {"rope_theta": "rope_theta"}
_SIZES = {"hidden_size": "width", "num_hidden_layers": "depth", "patch_size": "patch_size"}


def norm_rows(theirs: str, ours: str) -> tuple[Row, Row]:
    """Return the rows of the weight and bias of a LayerNorm."""
    return Row(f"{theirs}.weight", f"{ours}/scale"), Row(f"{theirs}.bias", f"{ours}/bias")


def block_rows(
    layer: str, norm1: str, qkv: tuple[str, str, str], proj: str, norm2: str, fc1: str, fc2: str, key_bias: bool = True
) -> list[Row]:
    """Return the rows of a block with separate queries, keys and values; `layer` prefixes the other names."""
    norm1, proj, norm2, fc1, fc2 = (f"{layer}.{name}" for name in (norm1, proj, norm2, fc1, fc2))
    biased = qkv if key_bias else (qkv[0], qkv[2])
    return [
        *norm_rows(norm1, "blocks/norm1"),
        Row(tuple(f"{layer}.{part}.weight" for part in qkv), "blocks/attention/qkv/kernel", "linear"),
        Row(tuple(f"{layer}.{part}.bias" for part in biased), "blocks/attention/qkv/bias"),
        *dense_rows(proj, "blocks/attention/proj"),
        *norm_rows(norm2, "blocks/norm2"),
        *dense_rows(fc1, "blocks/mlp/fc1"),
        *dense_rows(fc2, "blocks/mlp/fc2"),
    ]


class EncoderFormat:
    """The key names of one encoder in one kind of file; an entry of `convert.FORMATS`.

    Args:
      table: its table.
      marks: our paths of two or three arrays; a file with at least two of their keys has this format.
      model_types: the `model_type`s of its `config.json`; empty if it comes without one.
      heads: number of heads if `config.json` does not state it.
    """

    def __init__(self, table: Table, marks: tuple[str, ...], model_types: tuple[str, ...] = (), heads: int = 12):
        self.TABLE, self.reads_config_json, self._heads = table, bool(model_types), heads
        self._model_types = model_types
        self._theirs = {row.ours: row.theirs if isinstance(row.theirs, str) else row.theirs[0] for row in table.rows}
        self._marks = [self._theirs[mark].format(layer=0) for mark in marks]

    def recognises(self, state: Mapping[str, Any]) -> bool:
        """Return whether a state dict has this format."""
        return sum(mark in state for mark in self._marks) >= 2

    def read_config(
        self, state: Mapping[str, Any], given: Mapping[str, Any], stored: Mapping[str, Any]
    ) -> tuple[dict[str, Any], list[str]]:
        """Read the architecture off the keys, the shapes and `config.json`.

        Args:
          state: their arrays by key.
          given: config fields set by the user; they take precedence.
          stored: content of `config.json`, or empty: then heads are 64 wide unless `given` says otherwise.

        Returns:
          The fields of the network's config, and a note for each that was assumed.

        Raises:
          SfdError: not a supported encoder, unknown number of heads, or the `config.json` of other weights.
        """
        theirs, cls = self._theirs, NETWORKS[self.TABLE.network][0]
        if len(shape_of(state, theirs["patch_embed/kernel"])) == 2:
            raise SfdError(
                "it is a SigLIP 2 NaFlex, for images of any shape; use one of fixed size, such as patch16-256"
            )
        if stored.get("use_gated_mlp"):
            raise SfdError("it has a gated MLP (DINOv3 S+, H+ or 7B); use a DINOv3 ViT-S, -B or -L")
        width, _, patch, _ = shape_of(state, theirs["patch_embed/kernel"], rank=4)
        prefix = theirs["blocks/norm1/scale"].partition("{layer}")[0]
        blocks = [int(match[1]) for key in state if (match := re.match(re.escape(prefix) + r"(\d+)\.", key))]
        if not blocks:
            raise SfdError(f"the state dict has no {prefix}*: it is not a complete {self.TABLE.network}")
        fields: dict[str, Any] = dict(width=width, depth=1 + max(blocks), patch_size=patch)
        if cls.position_table:
            places = shape_of(state, theirs["pos_embed"])[-2] - cls.class_token
            side = round(places**0.5)
            if side * side != places:
                raise SfdError(f"{theirs['pos_embed']} has {places} patches, which is not a square grid")
            fields["image_size"] = side * patch
        if key := theirs.get("register_tokens"):
            fields["num_registers"] = tuple(state[key].shape)[1] if key in state else 0
        if key := theirs.get("blocks/mlp/w12/kernel"):
            fields["ffn"] = "swiglu" if key.format(layer=min(blocks)) in state else "mlp"
        if fields.get("ffn") != "swiglu":
            hidden = shape_of(state, theirs["blocks/mlp/fc1/kernel"].format(layer=min(blocks)), rank=2)[0]
            fields["mlp_width"] = None if hidden == 4 * width else hidden
        notes = []
        if self.reads_config_json and "model_type" in stored:
            self._compare(fields, stored)
            fields["num_heads"] = self._heads
            known = {field.name for field in dataclasses.fields(cls)}
            fields |= {ours: stored[name] for name, ours in _FIELDS.items() if name in stored and ours in known}
        elif "num_heads" not in given:
            if width % 64:
                raise SfdError(
                    f"the number of heads is not in the file, and the usual head width of 64 does not divide the "
                    f"width {width}: give --set num_heads=NUMBER"
                )
            fields["num_heads"] = width // 64
            notes.append(f"num_heads {width // 64}: released heads are 64 wide")
        return fields | dict(given), notes

    def _compare(self, fields: Mapping[str, Any], stored: Mapping[str, Any]) -> None:
        """Raise SfdError if `config.json` belongs to other weights."""
        if stored["model_type"] not in self._model_types:
            raise SfdError(
                f"the config.json beside it is of a '{stored['model_type']}', but the arrays are of "
                f"{' or '.join(self._model_types)}: replace it with that of the weights, or remove it"
            )
        for name, ours in _SIZES.items():
            if stored.get(name, fields[ours]) != fields[ours]:
                raise SfdError(
                    f"the config.json beside it says {name} {stored[name]}, but the arrays have {fields[ours]}: "
                    "replace it with that of the weights, or remove it"
                )

    def wrap(self, state: dict[str, np.ndarray], metadata: Mapping[str, Any]) -> dict[str, Any]:
        """Return the file tree that the released code reads: the state dict itself."""
        return state


def refuse_others(state: Mapping[str, Any]) -> None:
    """Raise SfdError for the state dict of a known encoder that no format supports."""
    for pattern, what in _OTHERS.items():
        if any(fits(key, (pattern,)) for key in state):
            raise SfdError(f"it is {what}")
    if any(key.startswith("text_model.") for key in state) and "embeddings.position_embedding.weight" not in state:
        raise SfdError(f"it is the text tower of a CLIP or SigLIP without the image tower; {_HUB}")


DINOV3 = EncoderFormat(
    Table(
        network="dinov3",
        rows=(
            Row("embeddings.cls_token", "cls_token"),
            Row("embeddings.register_tokens", "register_tokens"),
            Row("embeddings.mask_token", "mask_token", "first"),
            *dense_rows("embeddings.patch_embeddings", "patch_embed", "conv"),
            *block_rows(
                "layer.{layer}",
                "norm1",
                ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
                "attention.o_proj",
                "norm2",
                "mlp.up_proj",
                "mlp.down_proj",
                key_bias=False,
            ),
            Row("layer.{layer}.layer_scale1.lambda1", "blocks/scale1/gamma"),
            Row("layer.{layer}.layer_scale2.lambda1", "blocks/scale2/gamma"),
            *norm_rows("norm", "norm"),
        ),
    ),
    ("patch_embed/kernel", "blocks/attention/qkv/kernel", "blocks/mlp/fc1/kernel"),
    ("dinov3_vit",),
    heads=6,
)
_SHARED = (
    Row("embeddings.position_embedding.weight", "pos_embed", "batched"),
    *dense_rows("embeddings.patch_embedding", "patch_embed", "conv"),
    *block_rows(
        "encoder.layers.{layer}",
        "layer_norm1",
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "self_attn.out_proj",
        "layer_norm2",
        "mlp.fc1",
        "mlp.fc2",
    ),
)
SIGLIP2 = EncoderFormat(
    Table("siglip2", (*_SHARED, *norm_rows("post_layernorm", "norm")), skipped=("head.*", *_TOWERS)),
    ("pos_embed", "patch_embed/bias"),  # which CLIP lacks
    ("siglip", "siglip_vision_model"),
)
CLIP = EncoderFormat(
    Table(
        "clip",
        (
            *_SHARED,
            Row("embeddings.class_embedding", "cls_token", "vector"),
            *norm_rows("pre_layrnorm", "pre_norm"),
        ),
        skipped=("post_layernorm.*", *_TOWERS),
    ),
    ("cls_token", "pre_norm/scale", "pre_norm/bias"),
    ("clip", "clip_vision_model"),
)
MAE = EncoderFormat(
    Table(
        "mae",
        (
            Row("embeddings.cls_token", "cls_token"),
            Row("embeddings.position_embeddings", "pos_embed"),
            *dense_rows("embeddings.patch_embeddings.projection", "patch_embed", "conv"),
            *block_rows(
                "encoder.layer.{layer}",
                "layernorm_before",
                ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
                "attention.output.dense",
                "layernorm_after",
                "intermediate.dense",
                "output.dense",
            ),
            *norm_rows("layernorm", "norm"),
        ),
        skipped=("decoder.*",),
    ),
    ("pos_embed", "blocks/norm1/scale", "blocks/mlp/fc1/kernel"),
    ("vit_mae",),
)
