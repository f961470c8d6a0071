"""LightningDiT: the table of its released state dicts, and its architecture from the shapes.

A SiT or DiT is one with LayerNorm, GELU, a learned sigma and neither rotary embedding nor q/k norm, under the same key
names. Their files do not say which they are, so the user must.
Source: the released code's models/lightningdit.py (key names), and the released files; SiT and DiT, models.py.
"""

import functools
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from sfd_jax.convert.table import Row, Table, dense_rows, shape_of
from sfd_jax.errors import SfdError
from sfd_jax.latents import LatentStatistics
from sfd_jax.models.lightning_dit import SIZES, DiTConfig
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


TABLE = Table(
    network="lightning_dit",
    rows=(
        *dense_rows("x_embedder.proj", "patch_embed", "conv"),
        *dense_rows("t_embedder.mlp.0", "time_embed/linear1"),
        *dense_rows("t_embedder.mlp.2", "time_embed/linear2"),
        *dense_rows("t_embedder_sem.mlp.0", "time_embed_semantic/linear1"),
        *dense_rows("t_embedder_sem.mlp.2", "time_embed_semantic/linear2"),
        *dense_rows("t_embedder_tex.mlp.0", "time_embed_texture/linear1"),
        *dense_rows("t_embedder_tex.mlp.2", "time_embed_texture/linear2"),
        Row("y_embedder.embedding_table.weight", "label_embed/embedding"),
        Row("blocks.{layer}.norm1.weight", "blocks/norm1/scale"),
        Row("blocks.{layer}.norm2.weight", "blocks/norm2/scale"),
        *dense_rows("blocks.{layer}.attn.qkv", "blocks/attention/qkv"),
        Row("blocks.{layer}.attn.q_norm.weight", "blocks/attention/q_norm/scale"),
        Row("blocks.{layer}.attn.q_norm.bias", "blocks/attention/q_norm/bias"),
        Row("blocks.{layer}.attn.k_norm.weight", "blocks/attention/k_norm/scale"),
        Row("blocks.{layer}.attn.k_norm.bias", "blocks/attention/k_norm/bias"),
        *dense_rows("blocks.{layer}.attn.proj", "blocks/attention/proj"),
        *dense_rows("blocks.{layer}.mlp.w12", "blocks/mlp/w12"),
        *dense_rows("blocks.{layer}.mlp.w3", "blocks/mlp/w3"),
        *dense_rows("blocks.{layer}.mlp.fc1", "blocks/mlp/fc1"),
        *dense_rows("blocks.{layer}.mlp.fc2", "blocks/mlp/fc2"),
        *dense_rows("blocks.{layer}.adaLN_modulation.1", "blocks/modulation"),
        Row("final_layer.norm_final.weight", "final/norm/scale"),
        *dense_rows("final_layer.adaLN_modulation.1", "final/modulation"),
        *dense_rows("final_layer.linear", "final/linear"),
        *dense_rows("repa_projector.0", "repa_projector/linear1"),
        *dense_rows("repa_projector.2", "repa_projector/linear2"),
        *dense_rows("repa_projector.4", "repa_projector/linear3"),
        *dense_rows("repa_projector", "repa_projector/conv", "conv"),
    ),
    fixed=_fixed_tables,
)


def recognises(state: Mapping[str, Any]) -> bool:
    """Tell whether a state dict is a LightningDiT's (or a DiT's), by its keys."""
    return any(re.match(r"(blocks\.\d+|final_layer)\.adaLN_modulation\.", key) for key in state)


def read_config(
    state: Mapping[str, Any], given: Mapping[str, Any], stored: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Read DiTConfig from keys and shapes; see the package.

    Shapes do not always determine three things. The number of heads comes from the q/k norm, else from
    the stored rotary table, else from the released size of that depth and width. The grid and the
    rotary embedding come from the stored fixed tables. `repa_depth` (which matters only in training)
    and the null label come from the file's config, else are as released. Where that config contradicts
    the shapes, it belongs to another network and is ignored.
    """
    notes: list[str] = []
    shape = functools.partial(shape_of, state)
    # The shapes of a block, by majority: a key that one block lacks, or has in another shape, is
    # named by the strict check later.
    found: dict[str, list[tuple]] = {}
    for key, array in state.items():
        if match := re.match(r"blocks\.\d+\.(.*)", key):
            found.setdefault(match[1], []).append(tuple(array.shape))
    block = {key: max(shapes, key=shapes.count) for key, shapes in found.items()}
    if "attn.proj.weight" not in block:
        raise SfdError("the state dict has no blocks.*.attn.proj.weight: it is not a complete LightningDiT")
    if any(key.startswith("projectors.") for key in state):
        raise SfdError(
            "it is a SiT trained by the code of REPA, whose time runs from 1 (noise) to 0 (data): not supported; use a "
            "SiT of its own authors or a LightningDiT"
        )
    width = block["attn.proj.weight"][0]
    depth = 1 + max(int(m[1]) for key in state if (m := re.match(r"blocks\.(\d+)\.", key)))
    _, channels, patch, _ = shape("x_embedder.proj.weight", rank=4)
    stated = stored.get("in_chans", channels)
    if stated != channels:
        notes.append(f"the config in the file says in_chans {stated}, the weights {channels}: weights win")
        stored = {}
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
    config["null_label"] = given.get("null_label", stored.get("class_dropout_prob") != 0)
    config["num_classes"] = rows - config["null_label"]
    if not {"null_label", "class_dropout_prob"} & (given.keys() | stored.keys()):
        notes.append(
            f"{config['num_classes']} classes and a null label: as released; the label table has {rows} rows, and the "
            "file does not say what the last one means (without null label give --set null_label=false)"
        )
    if any(key.startswith("repa_projector.") for key in state):
        if "repa_projector.weight" in state:
            config["repa_projector"], config["repa_features"] = "conv", shape("repa_projector.weight", rank=4)[0]
        else:
            config["repa_width"] = shape("repa_projector.0.weight")[0]
            config["repa_features"] = shape("repa_projector.4.weight")[0]
        config["repa_depth"] = stored.get("repa_depth") or min(2, depth)
        if not {"repa_depth"} & (given.keys() | stored.keys()):
            notes.append(f"repa_depth {config['repa_depth']}: as released; the file does not say")
    config |= _grid(state, patch, given)
    if "num_heads" not in given:
        config["num_heads"] = _num_heads(state, block, width, depth, notes)
    return config | dict(given), notes


# Released names of the path and of what is predicted, and their values here; the first is the default. Only "ddpm" is
# not of the released code.
TRANSPORT = {
    "path_type": ("linear", "gvp", "vp", "ddpm"),
    "prediction": ("velocity", "noise", "score"),
    "loss_weight": ("none", "velocity", "likelihood"),
}


def read_system(
    config: DiTConfig,
    stored: Mapping[str, Any],
    statistics: LatentStatistics | None,
    semantic_channels: int | None = None,
    transport: Mapping[str, str] = MappingProxyType({}),
) -> tuple[dict[str, Any], list[str]]:
    """Determine which channels are semantic, and with which clocks, path and prediction the network was trained.

    Args:
      config: the network's.
      stored: the file's own config, by the released names of its fields.
      statistics: of the latents, where given; they have the number of channels of each group.
      semantic_channels: what the user states; it wins.
      transport: the same for keys of TRANSPORT.

    Returns:
      The groups `latents` (where known), `clocks` and, unless it predicts the velocity of the linear path, `loss` of a
      config (see configs/sfd.py), and notes.

    Raises:
      SfdError: the number of semantic channels or the statistics do not fit the network, the file's config names an
        unknown path or prediction, or it is a SiT or DiT and nothing says which.
    """
    channels, notes = config.in_channels, []
    if stored.get("in_chans", channels) != channels:
        stored = {}  # the config of another network
    system = _transport({**stored, **transport})
    if "prediction" not in {**stored, **transport} and not config.two_clocks:
        if not (config.use_rope or config.use_rmsnorm or config.use_swiglu):
            raise SfdError(
                "it is a SiT or a DiT, and the file does not say which; the same weights predict the velocity or the "
                "noise: give --prediction=velocity for SiT, --prediction=noise --path_type=ddpm for DiT"
            )
        notes.append("prediction: velocity of the linear path is assumed, as in LightningDiT; the file does not say")
    if config.learn_sigma:
        notes.append("the learned sigma is kept in the weights and not used: samplers need the prediction alone")
    if statistics is not None:
        found = (statistics.texture_mean.size, statistics.semantic_mean.size)
        if semantic_channels is None and config.two_clocks:
            semantic_channels = stored.get("semantic_chans")
        if sum(found) != channels or semantic_channels not in (None, found[1]):
            raise SfdError(
                f"statistics of {found[0]} texture and {found[1]} semantic channels do not fit a "
                f"network of {channels} channels"
                + (f", {semantic_channels} of them semantic" if semantic_channels is not None else "")
            )
        semantic_channels = found[1]
        if semantic_channels:
            notes.append(f"{found[0]} texture and {found[1]} semantic channels: from the given statistics")
    else:
        notes.append("no latent statistics: sampling needs them; give --statistics (and --semantic_statistics)")
    if semantic_channels is None and not config.two_clocks:
        notes.append(f"all {channels} channels are texture: there is one clock (else give --semantic_channels)")
    if semantic_channels is None:
        semantic_channels = stored.get("semantic_chans") if config.two_clocks else 0
    if semantic_channels is None and channels == 48:
        semantic_channels = 16
        notes.append("16 of 48 channels are semantic: as released; the file does not say")
    if config.two_clocks:
        clocks = {"name": "fixed_offset", "delta_t": stored.get("semfirst_delta_t", 0.3)}
        if "semfirst_delta_t" not in stored:
            notes.append("delta_t 0.3: as released; the file does not say")
    else:
        clocks = {"name": "synchronous", "delta_t": 0.0}
    if semantic_channels is None:
        notes.append(
            f"the file does not say how many of the {channels} channels are semantic; sampling needs it: give "
            "--statistics and --semantic_statistics, or --semantic_channels NUMBER"
        )
        return system | {"clocks": clocks}, notes
    if not 0 <= semantic_channels < channels:
        raise SfdError(f"{semantic_channels} semantic channels do not fit a network of {channels}")
    texture_channels = channels - semantic_channels
    latents = {"texture_channels": texture_channels, "semantic_channels": semantic_channels}
    return system | {"latents": latents, "clocks": clocks}, notes


def _transport(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return {"loss": {"path": ..., "prediction": ...}} by the file's config; {} for linear and velocity."""
    found = {}
    for name, values in TRANSPORT.items():
        found[name] = str(stored.get(name) or values[0]).lower()
        if found[name] not in values:
            raise SfdError(f"the config in the file says {name} {stored[name]}; {', '.join(values)} are supported")
    path, prediction = {"name": found["path_type"]}, {"name": found["prediction"]}
    if (path["name"], prediction["name"]) == ("linear", "velocity"):
        return {}
    if prediction["name"] != "velocity":  # otherwise without effect in the released loss too
        prediction["weight"] = found["loss_weight"]
    return {"loss": {"path": path, "prediction": prediction}}


def wrap(state: dict[str, np.ndarray], metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the file tree that the released code reads."""
    raw = (metadata.get("foreign") or {}).get("weights") == "raw"
    return {"model" if raw else "ema": state}


def _mlp_ratio(block: Mapping[str, tuple], width: int) -> float:
    if "mlp.fc1.weight" in block:
        return block["mlp.fc1.weight"][0] / width
    hidden = block.get("mlp.w12.weight", (int(2 / 3 * 4 * width) * 2,))[0] // 2
    # hidden = int(2/3 int(ratio D)): the released ratio where it fits, else the smallest that fits.
    if hidden == int(2 / 3 * (4 * width)):
        return 4.0
    return next((wide / width for wide in range(width, 32 * width) if int(2 / 3 * wide) == hidden), 4.0)


def _grid(state, patch: int, given) -> dict[str, Any]:
    if "pos_embed" not in state:
        unknown = [name for name in ("input_size", "use_rope") if name not in given]
        if unknown:
            raise SfdError(
                "the file lacks the fixed tables (pos_embed, feat_rope.*) that determine the size of the "
                "latent grid and whether there is a rotary embedding: give "
                + " ".join(f"--set {name}=VALUE" for name in unknown)
            )
        return {}
    tokens = tuple(state["pos_embed"].shape)[1]
    side = round(tokens**0.5)
    if side * side != tokens:
        raise SfdError(f"pos_embed has {tokens} tokens, which is not a square grid")
    return {"input_size": side * patch, "use_rope": "feat_rope.freqs_cos" in state}


def _num_heads(state, block, width: int, depth: int, notes: list[str]) -> int:
    if "attn.q_norm.weight" in block:
        return width // block["attn.q_norm.weight"][0]
    if "feat_rope.freqs_cos" in state:
        return width // tuple(state["feat_rope.freqs_cos"].shape)[-1]
    for name, size in SIZES.items():
        if (size["depth"], size["width"]) == (depth, width):
            notes.append(f"num_heads {size['num_heads']}: that of the released size {name}")
            return size["num_heads"]
    raise SfdError(
        f"the shapes determine the width ({width}) but, without q/k norm and rotary table, not the number of "
        "heads: give --set num_heads=NUMBER"
    )
