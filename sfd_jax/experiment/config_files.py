"""Find config files, load them, apply `--config.a.b=value` overrides, and report all faults together.

Messages for unknown keys name the nearest valid one.
"""

from pathlib import Path

import ml_collections
from absl import flags as absl_flags
from ml_collections import config_flags

from sfd_jax import ranges
from sfd_jax.diffusion import paths
from sfd_jax.diffusion.clocks import CLOCKS
from sfd_jax.diffusion.losses import TERMS
from sfd_jax.diffusion.predictions import PREDICTIONS
from sfd_jax.diffusion.sample_config import SampleJob
from sfd_jax.errors import Faults, SfdError, nearest
from sfd_jax.files import user_path
from sfd_jax.settings import defaults_of, over_defaults, part_group, ranges_of

# Commands, the keys that only their config files have, and an example.
KINDS = (
    ("demo", ("texture_vae", "encoder", "diffusion"), "configs/digits.py"),
    ("train", ("latents", "clocks"), "configs/sfd.py:xl"),
    ("train_texture_vae", ("lpips",), "configs/texture_vae.py"),
    ("train_semvae", ("model.bottleneck_dim",), "configs/semantic_vae.py"),
    ("train_encoder", ("model.num_registers",), "configs/visual_encoder.py"),
)
# Settings that may be set to None although a config has another value.
MAY_BE_NONE = ("scan_blocks", *(name for name, default in defaults_of(SampleJob).items() if default is None))
# Keys of configs that hold paths.
PATHS = ("path", "held_out_path", "semantic_vae", "visual_encoder", "lpips", "teacher", "weak")


def find_config(path: str) -> Path:
    """Return the config file, relative to the current folder or else to the repository of this package."""
    for candidate in (Path(path).expanduser(), Path(__file__).resolve().parents[2] / path):
        if candidate.is_file():
            return candidate
    raise SfdError(f"no config file '{path}' in this folder or the repository; configs are in configs/")


def load_config(
    name: str, overrides: list[str] = (), like: str | None = None, pending: Faults | None = None
) -> ml_collections.ConfigDict:
    """Load `path.py[:argument]` and apply `--config.a.b=value` overrides.

    Args:
      name: the file and its argument.
      overrides: "--config.a.b=value" each; None is a value for settings that may be None or are empty by default.
      like: a config file of the required kind; None allows any.
      pending: as in `parse_command`.

    Raises:
      SfdError: a config of another kind, an unknown key (with the nearest valid one), a wrong type, a number outside
        its range, an invalid path, an override without effect, an unknown argument, or no file. All are named.
    """
    path, _, argument = name.partition(":")
    file = str(find_config(path)) + (f":{argument}" if argument else "")
    base, found, values, nones, own = _parse(file, []), Faults(), {}, [], _ranges(SampleJob, "sample.")
    if like is not None:
        _check_kind(base, name, like)
    with found, base.unlocked():
        own |= _choose_parts(base, [flag.lstrip("-").removeprefix("config.") for flag in overrides])
    for flag in overrides:
        key, equals, value = flag.lstrip("-").removeprefix("config.").partition("=")
        with found:
            if not equals:
                raise SfdError(f"write {flag}=VALUE: a config override needs an equals sign")
            if _check_value(base, key, value, name):
                nones.append(key)
            else:
                values[key] = flag
    with found:
        config = _parse(base, list(values.values()), name)
        sample = config.get("sample", {})
        read = over_defaults(SampleJob, sample)
        was_none = {
            f"sample.{key}" for key, value in sample.items() if value is not None and read.get(key, value) is None
        }
        for key in {*nones, *was_none} - set(values):
            _set(config, key)
        faults = found if pending is None else pending
        faults += ranges.faults(config.to_dict(), own=own)
        with faults:
            SampleJob.from_group(sample)
        _check_rules(config, set(values), faults)
        _read_paths(config, "", faults)
    if found and pending is not None:
        found += pending
    found.stop()
    return config


# Group of a part -> its registry, and the part that is meant where the group is missing.
_PARTS = {"clocks": (CLOCKS, None), "loss.path": (paths.PATHS, "linear"), "loss.prediction": (PREDICTIONS, "velocity")}


def _choose_parts(config: ml_collections.ConfigDict, overrides: list[str], path: str = "") -> dict[str, ranges.Range]:
    """Give the groups of exchangeable parts the fields of the parts chosen by `overrides`, "a.b=c".

    So `--config.clocks.name=mine --config.clocks.my_field=2` works although the file has other clocks: the group gets
    the fields of the named clocks with their defaults; and `--config.loss.terms.mine.weight=2` adds a registered term.

    Returns:
      The ranges of the parts' fields, by full name.
    """
    own = {}
    for part, (_, default) in _PARTS.items():
        group, _, key = part.rpartition(".")
        if path == f"{group}." and key not in config and any(text.startswith(f"{part}.") for text in overrides):
            config[key] = ml_collections.ConfigDict({"name": default})
    for key, group in list(config.items()):
        if not isinstance(group, ml_collections.ConfigDict):
            continue
        here = f"{path}{key}."
        given = [text.removeprefix(here) for text in overrides if text.startswith(here)]
        registry, _ = _PARTS.get(here[:-1], (None, None))
        if registry is not None and "name" in group:
            name = [group.name, *(text.removeprefix("name=") for text in given if text.startswith("name="))][-1]
            if name not in registry:
                continue  # reported when they are built, with all other faults
            cls, fields = registry[name], group if name == group.name else {"name": name}
            # Old configs have a delta_t for all clocks.
            config[key] = part_group(
                cls, **{k: x for k, x in fields.items() if k != "delta_t" or k in defaults_of(cls)}
            )
            own |= _ranges(cls, here)
        elif here.endswith("loss.terms."):
            for name in dict.fromkeys((*group, *(text.partition("=")[0].partition(".")[0] for text in given))):
                group[name] = part_group(TERMS[name], **group.get(name, {}))
                own |= _ranges(TERMS[name], f"{here}{name}.")
        else:
            own |= _choose_parts(group, overrides, here)
    return own


def _ranges(cls: type, path: str) -> dict[str, ranges.Range]:
    """Return the ranges of a dataclass's fields, by full name."""
    return {f"{path}{name}": row for name, row in ranges_of(cls).items()}


def _check_kind(config: ml_collections.ConfigDict, name: str, like: str) -> None:
    """Raise SfdError if a config is of another kind than the file `like`."""
    has = lambda key: key in config if "." not in key else key.split(".")[1] in config.get(key.split(".")[0], {})
    kind = next((kind for kind in KINDS if all(map(has, kind[1]))), None)
    [wanted] = [kind for kind in KINDS if kind[2].partition(":")[0] == like.partition(":")[0]]
    if kind is None:
        lacks = ", ".join(key for key in wanted[1] if not has(key))
        raise SfdError(f"config {name} lacks {lacks}: use one like {wanted[2]}")
    if kind != wanted:
        raise SfdError(f"config {name} is for `sfd {kind[0]}`; use one like --config={wanted[2]}")


def _check_rules(config: ml_collections.ConfigDict, given: set[str], found: Faults) -> None:
    """Add the overrides that have no effect."""
    for group in sorted({key.rpartition(".")[0] for key in given if not ranges.of_a_part(key)}):
        node, path = config, "--config."
        groups = {name: value for name, value in config.items() if isinstance(value, ml_collections.ConfigDict)}
        values = {f"{name}.{key}": value for name, node_ in groups.items() for key, value in node_.items()}
        spelled = {name: path + name for name in values}
        for part in (*group.split("."), None):
            values |= node  # values of the enclosing groups count too
            spelled |= {name: path + name for name in node}
            if part:
                node, path = node[part], f"{path}{part}."
        names = {key.rpartition(".")[2] for key in given if key.rpartition(".")[0] == group}
        rules = ranges.RULES.get(group.rpartition(".")[2], ())
        found += ranges.useless(rules, values, names, spelled.__getitem__).values()


def _read_paths(config: ml_collections.ConfigDict, prefix: str, found: Faults) -> None:
    """Expand the paths of a config in place."""
    for name, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            _read_paths(value, f"{prefix}{name}.", found)
        elif name in PATHS and isinstance(value, str) and value and not ranges.of_a_part(prefix):
            try:
                config[name] = user_path(value, local=name.endswith("path"))
            except SfdError as error:
                found.append(f"{prefix}{name}: {error}")


def _set(config: ml_collections.ConfigDict, key: str) -> None:
    """Set a value to None, or to "" if it is a string."""
    *groups, name = key.split(".")
    for group in groups:
        config = config[group]
    with config.ignore_type():
        config[name] = "" if isinstance(config[name], str) else None


def _parse(source: str | ml_collections.ConfigDict, overrides: list[str], file: str = "") -> ml_collections.ConfigDict:
    """Load a config file, or apply overrides to a loaded one."""
    values, argv = absl_flags.FlagValues(), ["sfd", *overrides]
    if isinstance(source, str):
        argv, file = ["sfd", f"--config={source}", *overrides], source
        config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    else:
        config_flags.DEFINE_config_dict("config", source, flag_values=values, sys_argv=argv)
    try:
        values(argv)
        return values.config
    except (absl_flags.Error, TypeError, ValueError, AttributeError, KeyError) as error:
        # The message of config_flags contains a traceback; its last line is the reason.
        reason = str(error).strip().splitlines()[-1]
        raise SfdError(f"config {file}: {reason}") from error


def _check_value(config: ml_collections.ConfigDict, key: str, value: str, name: str) -> bool:
    """Raise SfdError if `key` is not in the config or `value` is not of its type; return whether it is None."""
    node, walked = config, []
    for part in key.split("."):
        if not isinstance(node, ml_collections.ConfigDict):
            raise SfdError(f"config {name} has no key '{key}': '{'.'.join(walked)}' is a value, not a group")
        field = part.split("[")[0]
        if field not in node:
            here = ".".join(walked) or "the top level"
            raise SfdError(f"config {name} has no key '{key}': {here} has no '{field}'; {nearest(field, node)}")
        node = node[field]
        walked.append(part)
    if isinstance(node, ml_collections.ConfigDict):
        raise SfdError(f"config {name}: '{key}' is a group; set one of its keys: {', '.join(node)}")
    if value == "None" and (node in (None, "") or (field in MAY_BE_NONE and not ranges.of_a_part(key))):
        return True
    if type(node) in (int, float):
        try:
            type(node)(value)
        except ValueError:
            raise SfdError(
                f"config {name}: '{key}' takes {_ARTICLE[type(node)]}, as its default {node!r} is; got '{value}'"
            ) from None
    return False


_ARTICLE = {int: "an integer", float: "a number"}
