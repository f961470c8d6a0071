"""Settings said once: a frozen dataclass whose fields know help, range and choices; flags and config groups made of it.

    @dataclasses.dataclass(frozen=True)
    class Job:
        batch_size: int = setting(64, "images at once", range=Range(int, 1, 1024))

        def __post_init__(self):
            check_fields("job", self)          # ranges and choices, wherever the values come from

    flags_from(Job, parser)                    # --batch_size, None where it is not given
    job = from_args(Job, args, base=saved)     # what was given, over `saved` or the defaults

"Not given" is None, so that what lies under the flags shows through. A range that is in `ranges.RANGES` need not be
repeated in the field.
"""

import argparse
import dataclasses
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from sfd_jax.ranges import Range

Settings = TypeVar("Settings")


def setting(
    default: Any,
    help: str,
    *,
    range: Range | None = None,
    choices: tuple[str, ...] = (),
    read: Callable[[str], Any] | None = None,
    metavar: str | None = None,
    was: Any = None,
) -> Any:
    """Declare a field of a settings dataclass.

    Args:
      default: its default; None for "not given", where the field's type allows it; `dataclasses.MISSING` for none.
      help: of the flag, without the default.
      range: the numbers it takes; by default those of its name in `ranges.RANGES`.
      choices: the words it takes.
      read: reads the flag's text, instead of the field's type.
      metavar: what the flag's help calls its value.
      was: the value that meant None in configs and recipes written before.
    """
    told = {"help": help, "range": range, "choices": choices, "read": read, "metavar": metavar, "was": was}
    return dataclasses.field(default=default, metadata=told)


def flags_from(
    cls: type, parser: argparse._ActionsContainer, *, only: Iterable[str] | None = None, under: str = ""
) -> None:
    """Add a flag for each field of a settings dataclass; all default to None, "not given".

    Args:
      cls: the dataclass.
      parser: an argument parser, or one of its groups.
      only: names of the fields to take; all of them by default.
      under: what stands in where a flag is not given and the class's default may not, e.g. "the checkpoint's".
    """
    for field in dataclasses.fields(cls):
        if only is not None and field.name not in only:
            continue
        told, kind = field.metadata, kind_of(cls, field.name)
        default = None if field.default in (None, dataclasses.MISSING) else field.default
        shown = ", else ".join(filter(None, (under, None if default is None else str(default))))
        options = {"default": None, "help": told.get("help", "") + (f" (default: {shown})" if shown else "")}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options |= {"type": told.get("read") or kind, "choices": told.get("choices") or None}
            options["metavar"] = told.get("metavar")
        action = parser.add_argument(f"--{field.name}", **options)
        action.range = told.get("range")  # `parse_door` checks it


def from_args(cls: type[Settings], args: argparse.Namespace, base: Settings | None = None) -> Settings:
    """Make the dataclass of what was given on the command line.

    Args:
      cls: the dataclass.
      args: parsed flags; a field whose flag is None or absent was not given.
      base: settings under the flags; the class's defaults by default.

    Raises:
      SfdError: as the class says of its values.
    """
    values = {} if base is None else to_dict(base)
    given = {field.name: getattr(args, field.name, None) for field in dataclasses.fields(cls)}
    return cls(**values | {name: value for name, value in given.items() if value is not None})


def to_dict(settings: Any) -> dict[str, Any]:
    """Return the fields of a dataclass by name, JSON-able where their values are."""
    return {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}


def upgraded(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config group or a recipe's entry with None where an older version wrote another word for it."""
    was = {field.name: field.metadata.get("was") for field in dataclasses.fields(cls)}
    return {name: None if was.get(name) is not None and value == was[name] else value for name, value in values.items()}


def config_group(settings: Any):
    """Return the ConfigDict of a dataclass; a field that is None takes a value of its type later."""
    import ml_collections

    blank = {name: ml_collections.config_dict.placeholder(kind_of(type(settings), name)) for name in to_dict(settings)}
    return ml_collections.ConfigDict(
        {name: blank[name] if value is None else value for name, value in to_dict(settings).items()}
    )


def ranges_of(cls: type) -> dict[str, Range]:
    """Return the ranges that a dataclass's fields tell themselves, by name."""
    return {field.name: found for field in dataclasses.fields(cls) if (found := field.metadata.get("range"))}


def kind_of(cls: type, name: str) -> type:
    """Return the type of a dataclass's field, without None."""
    hint = typing.get_type_hints(cls)[name]
    if isinstance(hint, types.UnionType):
        [hint] = [part for part in typing.get_args(hint) if part is not types.NoneType]
    return hint
