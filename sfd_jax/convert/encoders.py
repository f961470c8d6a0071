"""Visual encoders as Hugging Face's transformers stores them: the tables, and how architectures are read.

Shapes tell most of an architecture; heads, activation and epsilon stand in the `config.json` beside the weights. Text
towers, pooling heads and decoders are left out by name. Source: transformers, the modeling_*.py of dinov3_vit, siglip,
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

_HUB = "take the model.safetensors of its repository on the hub"
# Keys of files that are none of ours though they look alike -> what they are.
_OTHERS = {
    "*stages.0.layers.0.depthwise_conv.weight": "a DINOv3 ConvNeXt, which has no patch tokens; take a DINOv3 ViT",
    "storage_tokens": f"a DINOv3 under the names of its first release; {_HUB}",
    "visual.conv1.weight": f"a CLIP under the names of its first release; {_HUB}",
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
    """Return the rows of a block whose queries, keys and values are apart; `layer` goes before the other names."""
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
    """One naming of one encoder, in the form in which `convert.FORMATS` lists a format.

    Args:
      table: its table.
      marks: our paths of two arrays or three, two of whose keys tell it from all other files.
      model_types: what `config.json` may call it; none where no such file lies beside the weights.
      heads: how many a `config.json` means that does not say.
    """

    def __init__(self, table: Table, marks: tuple[str, ...], model_types: tuple[str, ...] = (), heads: int = 12):
        self.TABLE, self.reads_config_json, self._heads = table, bool(model_types), heads
        self._model_types = model_types
        self._theirs = {row.ours: row.theirs if isinstance(row.theirs, str) else row.theirs[0] for row in table.rows}
        self._marks = [self._theirs[mark].format(layer=0) for mark in marks]

    def recognises(self, state: Mapping[str, Any]) -> bool:
        """Say whether a state dict is this encoder's under these names."""
        return sum(mark in state for mark in self._marks) >= 2

    def read_config(
        self, state: Mapping[str, Any], given: Mapping[str, Any], stored: Mapping[str, Any]
    ) -> tuple[dict[str, Any], list[str]]:
        """Read the architecture off the keys, the shapes and `config.json`.

        Args:
          state: their arrays by key.
          given: fields of the config that the user states; they win.
          stored: `config.json`, if any; without it heads are 64 wide unless stated.

        Returns:
          The fields of the network's config, and a sentence for each that neither told.

        Raises:
          SfdError: the number of heads has to be stated, or `config.json` is of other weights.
        """
        theirs, cls = self._theirs, NETWORKS[self.TABLE.network][0]
        if len(shape_of(state, theirs["patch_embed/kernel"])) == 2:
            raise SfdError(
                "it is a SigLIP 2 NaFlex, of images of any shape; take one of a fixed size, such as patch16-256"
            )
        if stored.get("use_gated_mlp"):
            raise SfdError("it has a gated MLP (DINOv3 S+, H+ or 7B); take a DINOv3 ViT-S, -B or -L")
        width, _, patch, _ = shape_of(state, theirs["patch_embed/kernel"], rank=4)
        prefix = theirs["blocks/norm1/scale"].partition("{layer}")[0]
        blocks = [int(match[1]) for key in state if (match := re.match(re.escape(prefix) + r"(\d+)\.", key))]
        if not blocks:
            raise SfdError(f"the state dict has no {prefix}*: it is no whole {self.TABLE.network}")
        fields: dict[str, Any] = dict(width=width, depth=1 + max(blocks), patch_size=patch)
        if cls.position_table:
            places = shape_of(state, theirs["pos_embed"])[-2] - cls.class_token
            side = round(places**0.5)
            if side * side != places:
                raise SfdError(f"{theirs['pos_embed']} has {places} patches, which is no square grid")
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
                    f"the shapes do not tell the number of heads, and the released head width of 64 does not divide "
                    f"the width {width}: give --set num_heads=NUMBER"
                )
            fields["num_heads"] = width // 64
            notes.append(f"num_heads {width // 64}: released heads are 64 wide")
        return fields | dict(given), notes

    def _compare(self, fields: Mapping[str, Any], stored: Mapping[str, Any]) -> None:
        """Raise SfdError where `config.json` is not of these weights."""
        if stored["model_type"] not in self._model_types:
            raise SfdError(
                f"the config.json beside it is of a '{stored['model_type']}', and the arrays are those of "
                f"{' or '.join(self._model_types)}: put the weights' own there, or take it away"
            )
        for name, ours in _SIZES.items():
            if stored.get(name, fields[ours]) != fields[ours]:
                raise SfdError(
                    f"the config.json beside it says {name} {stored[name]}, and the arrays have {fields[ours]}: put "
                    "the weights' own there, or take it away"
                )

    def wrap(self, state: dict[str, np.ndarray], metadata: Mapping[str, Any]) -> dict[str, Any]:
        """Return the file tree that the released code reads: the state dict itself."""
        return state


def refuse_others(state: Mapping[str, Any]) -> None:
    """Raise SfdError where a state dict is an encoder's that no format reads, though it may look like one."""
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
