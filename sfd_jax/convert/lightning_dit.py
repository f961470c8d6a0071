"""LightningDiT: the table of its released state dicts, and its architecture read off the shapes.

Source: the released code's models/lightningdit.py (key names), facts of the released files.
"""

import functools
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from sfd_jax.convert.table import Row, Table, shape_of
from sfd_jax.errors import SfdError
from sfd_jax.models.lightning_dit import SIZES
from sfd_jax.models.positions import rotary_2d, sincos_2d


def _fixed_tables(config) -> dict[str, np.ndarray]:
    """Return the position tables that their files store as buffers."""
    grid = config.input_size // config.patch_size
    tables = {"pos_embed": sincos_2d(config.width, grid)[None]}
    if config.use_rope:
        cos, sin_next, sin_previous = rotary_2d(config.width // config.num_heads, grid)
        tables["feat_rope.freqs_cos"] = cos
        tables["feat_rope.freqs_sin"] = sin_previous - sin_next
    return tables


def _dense(theirs: str, ours: str) -> tuple[Row, Row]:
    return (
        Row(f"{theirs}.weight", f"{ours}/kernel", "linear"),
        Row(f"{theirs}.bias", f"{ours}/bias"),
    )


TABLE = Table(
    network="lightning_dit",
    rows=(
        Row("x_embedder.proj.weight", "patch_embed/kernel", "conv"),
        Row("x_embedder.proj.bias", "patch_embed/bias"),
        *_dense("t_embedder.mlp.0", "time_embed/linear1"),
        *_dense("t_embedder.mlp.2", "time_embed/linear2"),
        *_dense("t_embedder_sem.mlp.0", "time_embed_semantic/linear1"),
        *_dense("t_embedder_sem.mlp.2", "time_embed_semantic/linear2"),
        *_dense("t_embedder_tex.mlp.0", "time_embed_texture/linear1"),
        *_dense("t_embedder_tex.mlp.2", "time_embed_texture/linear2"),
        Row("y_embedder.embedding_table.weight", "label_embed/embedding"),
        Row("blocks.{layer}.norm1.weight", "blocks/norm1/scale"),
        Row("blocks.{layer}.norm2.weight", "blocks/norm2/scale"),
        *_dense("blocks.{layer}.attn.qkv", "blocks/attention/qkv"),
        Row("blocks.{layer}.attn.q_norm.weight", "blocks/attention/q_norm/scale"),
        Row("blocks.{layer}.attn.q_norm.bias", "blocks/attention/q_norm/bias"),
        Row("blocks.{layer}.attn.k_norm.weight", "blocks/attention/k_norm/scale"),
        Row("blocks.{layer}.attn.k_norm.bias", "blocks/attention/k_norm/bias"),
        *_dense("blocks.{layer}.attn.proj", "blocks/attention/proj"),
        *_dense("blocks.{layer}.mlp.w12", "blocks/mlp/w12"),
        *_dense("blocks.{layer}.mlp.w3", "blocks/mlp/w3"),
        *_dense("blocks.{layer}.mlp.fc1", "blocks/mlp/fc1"),
        *_dense("blocks.{layer}.mlp.fc2", "blocks/mlp/fc2"),
        *_dense("blocks.{layer}.adaLN_modulation.1", "blocks/modulation"),
        Row("final_layer.norm_final.weight", "final/norm/scale"),
        *_dense("final_layer.adaLN_modulation.1", "final/modulation"),
        *_dense("final_layer.linear", "final/linear"),
        *_dense("repa_projector.0", "repa_projector/linear1"),
        *_dense("repa_projector.2", "repa_projector/linear2"),
        *_dense("repa_projector.4", "repa_projector/linear3"),
    ),
    fixed=_fixed_tables,
)


def recognises(state: Mapping[str, Any]) -> bool:
    """Say whether a state dict is a LightningDiT's (or a DiT's), by its keys."""
    return any(".adaLN_modulation." in key for key in state)


def read_config(
    state: Mapping[str, Any], given: Mapping[str, Any] = {}
) -> tuple[dict[str, Any], list[str]]:
    """Read the architecture off the keys and shapes.

    Three things the shapes do not always tell. The number of heads: from the q/k norm, else from
    the stored rotary table, else from the published size of that depth and width. The grid and the
    rotary embedding: from the stored fixed tables. `repa_depth` (which matters in training alone)
    is taken as released.

    Args:
      state: their arrays by key, `module.` prefixes already removed.
      given: fields of DiTConfig that the user states; they win.

    Returns:
      The fields of DiTConfig, and a sentence for each that the shapes did not tell.

    Raises:
      SfdError: something must be given; the message says what.
    """
    notes: list[str] = []
    shape = functools.partial(shape_of, state)
    # What blocks have, by majority: a key that one block lacks, or has in another shape, is for
    # the strict check to name.
    found: dict[str, list[tuple]] = {}
    for key, array in state.items():
        if match := re.match(r"blocks\.\d+\.(.*)", key):
            found.setdefault(match[1], []).append(tuple(array.shape))
    block = {key: max(shapes, key=shapes.count) for key, shapes in found.items()}
    if "attn.proj.weight" not in block:
        raise SfdError("the state dict has no blocks.*.attn.proj.weight: no whole LightningDiT")
    width = block["attn.proj.weight"][0]
    depth = 1 + max(int(m[1]) for key in state if (m := re.match(r"blocks\.(\d+)\.", key)))
    _, channels, patch, _ = shape("x_embedder.proj.weight", rank=4)
    config: dict[str, Any] = dict(
        width=width,
        depth=depth,
        patch_size=patch,
        in_channels=channels,
        two_clocks=any(key.startswith(("t_embedder_sem.", "t_embedder_tex.")) for key in state),
        use_qknorm="attn.q_norm.weight" in block,
        use_swiglu="mlp.w12.weight" in block,
        use_rmsnorm="norm1.weight" in block,
        use_shift=block.get("adaLN_modulation.1.weight", (6 * width,))[0] != 4 * width,
        learn_sigma=shape("final_layer.linear.weight")[0] == 2 * patch**2 * channels,
        mlp_ratio=_mlp_ratio(block, width),
    )
    rows = shape("y_embedder.embedding_table.weight")[0]
    config["null_label"] = given.get("null_label", True)
    config["num_classes"] = rows - config["null_label"]
    if any(key.startswith("repa_projector.") for key in state):
        config["repa_width"] = shape("repa_projector.0.weight")[0]
        config["repa_features"] = shape("repa_projector.4.weight")[0]
        config["repa_depth"] = min(2, depth)
        if "repa_depth" not in given:
            notes.append(f"repa_depth {config['repa_depth']}: taken as released, shapes do not tell")
    config |= _grid(state, patch, given)
    if "num_heads" not in given:
        config["num_heads"] = _num_heads(state, block, width, depth, notes)
    return config | dict(given), notes


def _mlp_ratio(block: Mapping[str, tuple], width: int) -> float:
    if "mlp.fc1.weight" in block:
        return block["mlp.fc1.weight"][0] / width
    hidden = block.get("mlp.w12.weight", (int(2 / 3 * 4 * width) * 2,))[0] // 2
    # hidden = int(2/3 int(ratio D)): the published ratio where it fits, else the one that does.
    if hidden == int(2 / 3 * (4 * width)):
        return 4.0
    return next(
        (wide / width for wide in range(width, 32 * width) if int(2 / 3 * wide) == hidden), 4.0
    )


def _grid(state, patch: int, given) -> dict[str, Any]:
    if "pos_embed" not in state:
        unknown = [name for name in ("input_size", "use_rope") if name not in given]
        if unknown:
            raise SfdError(
                "the file lacks the fixed tables (pos_embed, feat_rope.*) that tell the size of the "
                "latent grid and whether there is a rotary embedding: state "
                + " ".join(f"--set {name}=VALUE" for name in unknown)
            )
        return {}
    tokens = tuple(state["pos_embed"].shape)[1]
    side = round(tokens**0.5)
    if side * side != tokens:
        raise SfdError(f"pos_embed has {tokens} tokens, which is no square grid")
    return {"input_size": side * patch, "use_rope": "feat_rope.freqs_cos" in state}


def _num_heads(state, block, width: int, depth: int, notes: list[str]) -> int:
    if "attn.q_norm.weight" in block:
        return width // block["attn.q_norm.weight"][0]
    if "feat_rope.freqs_cos" in state:
        return width // tuple(state["feat_rope.freqs_cos"].shape)[-1]
    for name, size in SIZES.items():
        if (size["depth"], size["width"]) == (depth, width):
            notes.append(f"num_heads {size['num_heads']}: that of the published size {name}")
            return size["num_heads"]
    raise SfdError(
        f"shapes tell the width ({width}) but, without q/k norm and rotary table, not the number of "
        "heads: state --set num_heads=NUMBER"
    )
