"""Find the state dicts in a file of weights, and choose one.

Formats of the released files: a LightningDiT's `{"ema"}` or `{"model", "ema", "opt",
"config"}`, a Semantic VAE's `{"model_state_dict", "config", ...}`, Lightning's `{"state_dict", ...}`,
a bare state dict, and .safetensors, which is one. Keys may have the prefix of a wrapper.
"""

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from sfd_jax.convert import FORMATS
from sfd_jax.convert.file_kinds import SAFETENSORS, SHARDED, Kind, find_weights, fits, shards_of
from sfd_jax.convert.lazy_array import LazyArray, is_float
from sfd_jax.convert.pickles import Record
from sfd_jax.convert.safetensors_files import read_safetensors
from sfd_jax.convert.torch_files import read_torch_file, write_torch_file
from sfd_jax.errors import SfdError, nearest
from sfd_jax.files import atomic_write

# Keys of the weights being trained, in the order of preference, and of their average.
RAW_KEYS = ("model", "model_state_dict", "state_dict", "params", "module", "net", "network", "weights")
EMA_KEY = "ema"
# Modules that training or a larger model wraps around others; none of our networks has submodules of these names.
WRAPPERS = {
    "module",  # DataParallel, AveragedModel
    "_module",  # Opacus
    "_orig_mod",  # torch.compile
    "_checkpoint_wrapped_module",
    "_fsdp_wrapped_module",
    "_fpw_module",  # FSDP before torch 2
    "_forward_module",  # Lightning Fabric
    "vision_model",  # CLIP and SigLIP in transformers, beside the text tower
    "vit",  # MAE in transformers, beside the decoder
}
# Counters that averages keep beside the weights.
_COUNTERS = {"n_averaged", "num_updates", "decay", "ema_decay", "initted", "step", "num_batches_averaged"}
# Fixed tables of the networks, which an average of trained parameters may lack.
_NOT_TRAINED = ("pos_embed", "feat_rope.*")
_MAX_CONFIG = 2**18  # characters of a config in YAML, its aliases written out
# Words in the names of entries that describe an average but are not one.
_SETTINGS = {"config", "cfg", "args", "kwargs", "parameters", "hparams"} | {
    "groups",
    "rate",
    "decay",
    "meter",
    "meters",
}
STEP_KEYS = ("iteration", "global_step", "step", "train_steps", "train_step", "steps", "iterations", "iter", "it")


@dataclasses.dataclass(frozen=True)
class WeightFile:
    """One state dict of a file, and the entries beside it.

    Args:
      state: arrays by key, prefixes of wrappers removed.
      which: "ema" or "raw".
      name: its path of keys in the file, "" for the file itself.
      config: the training config in the file (OmegaConf, YAML or a plain dict), {} where none.
      extras: the other entries that are plain scalars (iteration, input_dim, ...).
      notes: what was chosen, renamed and left out, as sentences.
    """

    state: dict[str, LazyArray]
    which: str
    name: str
    config: dict[str, Any]
    extras: dict[str, Any]
    notes: list[str]

    def stored(self) -> dict[str, Any]:
        """Return the values of the file's config and scalars, by the last part of their names."""
        return _leaves(self.config) | self.extras


@dataclasses.dataclass(frozen=True)
class Weights:
    """A set of arrays found in a file.

    Args:
      name: its path of keys, joined by slashes; then the prefix of its keys, if it has one.
      which: "ema", "raw", or "" where its name does not say.
      arrays: by key; by number where the file holds a list in the order of the parameters.
      others: keys beside them whose values are not arrays.
    """

    name: str
    which: str
    arrays: dict[Any, LazyArray]
    others: list[str]


def read_tree(path: str | os.PathLike) -> Any:
    """Read a file's whole tree, arrays as `LazyArray`; by content, not by suffix.

    Args:
      path: a file, an index of shards, or a folder that holds one of them.

    Raises:
      SfdError: not a file of a known format, damaged, or refused.
    """
    path, kind = find_weights(path)
    return _read_shards(path) if kind == SHARDED else _read_file(path, kind)


def _read_file(path: Path, kind: Kind) -> Any:
    return read_safetensors(path) if kind == SAFETENSORS else read_torch_file(path)


def find_sets(tree: Any) -> list[Weights]:
    """Return every set of weights in a file's tree, without optimizers' moments and lone counters."""
    found: dict[tuple[str, str], dict] = {}
    others: dict[str, list[str]] = {}

    def add(path, which, key, array):
        found.setdefault(("/".join(map(str, path)), which), {})[key] = array

    def walk(node, path):
        which = next((role for part in reversed(path) if (role := _role(part))), "")
        if len(path) == 1 and path[0] == "state_dict" and "current_model_state" in tree:
            which = "ema"  # Lightning's WeightAveraging stores them like this
        optimizer = any({"opt", "optim", "optimizer", "optimizers"} & set(_words(part)) for part in path)
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            if isinstance(value, (dict, list, tuple)):
                walk(value, (*path, key))
            elif not isinstance(value, LazyArray):
                others.setdefault("/".join(map(str, path)), []).append(str(key))
            elif isinstance(key, int) and which == "ema":
                add(path, which, key, value)
            elif optimizer and isinstance(path[-1], int) and _role(key) == "ema":
                add((*path[:-1], "*", key), "ema", path[-1], value)
            elif isinstance(key, str) and (which == "ema" or not optimizer):
                # Lightning and ema-pytorch keep both in one state dict, under two prefixes.
                parts = key.split(".")
                at = next((i for i, part in enumerate(parts[:-1]) if _role(part)), None)
                prefix, role = ("", which) if at is None else (".".join(parts[: at + 1]) + ".", _role(parts[at]))
                if not role and (not path or path[-1] in RAW_KEYS):
                    role = "raw"
                add((*path, prefix) if prefix else path, role, key.removeprefix(prefix), value)

    walk(tree, ())
    sets = [
        Weights(name, which, arrays, others.get(name, []))
        for (name, which), arrays in found.items()
        if not all(_is_counter(key, array) for key, array in arrays.items())
    ]
    # Lone arrays beside sets (a random state) are not weights.
    return [s for s in sets if s.name or len(sets) == 1 or _known(s.arrays)]


def choose_state(tree: Any, path: str | os.PathLike, which: str | None = None) -> WeightFile:
    """Pick a file's averaged or raw weights.

    Args:
      tree: from `read_tree`.
      path: the file, for messages.
      which: "ema", "raw", the name of a set; None takes the average where there is one.

    Raises:
      SfdError: the file holds no such weights, or several without a way to decide; the message says
        what it holds. Raw weights never replace an average that exists but cannot be used.
    """
    if not isinstance(tree, dict) or not tree:
        raise SfdError(f"'{path}' holds a {type(tree).__name__}, not a dict of arrays")
    sets = find_sets(tree)
    places = [Path(path), find_weights(path)[0]] if Path(path).is_dir() else [Path(path)]
    if any(_role(place.name) == "ema" for place in places):
        sets = [dataclasses.replace(s, which="ema") if s.name == "" else s for s in sets]
    chosen = _choose(tree, sets, path, which)
    notes = _averages_beside(path) if which is None and (chosen.which != "ema" or not chosen.name) else []
    if (chosen.name, chosen.which) == ("", "ema"):
        notes.append("averaged weights: by the file's name")
    elif chosen.name not in ((EMA_KEY,) if chosen.which == "ema" else ("", *RAW_KEYS)):
        notes.append(f"{'averaged ' * (chosen.which == 'ema')}weights: those of '{chosen.name}'")
    raw = _first_raw(sets)
    trained = _unwrap(raw.arrays, path)[0] if raw and raw is not chosen and chosen.which == "ema" else {}
    arrays = _named_like(chosen, raw, trained, path, notes) if trained else chosen.arrays
    if any(isinstance(key, int) for key in arrays):  # no raw weights to name them
        raise SfdError(
            f"'{path}': '{chosen.name}' is a list of arrays without names, and there are no raw weights to take them "
            "from; save the average as a state dict"
        )
    state, more = _unwrap(arrays, path)
    fixed = [k for k in trained if k not in state and fits(k, _NOT_TRAINED)]
    if fixed:
        notes.append(f"not in the average, fixed tables taken from '{raw.name}': {', '.join(fixed)}")
    state |= {key: trained[key] for key in fixed}
    if trained and _known(trained) and not _known(state):
        raise SfdError(
            f"'{path}': '{chosen.name}' should be the average of '{raw.name}' but has other keys, such as "
            f"{', '.join(list(state)[:3])}; give --weights raw for the raw ones"
        )
    if chosen.name and chosen.others:
        more.append(f"left out of '{chosen.name}', not arrays: {', '.join(chosen.others)}")
    beside, node = dict(tree), tree
    for name in chosen.name.split("/")[:-1]:  # the dicts that hold the set, but not an average's own counters
        node = node.get(name) if isinstance(node, dict) and not _role(name) else None
        beside |= node if isinstance(node, dict) else {}
    extras = {k: v for k, v in beside.items() if isinstance(v, (int, float, str)) and k not in ("config", *STEP_KEYS)}
    extras |= {k: step for k in STEP_KEYS if (step := _whole_number(beside.get(k))) is not None}
    return WeightFile(state, chosen.which or "raw", chosen.name, _config(beside, path), extras, notes + more)


def _choose(tree: dict, sets: list[Weights], path, which: str | None) -> Weights:
    held = ", ".join(f"'{s.name}'" if s.name else "arrays without a name" for s in sets)
    names = [s.name for s in sets]
    if which not in (None, "ema", "raw"):
        if which not in names:
            raise SfdError(f"'{path}' holds no weights named '{which}'; {nearest(which, names)}")
        return sets[names.index(which)]
    averages = [s for s in sets if s.which == "ema"]
    if len(averages) > 1:  # leave out those of unknown networks
        averages = [s for s in averages if _is_list(s) or _known(_unwrap(s.arrays, path)[0])] or averages
    raw = _first_raw(sets)
    if which != "raw" and len(averages) > 1:
        raise SfdError(f"'{path}' holds several averages: {_listed(averages)}; give --weights NAME, one of these")
    if which != "raw" and averages:
        return averages[0]
    if which is None and not averages and (lost := _lost_average(tree)):
        raise SfdError(
            f"'{path}': '{lost}' should be an average but holds no arrays that can be read; give --weights raw for the "
            "raw ones"
        )
    if which != "ema" and raw is None:
        unnamed = [s for s in sets if not s.which]
        unnamed = [s for s in unnamed if _known(_unwrap(s.arrays, path)[0])] or unnamed
        if len(unnamed) > 1:
            raise SfdError(
                f"'{path}' holds several sets of weights: {_listed(unnamed)}; give --weights NAME, one of these"
            )
        if unnamed:
            return unnamed[0]
    if which == "ema" or raw is None:
        held = held or "only " + ", ".join(map(repr, tree))
        hint = f"; give --weights {'raw' if which == 'ema' else 'ema'}" if sets else ""
        raise SfdError(f"'{path}' holds no {which or 'raw'} weights (it holds {held}){hint}")
    trained = lambda s: {key for key in _unwrap(s.arrays, path)[0] if not fits(key, _NOT_TRAINED)}
    others = [s for s in sets if which is None and s.which != "ema" and s is not raw]
    twins = [s for s in others if trained(s) == trained(raw)]
    if twins:
        raise SfdError(
            f"'{path}' holds several sets of weights of one network, and does not say which are averaged: "
            f"{_listed([raw, *twins])}; give --weights NAME, one of these"
        )
    return raw


def _listed(sets: list[Weights]) -> str:
    return ", ".join(f"'{s.name}' ({len(s.arrays)} arrays)" for s in sets[:8]) + " ..." * (len(sets) > 8)


def _is_list(found: Weights) -> bool:
    return any(isinstance(key, int) for key in found.arrays)


def _first_raw(sets: list[Weights]) -> Weights | None:
    def rank(found: Weights):
        last = found.name.rsplit("/", 1)[-1]
        return found.name.count("/"), RAW_KEYS.index(last) if last in RAW_KEYS else len(RAW_KEYS)

    return min((s for s in sets if s.which == "raw"), key=rank, default=None)


def _averages_beside(path) -> list[str]:
    """Refuse raw weights of a folder that also has an average; return a note where it may have one.

    Raises:
      SfdError: something in the folder is, by its name, the average.
    """
    names = sorted(entry.name for entry in Path(path).iterdir()) if Path(path).is_dir() else []
    names = [name for name in names if name != find_weights(path)[0].name]
    if averages := [name for name in names if _role(name) == "ema"]:
        raise SfdError(
            f"'{path}' holds raw weights, and beside them averages: {', '.join(averages)}; "
            "give the average's own path, or --weights raw"
        )
    objects = [name for name in names if name.startswith("custom_checkpoint_")]
    return [f"not read, may hold an average (of Accelerate): {', '.join(objects)}"] if objects else []


def _lost_average(tree: dict) -> str | None:
    """Return the name of an entry that should be an average but has no readable arrays."""
    for key, value in tree.items():
        name = f"{key} {value.name.rpartition('.')[2]}" if isinstance(value, Record) else key
        if _SETTINGS & set(_words(name)) or isinstance(value, (bool, int, float, str, LazyArray, type(None))):
            continue
        if _role(name) == "ema":
            return str(key)
        if isinstance(value, dict) and (found := _lost_average(value)):
            return f"{key}/{found}"
    return None


def _words(name: Any) -> list[str]:
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", str(name))]


def _role(name: Any) -> str:
    """Return by a name whether weights are averaged ("ema") or being trained ("raw"); "" where it does not say."""
    words = _words(name)
    if {"grad", "grads", "norm", "loss", "losses", "exp", "sq", "var"} & set(words):
        return ""  # averages of something other than weights
    if {"raw", "online", "current", "collected", "stored", "backup", "no", "non", "without"} & set(words):
        return "raw"
    averaged = {"ema", "emas", "averaged", "average", "avg", "swa", "shadow", "polyak"} & set(words)
    return "ema" if averaged else ""


def _known(state: Mapping[str, Any]) -> bool:
    return any(module.recognises(state) for module in FORMATS.values())


def _is_counter(key: Any, array: LazyArray) -> bool:
    return str(key).rsplit(".", 1)[-1] in _COUNTERS and array.size <= 1


def _unwrap(arrays: Mapping[Any, LazyArray], path) -> tuple[dict[str, LazyArray], list[str]]:
    """Leave out counters, and remove wrappers' names anywhere in keys; return the state dict and notes.

    A prefix of all keys is a wrapper's too if a known network remains without it.
    """
    counters = {str(key): None for key, array in arrays.items() if _is_counter(key, array)}
    removed: dict[str, int] = {}
    origin: dict[str, Any] = {}
    for key in arrays:
        if str(key) in counters:
            continue
        parts = str(key).split(".")
        name = ".".join(part for part in parts if part not in WRAPPERS)
        if name in origin:
            raise SfdError(
                f"'{path}': {origin[name]} and {key} are both {name} without the names of wrappers; remove one of them"
            )
        origin[name] = key
        for part in WRAPPERS.intersection(parts):
            removed[part] = removed.get(part, 0) + 1
    state = {name: arrays[key] for name, key in origin.items()}
    bare, before = state, []
    while bare and not _known(bare):
        first = {key.partition(".")[0] if "." in key else None for key in bare}
        if len(first) > 1 or None in first:
            break
        before += first
        bare = {key.partition(".")[2]: array for key, array in bare.items()}
    if bare and before and _known(bare):
        state, removed = bare, removed | {part: len(bare) for part in before}
    notes = []
    if removed:
        what = ", ".join(f"'{part}.' from {count}" for part, count in sorted(removed.items()))
        notes.append(f"names of wrappers removed: {what} of {len(state)} keys")
    if counters:
        notes.append(f"left out, counters of the average: {', '.join(counters)}")
    return state, notes


def _named_like(chosen: Weights, raw: Weights, trained: Mapping[str, LazyArray], path, notes) -> dict:
    """Give an average without keys (a list, or names without dots) those of the raw weights.

    Raises:
      SfdError: counts or shapes do not determine which array is which.
    """
    arrays = chosen.arrays
    if _is_list(chosen):
        numbers = sorted(key for key in arrays if isinstance(key, int))
        shapes = [tuple(arrays[index].shape) for index in numbers] if len(numbers) == len(arrays) else None
        for patterns in ((), _NOT_TRAINED[1:], _NOT_TRAINED):
            keys = [key for key in trained if not fits(key, patterns)]
            if [tuple(trained[key].shape) for key in keys] == shapes and keys != sorted(keys):
                notes.append(f"the average is a list; its keys are those of '{raw.name}', in their order")
                return {key: arrays[index] for key, index in zip(keys, numbers, strict=True)}
        raise SfdError(
            f"'{path}': '{chosen.name}' is a list of {len(arrays)} arrays that does not fit the order, number and "
            f"shapes of the {len(trained)} of '{raw.name}'; give --weights raw for the raw ones"
        )
    if any("." in key for key in arrays):
        return dict(arrays)
    # latent-diffusion's LitEma removes the dots from names.
    dotted: dict[str, set[str]] = {}
    for key in trained:
        dotted.setdefault(key.replace(".", ""), set()).add(key)
    named = {}
    for key, array in arrays.items():
        keys = next((dotted[key[at:]] for at in range(len(key)) if key[at:] in dotted), {key})
        if len(keys) > 1 or keys & named.keys():
            raise SfdError(
                f"'{path}': {key} of '{chosen.name}' could be several arrays of '{raw.name}'; give --weights raw for "
                "the raw ones"
            )
        named[next(iter(keys))] = array
    if named.keys() != arrays.keys():
        notes.append(f"the keys of '{chosen.name}' have lost their dots; they are those of '{raw.name}'")
    return named


def _whole_number(value: Any) -> int | None:
    """Return a step as int, from a number or a one-element tensor; None where it is not a whole number."""
    if isinstance(value, LazyArray) and value.size == 1:
        value = np.asarray(value).item()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return int(value) if 0 <= value < 2**53 and value == int(value) else None


def _read_shards(index: Path) -> dict[str, LazyArray]:
    """Read the arrays of all shards of an index.

    Raises:
      SfdError: names missing shards and arrays, and arrays that are in two shards or not in the index.
    """
    arrays: dict[str, LazyArray] = {}
    place: dict[str, str] = {}
    faults = []
    shards = shards_of(index)
    listed = {key for keys in shards.values() for key in keys}
    for name, keys in shards.items():
        held = _read_file(*find_weights(index.parent / name, whole=False))
        if not isinstance(held, dict) or not all(isinstance(array, LazyArray) for array in held.values()):
            raise SfdError(f"'{index.parent / name}' is not a shard of '{index}': it holds more than arrays")
        faults += [f"  missing   {key} is not in {name}" for key in keys if key not in held]
        for key in held:
            if key in place:
                faults.append(f"  twice     {key} is in {place[key]} and in {name}")
            elif key not in listed:
                faults.append(f"  extra     {key} of {name} is not in the index")
            place[key] = name
        arrays |= held
    if faults:
        raise SfdError(f"'{index}' and its shards disagree; copy all of them again:\n" + "\n".join(faults))
    return arrays


def read_config_json(path: str | os.PathLike) -> dict[str, Any]:
    """Return the `config.json` of transformers or diffusers beside a file of weights, an image tower's entries above
    the rest.

    Args:
      path: the file, or its folder.

    Returns:
      {} where there is none, or one of another program.

    Raises:
      SfdError: it cannot be read.
    """
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    file = folder / "config.json"
    if not file.is_file():
        return {}
    try:
        if file.stat().st_size > _MAX_CONFIG:
            raise ValueError(f"it is larger than {_MAX_CONFIG:,} bytes")
        config = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise SfdError(f"'{file}' cannot be read ({error}); copy it again, or take it away") from error
    config = config if isinstance(config, dict) and {"model_type", "_class_name"} & config.keys() else {}
    vision = config.get("vision_config")
    return config | (vision if isinstance(vision, dict) else {})


def read_statistics(path: str | os.PathLike) -> tuple[np.ndarray, np.ndarray]:
    """Read a released statistics file (`{"mean", "std"}`, (1, C, 1, 1) each).

    Returns:
      mean and std, (C,) float32; finite, std positive.

    Raises:
      SfdError: it is not such a file, or a value cannot be the mean or deviation of a channel.
    """
    tree = read_tree(path)
    mean, std = (tree.get(key) if isinstance(tree, dict) else None for key in ("mean", "std"))
    if not (isinstance(mean, LazyArray) and isinstance(std, LazyArray)):
        held = ", ".join(map(repr, list(tree)[:8])) if isinstance(tree, dict) else f"one {type(tree).__name__}"
        raise SfdError(
            f"'{path}' is not a statistics file: it needs arrays 'mean' and 'std', but holds {held or 'nothing'}"
        )
    if mean.shape != std.shape or not mean.shape or mean.size != max(mean.shape) or not mean.size:
        raise SfdError(
            f"'{path}': mean is {mean.shape} and std {std.shape}; expected one value a channel, (1, C, 1, 1)"
        )
    if not (is_float(mean.dtype) and is_float(std.dtype)):
        raise SfdError(f"'{path}': mean is {mean.dtype} and std {std.dtype}, expected floats")
    with np.errstate(over="ignore"):  # infinities are reported below
        mean, std = (np.asarray(array).astype(np.float32).reshape(-1) for array in (mean, std))
    wrong = ~np.isfinite(mean) | ~np.isfinite(std) | (std <= 0)
    if wrong.any():
        at = int(np.argmax(wrong))
        raise SfdError(
            f"'{path}': channel {at} has mean {mean[at]} and std {std[at]}; latents cannot be normalised with these"
        )
    return mean, std


def write_file(path: str | os.PathLike, state: dict[str, np.ndarray], tree: dict[str, Any]) -> None:
    """Write an export atomically: the bare state for .safetensors, else the tree.

    Raises:
      SfdError: the file exists, its suffix is unknown, it cannot be written, or it is a .pt and torch is missing.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    path = Path(path)
    if path.exists():
        raise SfdError(f"'{path}' exists and is not overwritten; give another file name")
    if path.suffix not in (".pt", ".pth", ".ckpt", ".safetensors"):
        raise SfdError(f"'{path}': export to a name that ends in .pt, .pth, .ckpt or .safetensors")
    try:
        with atomic_write(path) as part:
            if path.suffix == ".safetensors":
                # transformers requires the entry "format"; other readers ignore it.
                save_file(state, part, metadata={"format": "pt"})
            else:
                write_torch_file(part, tree)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch raises RuntimeError for a full disk
        raise SfdError(f"cannot write '{path}': {error}") from error


def describe(tree: Any) -> list[str]:
    """Return lines that list the content of a file; no array is loaded."""
    lines: list[str] = []

    def walk(node, name, depth) -> np.ndarray:
        """Append the lines of a node; return how many arrays, numbers and bytes are in it."""
        indent, held, at = "  " * depth, np.zeros(3, object), len(lines)
        if isinstance(node, LazyArray):
            lines.append(f"{indent}{name}  {list(node.shape)} {node.dtype.name}")
            return np.array([1, node.size, node.size * node.dtype.itemsize], object)
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


def _config(beside: Mapping[str, Any], path) -> dict[str, Any]:
    """Return the config beside the weights as JSON values, as our checkpoint stores it."""
    config = beside.get("config")
    try:
        if isinstance(config, str):
            config = _yaml(config)
        return json.loads(json.dumps(config, default=str, skipkeys=True)) if isinstance(config, dict) else {}
    except (yaml.YAMLError, ValueError, OverflowError, TypeError, RecursionError) as error:
        raise SfdError(f"'{path}': its config is not YAML that can be read: {error!s:.500}") from error


def _yaml(text: str) -> Any:
    """Read YAML; with its aliases written out it must not exceed the limit on its length."""
    if len(text) > _MAX_CONFIG:
        raise ValueError(f"it has {len(text):,} characters, more than {_MAX_CONFIG:,}")
    sizes: dict[int, int] = {}

    def size(node) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = _MAX_CONFIG  # for a node inside itself
            children = node.value if isinstance(node, yaml.CollectionNode) else ()
            pairs = [part for child in children for part in (child if isinstance(child, tuple) else (child,))]
            sizes[id(node)] = 1 + sum(map(size, pairs)) + (0 if children else len(str(node.value)))
            if sizes[id(node)] > _MAX_CONFIG:
                raise ValueError("its aliases expand to more than any config holds")
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
