"""DINOv2: the tables of its original names and of Hugging Face's.

`dinov2` has the names of the original release (one fused qkv); `dinov2_hf` those of
`Dinov2WithRegistersModel` and `Dinov2Model` (separate query, key, value). Source: facebookresearch
dinov2/models/vision_transformer.py; transformers, modeling_dinov2_with_registers.py (key names).
"""

from sfd_jax.convert.encoders import EncoderFormat, block_rows, norm_rows
from sfd_jax.convert.table import Row, Table, dense_rows

_BLOCK = "blocks.{layer}"
TABLE = Table(
    network="dinov2",
    rows=(
        Row("cls_token", "cls_token"),
        Row("pos_embed", "pos_embed"),
        Row("register_tokens", "register_tokens"),
        Row("mask_token", "mask_token"),
        *dense_rows("patch_embed.proj", "patch_embed", "conv"),
        *norm_rows(f"{_BLOCK}.norm1", "blocks/norm1"),
        *dense_rows(f"{_BLOCK}.attn.qkv", "blocks/attention/qkv"),
        *dense_rows(f"{_BLOCK}.attn.proj", "blocks/attention/proj"),
        Row(f"{_BLOCK}.ls1.gamma", "blocks/scale1/gamma"),
        *norm_rows(f"{_BLOCK}.norm2", "blocks/norm2"),
        *dense_rows(f"{_BLOCK}.mlp.fc1", "blocks/mlp/fc1"),
        *dense_rows(f"{_BLOCK}.mlp.fc2", "blocks/mlp/fc2"),
        *dense_rows(f"{_BLOCK}.mlp.w12", "blocks/mlp/w12"),
        *dense_rows(f"{_BLOCK}.mlp.w3", "blocks/mlp/w3"),
        Row(f"{_BLOCK}.ls2.gamma", "blocks/scale2/gamma"),
        *norm_rows("norm", "norm"),
    ),
)

_LAYER = "encoder.layer.{layer}"
HF_TABLE = Table(
    network="dinov2",
    rows=(
        Row("embeddings.cls_token", "cls_token"),
        Row("embeddings.position_embeddings", "pos_embed"),
        Row("embeddings.register_tokens", "register_tokens"),
        Row("embeddings.mask_token", "mask_token"),
        *dense_rows("embeddings.patch_embeddings.projection", "patch_embed", "conv"),
        *block_rows(
            _LAYER,
            "norm1",
            ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
            "attention.output.dense",
            "norm2",
            "mlp.fc1",
            "mlp.fc2",
        ),
        Row(f"{_LAYER}.layer_scale1.lambda1", "blocks/scale1/gamma"),
        *dense_rows(f"{_LAYER}.mlp.weights_in", "blocks/mlp/w12"),
        *dense_rows(f"{_LAYER}.mlp.weights_out", "blocks/mlp/w3"),
        Row(f"{_LAYER}.layer_scale2.lambda1", "blocks/scale2/gamma"),
        *norm_rows("layernorm", "norm"),
    ),
)

ORIGINAL = EncoderFormat(TABLE, ("pos_embed", "patch_embed/kernel", "mask_token"))
HUGGING_FACE = EncoderFormat(
    HF_TABLE, ("pos_embed", "mask_token", "blocks/scale1/gamma"), ("dinov2", "dinov2_with_registers")
)
