"""LPIPS on VGG16: the table of the `lpips` package's and taming-transformers' state dict.

Files of texture VAEs trained with LPIPS contain it under `loss.perceptual_loss.`; saved without that
prefix, those arrays are such a state dict. Source: `lpips` 0.1.4, lpips/lpips.py, `LPIPS(net="vgg")`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from sfd_jax.convert.table import Row, Table, dense_rows

# Their slices keep the layers' numbers in VGG16's `features`.
_LAYERS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))


def _slice_rows(i: int) -> list[Row]:
    rows = [Row(f"lin{i}.model.1.weight", f"weights/{i}", "conv")]
    for j, number in enumerate(_LAYERS[i]):
        rows += dense_rows(f"net.slice{i + 1}.{number}", f"slices/{i}/{j}", "conv")
    return rows


TABLE = Table(
    network="lpips",
    rows=tuple(row for i in range(len(_LAYERS)) for row in _slice_rows(i)),
    # `lins` repeats lin0..lin4; the scaling is constant.
    skipped=("lins.*", "scaling_layer.*"),
)


def recognises(state: Mapping[str, Any]) -> bool:
    """Tell whether a state dict is LPIPS's, by its keys."""
    return "lin0.model.1.weight" in state and any(key.startswith("net.slice1.") for key in state)


def read_config(
    state: Mapping[str, Any], given: Mapping[str, Any], stored: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Read the channels from the shapes; no notes."""
    channels = [int(state[f"lin{i}.model.1.weight"].shape[1]) for i in range(len(_LAYERS))]
    return {"channels": channels} | dict(given), []


def wrap(state: dict[str, np.ndarray], metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the file tree that the original reads: the state dict itself."""
    return state
