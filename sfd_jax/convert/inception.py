"""The FID Inception network: the table of pytorch-fid's state dict.

There is only one such network, so nothing is read from the shapes. Source: pytorch-fid, inception.py
(key names), release `fid_weights`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from sfd_jax.convert.table import Row, Table, dense_rows

_A = ("branch1x1", "branch5x5_1", "branch5x5_2", *(f"branch3x3dbl_{i}" for i in range(1, 4)), "branch_pool")
_B = ("branch3x3", *(f"branch3x3dbl_{i}" for i in range(1, 4)))
_C = ("branch1x1", *(f"branch7x7_{i}" for i in range(1, 4)), *(f"branch7x7dbl_{i}" for i in range(1, 6)), "branch_pool")
_D = ("branch3x3_1", "branch3x3_2", *(f"branch7x7x3_{i}" for i in range(1, 5)))
_THREE = ("branch3x3_1", "branch3x3_2a", "branch3x3_2b")
_E = ("branch1x1", *_THREE, *(f"branch3x3dbl_{i}" for i in ("1", "2", "3a", "3b")), "branch_pool")
_BLOCKS = dict.fromkeys(("Mixed_5b", "Mixed_5c", "Mixed_5d"), _A) | {"Mixed_6a": _B}
_BLOCKS |= dict.fromkeys(("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"), _C) | {"Mixed_7a": _D}
_BLOCKS |= dict.fromkeys(("Mixed_7b", "Mixed_7c"), _E)
_STEM = ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3")
_LAYERS = (*_STEM, *(f"{block}/{branch}" for block, names in _BLOCKS.items() for branch in names))


def _layer_rows(layer: str) -> list[Row]:
    key = layer.replace("/", ".")
    norm = [Row(f"{key}.bn.{name}", f"{layer}/bn/{name}") for name in ("weight", "bias", "running_mean", "running_var")]
    return [Row(f"{key}.conv.weight", f"{layer}/conv/kernel", "conv"), *norm]


TABLE = Table(
    network="inception",
    rows=(*[row for layer in _LAYERS for row in _layer_rows(layer)], *dense_rows("fc", "fc")),
    skipped=("*.num_batches_tracked",),
)


def recognises(state: Mapping[str, Any]) -> bool:
    """Tell whether a state dict is an Inception v3's, by its keys."""
    return any(key.startswith("Mixed_7c.") for key in state)


def read_config(
    state: Mapping[str, Any], given: Mapping[str, Any], stored: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Return `given` (the config has no fields) and no notes."""
    return dict(given), []


def wrap(state: dict[str, np.ndarray], metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the file tree that pytorch-fid reads: the state dict itself."""
    return state
