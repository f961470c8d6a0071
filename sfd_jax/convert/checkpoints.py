"""From a released file to our parameters and metadata, and back.

`training.checkpoint` saves the metadata beside the parameters; its entry "foreign" records where
they came from and what an export needs to write the same bytes again.
"""

import collections
import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sfd_jax.class_names import class_names_of
from sfd_jax.convert import FORMATS, texture_vae
from sfd_jax.convert.encoders import refuse_others
from sfd_jax.convert.pickles import left_out
from sfd_jax.convert.table import export_state, import_params, kept_as_stored, skipped_keys
from sfd_jax.convert.weight_files import (
    STEP_KEYS,
    WeightFile,
    choose_state,
    read_config_json,
    read_statistics,
    read_tree,
)
from sfd_jax.errors import SfdError
from sfd_jax.latents import LatentStatistics
from sfd_jax.models import Network


@dataclasses.dataclass(frozen=True)
class Stated:
    """What the user states about a file.

    Args:
      which: "ema" or "raw" weights, or the name of a set in the file; None takes the average where there is one.
      given: fields of the network's config that the shapes do not determine, or that the user overrides.
      texture_statistics, semantic_statistics: released statistics files, for a diffusion network; the first may be
        the statistics themselves, as a texture VAE's checkpoint has them.
      semantic_channels: how many of a two-clock network's channels are semantic, where neither the statistics nor
        the file determine it.
      transport: path and prediction of a diffusion network, by the released names (`lightning_dit.TRANSPORT`).
    """

    which: str | None = None
    given: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    texture_statistics: str | Path | LatentStatistics | None = None
    semantic_statistics: str | Path | None = None
    semantic_channels: int | None = None
    transport: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The network of a file's weights.

    Args:
      format: a key of FORMATS.
      network: the network.
      system: a diffusion network's `latents` and `clocks`, {} for others.
      statistics: a diffusion network's, where stated; those that a texture VAE's scaling factor stands for.
      notes: assumptions where the file does not say, as sentences.
    """

    format: str
    network: Network
    system: dict[str, Any]
    statistics: LatentStatistics | None
    notes: list[str]


@dataclasses.dataclass(frozen=True)
class Imported:
    """A network with its parameters, ready to be saved.

    Args:
      network: the architecture.
      params: nested dict of float32 arrays.
      metadata: JSON-able dict in the layout of `training.checkpoint`.
      notes: assumptions where the file does not say, as sentences.
    """

    network: Network
    params: dict[str, Any]
    metadata: dict[str, Any]
    notes: list[str]


def import_checkpoint(path: str | os.PathLike, stated: Stated = Stated(), *, allow_nonfinite: bool = False) -> Imported:
    """Read a released file and turn it into our parameters.

    Args:
      path: a PyTorch file, a safetensors file, an index of shards, or a folder that holds one of them.
      stated: what the user states about it.
      allow_nonfinite: accept weights that are NaN or infinite.

    Raises:
      SfdError: not a known network, or it does not fit: all differing arrays are named.
    """
    tree = read_tree(path)
    file = choose_state(tree, path, stated.which)
    found = read_architecture(file, path, stated)
    table, network, statistics = FORMATS[found.format].TABLE, found.network, found.statistics
    notes = found.notes + left_out(tree)
    step = step_of(path, file)
    if step is None and network.name == "lightning_dit":
        notes.append("step 0: neither the file nor its name gives one")
    class_names = None
    if network.name == "lightning_dit":
        class_names, assumed = class_names_of({}, network.config.num_classes)
        notes += assumed
    source = f"'{path}' ({file.which} weights)"
    params = import_params(table, file.state, network, source=source, allow_nonfinite=allow_nonfinite)
    metadata = {
        **network.metadata(),
        "latent_statistics": statistics and statistics.to_dict(),
        "class_names": class_names,
        "config": found.system,
        "step": step or 0,
        "source": f"{Path(path).name} ({file.which} weights)",
        "foreign": {
            "format": found.format,
            "weights": file.which,
            "config": file.config,
            "kept": kept_as_stored(table, file.state, network),
        },
    }
    return Imported(network, params, metadata, notes)


def read_architecture(file: WeightFile, path: str | os.PathLike, stated: Stated = Stated()) -> Architecture:
    """Identify the network of a file's weights; only the statistics are read as arrays.

    Args:
      file: from `choose_state`.
      path: the file, for messages.
      stated: what the user states about it.

    Raises:
      SfdError: not a known network, or something must be stated, or does not fit.
    """
    name, module = identify(file.state, path)
    stored = file.stored()
    if getattr(module, "reads_config_json", False):
        stored |= read_config_json(path)
    system, statistics, given = {}, None, stated.given
    if str({**stored, **stated.transport}.get("path_type")).lower() == "ddpm":
        given = {"time_input": "ddpm_step", **given}
    try:
        fields, notes = module.read_config(file.state, given, stored)
        network = Network(module.TABLE.network, fields)
        if network.name == "lightning_dit":
            statistics = _statistics(stated, stored, notes)
            system, more = module.read_system(
                network.config, stored, statistics, stated.semantic_channels, stated.transport
            )
            notes += more + _average_notes(file, stated.which)
        elif stated != Stated(stated.which, stated.given):
            what = "statistics, semantic channels, path and prediction"
            raise SfdError(f"{what} belong to a diffusion network, this is {network.name}")
        elif network.name == "texture_vae":
            statistics, more = texture_vae.scaling_statistics(network.config, stored)
            notes += more
    except SfdError as error:
        raise SfdError(f"'{path}': {error}") from error
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        # The architecture is read from a shape that has another rank or no numbers.
        raise SfdError(f"'{path}' has some keys of {name}, but not its shapes ({error})") from error
    if skipped := skipped_keys(module.TABLE, file.state):
        notes.append(f"left out, arrays that the network does not use: {skipped}")
    return Architecture(name, network, system, statistics, file.notes + notes)


def identify(state: Mapping[str, Any], path: str | os.PathLike) -> tuple[str, Any]:
    """Return the name and the module of a state dict's format, by its keys.

    Raises:
      SfdError: no format recognises it.
    """
    try:
        refuse_others(state)
    except SfdError as error:
        raise SfdError(f"'{path}': {error}") from error
    for name, module in FORMATS.items():
        if module.recognises(state):
            return name, module
    first = collections.Counter(str(key).partition(".")[0] for key in state)
    held = ", ".join(f"{name} ({count})" for name, count in first.most_common(6))
    raise SfdError(
        f"'{path}' is none of the known networks ({', '.join(FORMATS)}), or several in one; its keys begin with {held}"
    )


def export_checkpoint(
    params: Mapping[str, Any],
    metadata: Mapping[str, Any],
    format: str | None = None,
    *,
    allow_nonfinite: bool = False,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Turn our checkpoint into a released one.

    Args:
      params, metadata: as `training.checkpoint.load_params` returns them.
      format: a key of FORMATS where a network has several; by default the one it came from.
      allow_nonfinite: write weights that are NaN or infinite.

    Returns:
      The state dict (the content of a .safetensors file), and the tree around it that the original
      code's .pt file has.

    Raises:
      SfdError: unknown format, or the format of another network.
    """
    foreign = metadata.get("foreign") or {}
    name = format or foreign.get("format")
    if name is None:
        name = next((n for n, m in FORMATS.items() if m.TABLE.network == metadata["network"]), None)
    module = FORMATS.find(name, None if format else metadata.get("registered_in"))
    if module.TABLE.network != metadata["network"]:
        raise SfdError(f"format {name} is for {module.TABLE.network}, not for {metadata['network']}")
    if params.keys() == {"network", "clocks"}:
        raise SfdError("this model's clocks were trained with it; the released format cannot store them")
    if metadata["network_config"].get("end_time"):
        raise SfdError("this is a few-step model; the released format cannot store its embedding of the interval's end")
    loss = (metadata.get("config") or {}).get("loss") or {}
    for part, usual in (("path", "linear"), ("prediction", "velocity")):
        if (name_there := (loss.get(part) or {}).get("name", usual)) != usual:
            raise SfdError(f"this model's {part} is {name_there}; a released file would be read as {usual}")
    network = Network(metadata["network"], metadata["network_config"])
    kept = foreign.get("kept") if foreign.get("format") == name else None
    state = export_state(module.TABLE, params, network, kept, allow_nonfinite=allow_nonfinite)
    return state, module.wrap(state, metadata)


def _average_notes(file: WeightFile, which: str | None) -> list[str]:
    """Return a note where the weights of a diffusion network, which decide its samples, may not be averaged."""
    if which is not None or file.which == "ema":
        return []
    if file.name:
        return [f"raw weights: the file holds no average beside '{file.name}'"]
    return ["the file holds one set of weights and does not say whether they are averaged"]


def _statistics(stated: Stated, stored: Mapping[str, Any], notes: list[str]) -> LatentStatistics | None:
    texture, semantic = stated.texture_statistics, stated.semantic_statistics
    if texture is None and semantic is None:
        return None
    if texture is None:
        raise SfdError("semantic statistics without texture statistics: give --statistics too")
    empty = np.zeros(0, np.float32)
    if isinstance(texture, LatentStatistics):
        texture_mean, texture_std = texture.texture_mean, texture.texture_std
    else:
        texture_mean, texture_std = read_statistics(texture)
    mean, std = (empty, empty) if semantic is None else read_statistics(semantic)
    multiplier = stored.get("latent_multiplier", 1.0)
    if multiplier != 1.0:
        notes.append(f"latents are multiplied by {multiplier}: latent_multiplier of the config in the file")
        if not isinstance(multiplier, (int, float)) or not 0 < multiplier < float("inf"):
            raise SfdError(f"the config in the file says latent_multiplier {multiplier!r}; expected a positive number")
    return LatentStatistics(texture_mean, texture_std, mean, std, multiplier)


def step_of(path: str | os.PathLike, file: WeightFile) -> int | None:
    """Return the step of a file's weights, from the file, else from its name, else None.

    Released diffusion checkpoints are named NNNNNNN.pt. Eight digits or more are a date or a time.
    """
    for key in STEP_KEYS:
        if key in file.extras:
            return file.extras[key]
    stem = Path(path).stem.lower()
    match = re.fullmatch(r"(\d{1,7})", stem) or re.search(
        r"(?:^|[^a-z])(?:step|steps|iter|iters|iteration)[-_=]?(\d{1,9})(?![\da-z.])|^checkpoint-(\d{1,9})$", stem
    )
    return int(next(filter(None, match.groups()))) if match else None
