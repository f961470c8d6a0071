"""Flags of the front doors: argparse for a door's own, ml_collections config_flags for `--config`.

A door writes

    parser = door_parser("train", __doc__)
    parser.add_argument("--workdir", required=True, help="...")
    args = parse_door(parser, argv, config="configs/sfd.py:xl")
    args.config            # a locked ConfigDict with every --config.x.y=value applied

An unknown flag, an unknown config key or a value of the wrong type stops with the nearest valid name.
"""

import argparse
import functools
import re
from pathlib import Path

import ml_collections
from absl import flags as absl_flags
from ml_collections import config_flags

from sfd_jax import ranges
from sfd_jax.errors import Faults, SfdError, nearest
from sfd_jax.files import user_path

# What tells a config file of one command from those of others: the command, keys that only its files have, an example.
KINDS = (
    ("demo", ("texture_vae", "encoder", "diffusion"), "configs/digits.py"),
    ("train", ("latents", "clocks"), "configs/sfd.py:xl"),
    ("train_texture_vae", ("lpips",), "configs/texture_vae.py"),
    ("train_semvae", ("model.bottleneck_dim",), "configs/semantic_vae.py"),
)
# Keys of configs that hold paths.
PATHS = ("path", "held_out_path", "semantic_vae", "visual_encoder", "lpips")


def path(text: str, *, local: bool = False) -> str:
    """Read a flag that is a path, local or gs://; for `type=`."""
    try:
        return user_path(text, local=local)
    except SfdError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


local_path = functools.partial(path, local=True)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise SfdError(f"{message} (see `{self.prog} --help`)")


def door_parser(door: str, doc: str) -> argparse.ArgumentParser:
    """Return the argument parser of `sfd <door>`, its help text taken from the door's docstring."""
    return _Parser(
        prog=f"sfd {door}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def parse_door(
    parser: argparse.ArgumentParser,
    argv: list[str],
    config: str | None = None,
    rules: tuple[ranges.Only, ...] = (),
    pending: Faults | None = None,
) -> argparse.Namespace:
    """Parse a door's arguments.

    Args:
      parser: from `door_parser`, with the door's own flags added.
      argv: arguments after the door's name.
      config: default of `--config` ("path.py" or "path.py:argument"), relative to the repository;
        None where the door takes no config. A config of the same kind is demanded.
      rules: which flags have an effect only with which others.
      pending: gets the faults of values that could be read, so that the command can add its own and stop on all.

    Returns:
      The namespace; `config` is the ConfigDict with all overrides applied, `config_name` the string it came from,
      and `given` the names of the flags that the user gave.

    Raises:
      SfdError: an unknown flag or config key, a value of the wrong type or outside its range (`sfd_jax.ranges`), a
        flag or override without effect, or no such config file. All of them are named.
    """
    if config is not None:
        parser.add_argument(
            "--config",
            default=config,
            help="config file, with an optional argument after a colon (default: %(default)s); "
            "--config.path.to.key=value overrides one of its values",
        )
    actions = {action.dest: action for action in parser._actions if action.default is not argparse.SUPPRESS}
    blank = argparse.Namespace(**dict.fromkeys(actions))  # argparse fills in no default where there is a value
    known, rest = parser.parse_known_args(_without_none(parser, argv), blank)
    overrides = [flag for flag in rest if config is not None and re.match(r"--?config\.", flag)]
    unknown = [flag for flag in rest if flag not in overrides]
    if unknown:
        name = unknown[0].split("=")[0]
        valid = [option for option in parser._option_string_actions]
        raise SfdError(f"unknown argument '{unknown[0]}'; {nearest(name, valid)}")
    known.given = sorted(name for name in actions if getattr(known, name) not in (None, []))
    for name, action in actions.items():
        if getattr(known, name) is None:
            setattr(known, name, action.default)
    found = Faults() if pending is None else pending
    found += ranges.faults(vars(known), "--", parser.prog.removeprefix("sfd "))
    found += ranges.useless(rules, vars(known), known.given, "--{}".format).values()
    if config is not None:
        known.config_name = known.config
        known.config = load_config(known.config, overrides, like=config, pending=found)
    if pending is None:
        found.stop()
    return known


def _without_none(parser: argparse.ArgumentParser, argv: list[str]) -> list[str]:
    """Spell the arguments as the parser does, and leave out each `--flag=None` whose default is None."""
    kept, argv = [], [_respelled(parser, argument) for argument in argv]
    while argv:
        name, _, value = argv[0].partition("=")
        action = parser._option_string_actions.get(name)
        taken = 1
        if action is not None and action.nargs is None and "=" not in argv[0] and len(argv) > 1:
            taken, value = 2, argv[1]
        is_none = value == "None" and action is not None and action.default is None and not action.required
        kept += [] if is_none else argv[:taken]
        argv = argv[taken:]
    return kept


def _respelled(parser: argparse.ArgumentParser, argument: str) -> str:
    """Take dashes for underscores in a flag's name, and the reverse; values are left alone."""
    name, equals, value = argument.partition("=")
    known = parser._option_string_actions
    for spelling in (name, "--" + name[2:].replace("-", "_"), re.sub("^--no_", "--no-", name)):
        if name.startswith("--") and spelling in known:
            return spelling + equals + value
    return argument


def find_config(path: str) -> Path:
    """Return the config file: as given, else relative to the repository that holds this package."""
    for candidate in (Path(path).expanduser(), Path(__file__).resolve().parents[2] / path):
        if candidate.is_file():
            return candidate
    raise SfdError(f"no config file '{path}' here or beside the package; configs live in configs/")


def load_config(
    name: str, overrides: list[str] = (), like: str | None = None, pending: Faults | None = None
) -> ml_collections.ConfigDict:
    """Load `path.py[:argument]` and apply `--config.a.b=value` overrides.

    Args:
      name: the file and its argument.
      overrides: "--config.a.b=value" each; the value None sets back what may be None or is by default empty.
      like: a config file of the kind that is wanted; None takes any.
      pending: as in `parse_door`.

    Raises:
      SfdError: a config of another kind, unknown key (with the nearest valid one), wrong type, a number outside its
        range, a path that is none, an override without effect, unknown argument, or no file. All are named.
    """
    path, _, argument = name.partition(":")
    file = str(find_config(path)) + (f":{argument}" if argument else "")
    base, found, values, nones = _parse(file, []), Faults(), {}, []
    if like is not None:
        _check_kind(base, name, like)
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
        config = _parse(file, list(values.values()))
        sentinels = [f"sample.{name}" for name in ranges.MAY_BE_NONE if config.get("sample", {}).get(name) == -1]
        for key in {*nones, *sentinels} - set(values):  # -1 is how configs said None once
            _set(config, key)
        told = found if pending is None else pending
        told += ranges.faults(config.to_dict())
        _check_rules(config, set(values), told)
        _read_paths(config, "", told)
    if found and pending is not None:
        found += pending
    found.stop()
    return config


def _check_kind(config: ml_collections.ConfigDict, name: str, like: str) -> None:
    """Raise SfdError where a config is of another kind than the file `like`."""
    has = lambda key: key in config if "." not in key else key.split(".")[1] in config.get(key.split(".")[0], {})
    kind = next((kind for kind in KINDS if all(map(has, kind[1]))), None)
    [wanted] = [kind for kind in KINDS if kind[2].partition(":")[0] == like.partition(":")[0]]
    if kind is None:
        lacks = ", ".join(key for key in wanted[1] if not has(key))
        raise SfdError(f"config {name} lacks {lacks}: take one like {wanted[2]}")
    if kind != wanted:
        raise SfdError(f"config {name} is for `sfd {kind[0]}`; this command takes one like --config={wanted[2]}")


def _check_rules(config: ml_collections.ConfigDict, given: set[str], found: Faults) -> None:
    """Add the overrides that have no effect."""
    for group in sorted({key.rpartition(".")[0] for key in given}):
        node, path = config, "--config."
        groups = {name: value for name, value in config.items() if isinstance(value, ml_collections.ConfigDict)}
        values = {f"{name}.{key}": value for name, node_ in groups.items() for key, value in node_.items()}
        spelled = {name: path + name for name in values}
        for part in (*group.split("."), None):
            values |= node  # what stands in the groups around it counts as well
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
        elif name in PATHS and isinstance(value, str) and value:
            try:
                config[name] = user_path(value, local=name.endswith("path"))
            except SfdError as error:
                found.append(f"{prefix}{name}: {error}")


def _set(config: ml_collections.ConfigDict, key: str) -> None:
    """Set a value back to None, or to an empty string where it is one."""
    *groups, name = key.split(".")
    for group in groups:
        config = config[group]
    with config.ignore_type():
        config[name] = "" if isinstance(config[name], str) else None


def _parse(file: str, overrides: list[str]) -> ml_collections.ConfigDict:
    argv = ["sfd", f"--config={file}", *overrides]
    values = absl_flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    try:
        values(argv)
        return values.config
    except (absl_flags.Error, TypeError, ValueError, AttributeError, KeyError) as error:
        # config_flags puts the traceback of the config file into its message: the last line says it.
        reason = str(error).strip().splitlines()[-1]
        raise SfdError(f"config {file}: {reason}") from error


def _check_value(config: ml_collections.ConfigDict, key: str, value: str, name: str) -> bool:
    """Raise SfdError where `key` is not in the config, or `value` does not read as its type; tell if it is None."""
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
    if value == "None" and (node in (None, "") or field in ranges.MAY_BE_NONE):
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
