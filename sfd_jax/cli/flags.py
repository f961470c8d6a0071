"""Flags of the commands: argparse for their own flags, ml_collections config_flags for `--config`.

Use:

    parser = command_parser("train", __doc__)
    parser.add_argument("--workdir", required=True, help="...")
    args = parse_command(parser, argv, config="configs/sfd.py:xl")
    args.config            # a locked ConfigDict with every --config.x.y=value applied

Errors for unknown flags and config keys name the nearest valid one.
"""

import argparse
import copy
import functools
import re

from sfd_jax import ranges
from sfd_jax.errors import Faults, SfdError, nearest
from sfd_jax.files import user_path


def path(text: str, *, local: bool = False) -> str:
    """Parse a path, local or gs://; for `type=`."""
    try:
        return user_path(text, local=local)
    except SfdError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


local_path = functools.partial(path, local=True)


class _Parser(argparse.ArgumentParser):
    def parse_known_args(self, args: list[str], namespace: argparse.Namespace | None = None):
        self._args = args
        return super().parse_known_args(args, namespace)

    def error(self, message: str):
        # A missing flag may only be misspelt, so an unknown one is reported first.
        flags = [flag for flag in self._args if re.match(r"--(?!config\.)\w", flag)]
        if unknown := [flag for flag in flags if flag.split("=")[0] not in self._option_string_actions]:
            message = self.unknown(unknown[0])
        raise SfdError(f"{message} (see `{self.prog} --help`)")

    def unknown(self, flag: str) -> str:
        return f"unknown argument '{flag}'; {nearest(flag.split('=')[0], self._option_string_actions)}"


def command_parser(command: str, doc: str) -> argparse.ArgumentParser:
    """Return the argument parser of a command, with the command's docstring as help text."""
    return _Parser(
        prog=f"sfd {command}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def parse_command(
    parser: argparse.ArgumentParser,
    argv: list[str],
    config: str | None = None,
    rules: tuple[ranges.Only, ...] = (),
    pending: Faults | None = None,
) -> argparse.Namespace:
    """Parse a command's arguments.

    Args:
      parser: from `command_parser`, with the command's own flags added.
      argv: arguments after the command's name.
      config: default of `--config` ("path.py" or "path.py:argument"), relative to the repository,
        which also determines the kind of config; None if the command takes no config.
      rules: which flags have an effect only with which others.
      pending: receives the faults instead of raising them, so that the command can add its own.

    Returns:
      The namespace; `config` is the ConfigDict with all overrides applied, `config_name` the string it came from,
      and `given` the names of the given flags.

    Raises:
      SfdError: an unknown flag or config key, a value of the wrong type or outside its range (`sfd_jax.ranges`), a
        flag or override without effect, or a missing config file. All faults are named.
    """
    if config is not None:
        parser.add_argument(
            "--config",
            default=config,
            help="config file, with an optional argument after a colon (default: %(default)s); "
            "--config.path.to.key=value overrides one of its values",
        )
    actions = {action.dest: action for action in parser._actions if action.default is not argparse.SUPPRESS}
    blank = argparse.Namespace(**dict.fromkeys(actions))  # argparse sets defaults only for missing values
    known, rest = parser.parse_known_args(_without_none(parser, argv), blank)
    overrides = [flag for flag in rest if config is not None and re.match(r"--?config\.", flag)]
    unknown = [flag for flag in rest if flag not in overrides]
    if unknown:
        raise SfdError(parser.unknown(unknown[0]))
    known.given = sorted(name for name in actions if getattr(known, name) not in (None, []))
    for name, action in actions.items():
        if getattr(known, name) is None:
            setattr(known, name, action.default)
    found = Faults() if pending is None else pending
    own = {name: getattr(action, "range", None) for name, action in actions.items()}
    found += ranges.faults(vars(known), "--", parser.prog.removeprefix("sfd "), own)
    found += ranges.useless(rules, vars(known), known.given, "--{}".format).values()
    if config is not None:
        from sfd_jax.experiment.config_files import load_config  # brings JAX

        known.config_name = known.config
        known.config = load_config(known.config, overrides, like=config, pending=found)
    if pending is None:
        found.stop()
    return known


def read_ahead(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """Return `--config` as it was given and the flags that a parser knows, for a config that depends on them."""
    ahead = copy.deepcopy(parser)
    ahead.add_argument("--config")
    argv = [argument for argument in argv if argument not in ("-h", "--help")]
    return ahead.parse_known_args(_without_none(ahead, argv))[0]


def parse_training(command: str, doc: str, argv: list[str], config: str) -> tuple[argparse.Namespace, Faults]:
    """Parse the arguments of a training command, and collect faults, to report all of them at once.

    Args:
      command, doc: its name and docstring.
      argv: arguments after its name.
      config: default of `--config`.

    Returns:
      (namespace of `parse_command`, faults so far).
    """
    parser = command_parser(command, doc)
    parser.add_argument("--workdir", type=path, required=True, help="folder of the run")
    parser.add_argument("--init", type=path, metavar="CKPT", help="checkpoint whose weights to start from")
    parser.add_argument("--check", action="store_true", help="only look for faults")
    parser.add_argument(
        "--profile",
        type=_steps,
        metavar="FIRST:LAST",
        help="steps that JAX's profiler records into WORKDIR/profile, such as 100:103",
    )
    found = Faults()
    return parse_command(parser, argv, config=config, pending=found), found


def _steps(text: str) -> tuple[int, int]:
    if not (match := re.fullmatch(r"(\d+):(\d+)", text)) or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"'{text}': give the first and the last step, such as 100:103")
    return int(match[1]), int(match[2])


def _without_none(parser: argparse.ArgumentParser, argv: list[str]) -> list[str]:
    """Normalise the spelling of arguments, and remove each `--flag=None` whose default is None."""
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
    """Accept dashes for underscores in the name of a flag, and the reverse; values do not change."""
    name, equals, value = argument.partition("=")
    known = parser._option_string_actions
    for spelling in (name, "--" + name[2:].replace("-", "_"), re.sub("^--no_", "--no-", name)):
        if name.startswith("--") and spelling in known:
            return spelling + equals + value
    return argument
