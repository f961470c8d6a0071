"""What a file of weights holds: its arrays, and which of several state dicts is meant.

Formats (facts of the released files): a LightningDiT's `{"ema"}` or `{"model", "ema", "opt",
"config"}`, a Semantic VAE's `{"model_state_dict", "config", ...}`, Lightning's `{"state_dict", ...}`,
a bare state dict, and .safetensors, which is one. Keys may carry the prefix of a wrapper.
"""

import dataclasses
import json
import math
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
_MAX_CONFIG = 2**18  # characters of a config in YAML, its aliases written out


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
      mean and std, (C,) float32; finite, std positive.

    Raises:
      SfdError: it is not such a file, or a value cannot be the mean or deviation of a channel.
    """
    tree = read_tree(path)
    if not isinstance(tree, dict):
        raise SfdError(f"'{path}' is no statistics file: it holds one {type(tree).__name__}, not 'mean' and 'std'")
    arrays = [tree.get(key) for key in ("mean", "std")]
    if not all(isinstance(array, LazyArray) for array in arrays):
        held = ", ".join(map(repr, list(tree)[:8])) or "nothing"
        raise SfdError(f"'{path}' is no statistics file: it needs arrays 'mean' and 'std', and holds {held}")
    shapes = [array.shape for array in arrays]
    if shapes[0] != shapes[1] or not shapes[0] or math.prod(shapes[0]) != max(shapes[0]) or 0 in shapes[0]:
        raise SfdError(f"'{path}': mean {shapes[0]} and std {shapes[1]} are not one value a channel, (1, C, 1, 1)")
    if not all(array.dtype.name in ("float16", "bfloat16", "float32", "float64") for array in arrays):
        raise SfdError(f"'{path}': mean is {arrays[0].dtype} and std {arrays[1].dtype}, expected floats")
    with np.errstate(over="ignore"):  # an infinity of float32 is told below
        mean, std = (np.asarray(array).astype(np.float32).reshape(-1) for array in arrays)
    wrong = ~np.isfinite(mean) | ~np.isfinite(std) | (std <= 0)
    if wrong.any():
        at = int(np.argmax(wrong))
        raise SfdError(f"'{path}': channel {at} has mean {mean[at]} and std {std[at]}; latents cannot be normalised by it")
    return mean, std


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

    def walk(node, name, depth) -> np.ndarray:
        """Append the lines of a node; return how many arrays, numbers and bytes are in it."""
        indent, held, at = "  " * depth, np.zeros(3, object), len(lines)
        if isinstance(node, LazyArray):
            lines.append(f"{indent}{name}  {list(node.shape)} {node.dtype.name}")
            return np.array([1, math.prod(node.shape), math.prod(node.shape) * node.dtype.itemsize], object)
        if isinstance(node, dict):
            lines.append("")
            for key, value in node.items():
                held += walk(value, key, depth + 1)
            total = f"  {held[0]} arrays, {held[1]:,} numbers, {held[2] / 2**20:.1f} MiB" if held[0] else ""
            lines[at] = f"{indent}{name}:{total}" if node else f"{indent}{name}: (empty)"
        elif isinstance(node, (list, tuple)):
            lines.append(f"{indent}{name}: {len(node)} entries")
            for index, value in enumerate(node):
                if isinstance(value, (dict, list, tuple, LazyArray)):
                    held += walk(value, index, depth + 1)
            if not held[0] and len(node) <= 16:
                lines[at:] = [f"{indent}{name}: {node!r}"]
        elif isinstance(node, str) and "\n" in node:
            lines.append(f"{indent}{name}: |")
            lines.extend(f"{indent}  {line}" for line in node.splitlines())
        else:
            lines.append(f"{indent}{name}: {node!r}")
        return held

    walk(tree, "file", 0)
    return lines


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
    """Return the config beside the weights as JSON has it, since our checkpoint stores it so."""
    config = beside.get("config")
    try:
        if isinstance(config, str):
            config = _yaml(config)
        return json.loads(json.dumps(config, default=str, skipkeys=True)) if isinstance(config, dict) else {}
    except (yaml.YAMLError, ValueError, OverflowError, TypeError, RecursionError) as error:
        raise SfdError(f"'{path}': its config is not YAML that can be read: {error!s:.500}") from error


def _yaml(text: str) -> Any:
    """Read YAML whose aliases, written out, are no longer than the text may be."""
    if len(text) > _MAX_CONFIG:
        raise ValueError(f"it has {len(text):,} characters, more than {_MAX_CONFIG:,}")
    sizes: dict[int, int] = {}

    def size(node) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = _MAX_CONFIG  # of a node inside itself
            children = node.value if isinstance(node, yaml.CollectionNode) else ()
            pairs = [part for child in children for part in (child if isinstance(child, tuple) else (child,))]
            sizes[id(node)] = 1 + sum(map(size, pairs)) + (0 if children else len(str(node.value)))
            if sizes[id(node)] > _MAX_CONFIG:
                raise ValueError("its aliases stand for more than any config holds")
        return sizes[id(node)]

    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        size(node)
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _leaves(config: dict[str, Any]) -> dict[str, Any]:
    """Flatten a config to {last name: value}; the outermost of equal names wins."""
    found = {str(key): value for key, value in config.items() if not isinstance(value, dict)}
    for group in config.values():
        if isinstance(group, dict):
            found = _leaves(group) | found
    return found
