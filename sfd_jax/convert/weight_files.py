"""What a file of weights holds: its arrays, and which of several state dicts is meant.

Formats (facts of the released files): a LightningDiT's `{"ema"}` or `{"model", "ema", "opt",
"config"}`, a Semantic VAE's `{"model_state_dict", "config", ...}`, Lightning's `{"state_dict", ...}`,
a bare state dict, and .safetensors, which is one. Keys may carry the prefix of a wrapper.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from sfd_jax.convert.lazy_array import LazyArray
from sfd_jax.convert.safetensors_files import read_safetensors
from sfd_jax.convert.torch_files import read_torch_file, write_torch_file
from sfd_jax.errors import SfdError

# Where released files keep the weights being trained, in the order of preference.
RAW_KEYS = ("model", "model_state_dict", "state_dict")
EMA_KEY = "ema"
# Left by DistributedDataParallel and by torch.compile.
WRAPPERS = ("module.", "_orig_mod.")


@dataclasses.dataclass(frozen=True)
class WeightFile:
    """One state dict of a file, and what stands beside it.

    Args:
      state: arrays by key, prefixes of wrappers removed.
      which: "ema" or "raw".
      prefix: the prefix that was removed.
      config: the training config in the file (OmegaConf, YAML or a plain dict), {} where none.
      extras: the other entries that are plain scalars (iteration, input_dim, ...).
    """

    state: dict[str, LazyArray]
    which: str
    prefix: str
    config: dict[str, Any]
    extras: dict[str, Any]

    def stored(self) -> dict[str, Any]:
        """Return what the file says of itself, by last name: of its config and its scalars."""
        return _leaves(self.config) | self.extras


def read_tree(path: str | os.PathLike) -> Any:
    """Read a file's whole tree, arrays as `LazyArray`; by content, not by suffix.

    Raises:
      SfdError: not a file of a known format, damaged, or refused.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    return read_torch_file(path)


def choose_state(tree: Any, path: str | os.PathLike, which: str | None = None) -> WeightFile:
    """Pick a file's averaged or raw weights.

    Args:
      tree: from `read_tree`.
      path: the file, for messages.
      which: "ema", "raw", or None for the average where there is one.

    Raises:
      SfdError: the file holds no such weights; the message says what it holds.
    """
    if not isinstance(tree, dict) or not tree:
        raise SfdError(f"'{path}' holds a {type(tree).__name__}, not a dict of arrays")
    states = {key: tree[key] for key in (EMA_KEY, *RAW_KEYS) if _is_state(tree.get(key))}
    raw = next((key for key in RAW_KEYS if key in states), None)
    if not states and any(isinstance(value, LazyArray) for value in tree.values()):
        states, raw = {"": tree}, ""
    if which is None:
        which = "ema" if EMA_KEY in states else "raw"
    key = EMA_KEY if which == "ema" else raw
    if key is None or key not in states:
        held = ", ".join(repr(key) for key in tree) or "nothing"
        other = "--weights raw" if which == "ema" else "--weights ema"
        hint = f"; take {other}" if states else ""
        raise SfdError(f"'{path}' holds no {which} weights (it holds {held}){hint}")
    state, prefix = _without_prefix(states[key])
    strange = [key for key, value in state.items() if not isinstance(value, LazyArray)]
    if strange:
        raise SfdError(f"'{path}': not arrays: {', '.join(map(str, strange))}")
    beside = {} if key == "" else tree
    extras = {k: v for k, v in beside.items() if isinstance(v, (int, float, str)) and k != "config"}
    return WeightFile(state, which, prefix, _config(beside, path), extras)


def read_statistics(path: str | os.PathLike) -> tuple[np.ndarray, np.ndarray]:
    """Read a released statistics file (`{"mean", "std"}`, (1, C, 1, 1) each).

    Returns:
      mean and std, (C,) float32.

    Raises:
      SfdError: it is not such a file.
    """
    tree = read_tree(path)
    arrays = [tree.get(key) if isinstance(tree, dict) else None for key in ("mean", "std")]
    if not all(isinstance(array, LazyArray) for array in arrays):
        raise SfdError(f"'{path}' is no statistics file: it needs arrays 'mean' and 'std'")
    mean, std = (np.asarray(array).astype(np.float32) for array in arrays)
    if mean.shape != std.shape or mean.size != max(mean.shape, default=1):
        raise SfdError(f"'{path}': mean {mean.shape} and std {std.shape} are not one value a channel")
    return mean.reshape(-1), std.reshape(-1)


def write_file(path: str | os.PathLike, state: dict[str, np.ndarray], tree: dict[str, Any]) -> None:
    """Write an export, visible only once complete: the bare state for .safetensors, else the tree.

    Raises:
      SfdError: the file exists, its suffix is unknown, or it is a .pt and torch is missing.
    """
    path = Path(path)
    if path.exists():
        raise SfdError(f"'{path}' exists; nothing is overwritten, name another file")
    if path.suffix in (".pt", ".pth", ".ckpt"):
        return write_torch_file(path, tree)
    if path.suffix != ".safetensors":
        raise SfdError(f"'{path}': export to a name that ends in .pt, .pth, .ckpt or .safetensors")
    import safetensors.numpy

    unfinished = path.with_name(path.name + ".unfinished")
    # transformers asks for the entry "format"; other readers ignore it.
    safetensors.numpy.save_file(state, unfinished, metadata={"format": "pt"})
    unfinished.rename(path)


def describe(tree: Any) -> list[str]:
    """Return lines that say what a file holds, no array loaded."""
    lines: list[str] = []

    def walk(node, name, depth):
        indent = "  " * depth
        if isinstance(node, LazyArray):
            lines.append(f"{indent}{name}  {list(node.shape)} {node.dtype.name}")
        elif isinstance(node, dict):
            arrays = _arrays(node)
            numbers = sum(int(np.prod(a.shape)) for a in arrays)
            size = sum(int(np.prod(a.shape)) * a.dtype.itemsize for a in arrays)
            total = f"  {len(arrays)} arrays, {numbers:,} numbers, {size / 2**20:.1f} MiB" if arrays else ""
            lines.append(f"{indent}{name}:{total}" if node else f"{indent}{name}: (empty)")
            for key, value in node.items():
                walk(value, key, depth + 1)
        elif isinstance(node, (list, tuple)) and (_arrays(node) or len(node) > 16):
            lines.append(f"{indent}{name}: {len(node)} entries")
            for index, value in enumerate(node):
                if isinstance(value, (dict, LazyArray)):
                    walk(value, index, depth + 1)
        elif isinstance(node, str) and "\n" in node:
            lines.append(f"{indent}{name}: |")
            lines.extend(f"{indent}  {line}" for line in node.splitlines())
        else:
            lines.append(f"{indent}{name}: {node!r}")

    walk(tree, "file", 0)
    return lines


def _arrays(node) -> list[LazyArray]:
    if isinstance(node, LazyArray):
        return [node]
    children = node.values() if isinstance(node, dict) else node if isinstance(node, (list, tuple)) else ()
    return [array for child in children for array in _arrays(child)]


def _is_state(node: Any) -> bool:
    return isinstance(node, dict) and any(isinstance(value, LazyArray) for value in node.values())


def _without_prefix(state: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    removed = ""
    state = dict(state)
    while True:
        wrapper = next((w for w in WRAPPERS if all(str(key).startswith(w) for key in state)), None)
        if wrapper is None:
            return state, removed
        state = {key.removeprefix(wrapper): value for key, value in state.items()}
        removed += wrapper


def _config(beside: Mapping[str, Any], path) -> dict[str, Any]:
    config = beside.get("config")
    if isinstance(config, str):
        try:
            config = yaml.safe_load(config)
        except yaml.YAMLError as error:
            raise SfdError(f"'{path}': its config is not YAML: {error}") from error
    return config if isinstance(config, dict) else {}


def _leaves(config: dict[str, Any]) -> dict[str, Any]:
    """Flatten a config to {last name: value}; the outermost of equal names wins."""
    found = {str(key): value for key, value in config.items() if not isinstance(value, dict)}
    for group in config.values():
        if isinstance(group, dict):
            found = _leaves(group) | found
    return found
