"""Flags of the front doors: argparse for a door's own, ml_collections config_flags for `--config`.

A door writes

    parser = door_parser("train", __doc__)
    parser.add_argument("--workdir", required=True, help="...")
    args = parse_door(parser, argv, config="configs/sfd.py:xl")
    args.config            # a locked ConfigDict with every --config.x.y=value applied

An unknown flag, an unknown config key or a value of the wrong type stops with the nearest valid name.
"""

import argparse
import re
from pathlib import Path

import ml_collections
from absl import flags as absl_flags
from ml_collections import config_flags

from sfd_jax.errors import SfdError, nearest


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
    parser: argparse.ArgumentParser, argv: list[str], config: str | None = None
) -> argparse.Namespace:
    """Parse a door's arguments.

    Args:
      parser: from `door_parser`, with the door's own flags added.
      argv: arguments after the door's name.
      config: default of `--config` ("path.py" or "path.py:argument"), relative to the repository;
        None where the door takes no config.

    Returns:
      The namespace; `config` is the ConfigDict with all overrides applied, and `config_name` the
      string it came from.

    Raises:
      SfdError: an unknown flag or config key, a value of the wrong type, or no such config file.
    """
    if config is not None:
        parser.add_argument(
            "--config",
            default=config,
            help="config file, with an optional argument after a colon (default: %(default)s); "
            "--config.path.to.key=value overrides one of its values",
        )
    known, rest = parser.parse_known_args([_respelled(parser, argument) for argument in argv])
    overrides = [flag for flag in rest if config is not None and re.match(r"--?config\.", flag)]
    unknown = [flag for flag in rest if flag not in overrides]
    if unknown:
        name = unknown[0].split("=")[0]
        valid = [option for option in parser._option_string_actions]
        raise SfdError(f"unknown argument '{unknown[0]}'; {nearest(name, valid)}")
    if config is not None:
        known.config_name = known.config
        known.config = load_config(known.config, overrides)
    return known


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
    for candidate in (Path(path), Path(__file__).resolve().parents[2] / path):
        if candidate.is_file():
            return candidate
    raise SfdError(f"no config file '{path}' here or beside the package; configs live in configs/")


def load_config(name: str, overrides: list[str] = ()) -> ml_collections.ConfigDict:
    """Load `path.py[:argument]` and apply `--config.a.b=value` overrides.

    Raises:
      SfdError: unknown key (with the nearest valid one), wrong type, unknown argument, or no file.
    """
    path, _, argument = name.partition(":")
    file = str(find_config(path)) + (f":{argument}" if argument else "")
    for flag in overrides:
        if "=" not in flag:
            raise SfdError(f"write {flag}=VALUE: a config override needs an equals sign")
    base = _parse(file, [])
    for flag in overrides:
        key, _, value = flag.lstrip("-").removeprefix("config.").partition("=")
        _check_value(base, key, value, name)
    return _parse(file, list(overrides))


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


def _check_value(config: ml_collections.ConfigDict, key: str, value: str, name: str) -> None:
    """Raise SfdError where `key` is not in the config, or `value` does not read as its type."""
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
    if type(node) in (int, float):
        try:
            type(node)(value)
        except ValueError:
            raise SfdError(
                f"config {name}: '{key}' takes {_ARTICLE[type(node)]}, as its default {node!r} is; got '{value}'"
            ) from None


_ARTICLE = {int: "an integer", float: "a number"}
