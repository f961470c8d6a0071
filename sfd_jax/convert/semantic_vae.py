"""Semantic VAE: the table of its released state dicts, and its architecture from the shapes.

Encoder and decoder are lists of layers with the same numbers in both formats; the four architectures
differ in their layers. Source: released semantic autoencoder (key names).
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import yaml

from sfd_jax.convert.table import Row, Table, dense_rows, shape_of
from sfd_jax.errors import SfdError


def _tower(side: str) -> tuple[Row, ...]:
    theirs, ours = f"{side}.{{i}}", f"{side}/layers/{{i}}"
    return (
        *dense_rows(theirs, ours),
        Row(f"{theirs}.weight", f"{ours}/scale"),  # the LayerNorm before the last Linear
        *dense_rows(f"{theirs}.gate", f"{ours}/gate"),
        *dense_rows(f"{theirs}.up", f"{ours}/up"),
        *[
            Row(f"{theirs}.{norm}.{weight}", f"{ours}/{norm}/{scale}")
            for norm in ("norm", "norm1", "norm2")
            for weight, scale in (("weight", "scale"), ("bias", "bias"))
        ],
        Row(f"{theirs}.attn.in_proj_weight", f"{ours}/attention/qkv/kernel", "linear"),
        Row(f"{theirs}.attn.in_proj_bias", f"{ours}/attention/qkv/bias"),
        *dense_rows(f"{theirs}.attn.out_proj", f"{ours}/attention/proj"),
        *dense_rows(f"{theirs}.mlp.0", f"{ours}/mlp/fc1"),
        *dense_rows(f"{theirs}.mlp.2", f"{ours}/mlp/fc2"),
    )


TABLE = Table(network="semantic_vae", rows=(*_tower("encoder"), *_tower("decoder")))


def recognises(state: Mapping[str, Any]) -> bool:
    """Tell whether a state dict is a Semantic VAE's, by its keys."""
    sides = {match[1] for key in state if (match := re.match(r"(encoder|decoder)\.\d+\.", key))}
    return sides == {"encoder", "decoder"}


def read_config(
    state: Mapping[str, Any], given: Mapping[str, Any], stored: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Read SemanticVAEConfig from keys and shapes; see the package.

    Shapes do not determine the number of attention heads: it comes from the YAML config in the file, else from the
    released width (6 heads at 768).
    """
    notes: list[str] = []
    encoder = [key.removeprefix("encoder.") for key in state if key.startswith("encoder.")]
    last = max(int(key.split(".")[0]) for key in encoder)

    def layers_with(name: str) -> int:
        return len({key.split(".")[0] for key in encoder if key.split(".", 1)[1].startswith(name)})

    attention, residual, gated = map(layers_with, ("attn.", "norm.", "gate."))
    arch = "transformer" if attention else "resnet" if residual else "mlp" if gated else "linear"
    first_in = "encoder.0.gate.weight" if arch == "mlp" else "encoder.0.weight"
    decoder_in = "decoder.0.gate.weight" if arch in ("mlp", "resnet") else "decoder.0.weight"
    hidden, input_dim = shape_of(state, first_in, rank=2)
    bottleneck = shape_of(state, decoder_in, rank=2)[1]
    outputs = shape_of(state, f"encoder.{last}.weight", rank=2)[0]
    if outputs not in (bottleneck, 2 * bottleneck):
        raise SfdError(
            f"encoder.{last}.weight gives {outputs} channels and {decoder_in} takes {bottleneck}: "
            "expected equally many (autoencoder) or twice as many (variational)"
        )
    config: dict[str, Any] = dict(
        arch=arch,
        input_dim=input_dim,
        bottleneck_dim=bottleneck,
        variational=outputs == 2 * bottleneck,
    )
    if arch != "linear":
        config["hidden_dim"] = hidden
    if arch in ("mlp", "resnet"):
        config["num_layers"] = gated + 1
    if arch == "resnet":
        config["num_res_blocks"] = residual
    if arch == "transformer":
        config["transformer_blocks"] = attention
        if "transformer_heads" not in given:
            config["transformer_heads"] = _heads(stored, hidden, notes)
    return config | dict(given), notes


def wrap(state: dict[str, np.ndarray], metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the file tree that the released code reads."""
    config = metadata["network_config"]
    params = {"hidden_dim": config["hidden_dim"]} if config["arch"] != "linear" else {}
    for arch, fields in {
        "mlp": ("num_layers",),
        "resnet": ("num_layers", "num_res_blocks"),
        "transformer": ("transformer_heads", "transformer_blocks"),
    }.items():
        if config["arch"] == arch:
            params |= {field: config[field] for field in fields}
    model = {key: config[key] for key in ("arch", "variational", "bottleneck_dim")}
    return {
        "iteration": metadata.get("step", 0),
        "model_state_dict": state,
        "config": yaml.safe_dump({"model": model | {"params": params}}, sort_keys=False),
        "input_dim": config["input_dim"],
        "bottleneck_dim": config["bottleneck_dim"],
    }


def _heads(stored: Mapping[str, Any], hidden: int, notes: list[str]) -> int:
    if isinstance(stored.get("transformer_heads"), int):
        return stored["transformer_heads"]
    if hidden == 768:
        notes.append("transformer_heads 6: as released; the file does not say")
        return 6
    raise SfdError(
        "the shapes do not determine the number of attention heads and the file has no config: "
        "give --set transformer_heads=NUMBER"
    )
