"""Settings declared once: a frozen dataclass whose fields hold help, range and choices, made into flags and configs.

    @dataclasses.dataclass(frozen=True)
    class Job:
        batch_size: int = setting(64, "images at once", range=Range(int, 1, 1024))

        def __post_init__(self):
            check_fields("job", self)          # ranges and choices, wherever the values come from

    flags_from(Job, parser)                    # --batch_size, None where it is not given
    job = from_args(Job, args, base=saved)     # what was given, over `saved` or the defaults

"Not given" is None, so that a saved value or default is kept. A range that is in `ranges.RANGES` need not be repeated
in the field.
"""

import argparse
import dataclasses
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import ml_collections

from sfd_jax.errors import SfdError, nearest
from sfd_jax.ranges import Range
from sfd_jax.registry import Registry

Settings = TypeVar("Settings")


def setting(
    default: Any,
    help: str,
    *,
    range: Range | None = None,
    choices: tuple[str, ...] = (),
    read: Callable[[str], Any] | None = None,
    metavar: str | None = None,
    was: Mapping[Any, Any] = types.MappingProxyType({}),
    was_called: str | None = None,
) -> Any:
    """Declare a field of a settings dataclass.

    Args:
      default: its default; None for "not given", where the field's type allows it; `dataclasses.MISSING` for none.
      help: of the flag, without the default.
      range: the numbers it takes; by default those of its name in `ranges.RANGES`.
      choices: the strings it takes.
      read: parses the flag's text, instead of the field's type.
      metavar: what the flag's help calls its value.
      was: values as older configs and recipes wrote them -> as they are now.
      was_called: the field's name in older configs and recipes.
    """
    metadata = {"help": help, "range": range, "choices": choices, "read": read, "metavar": metavar}
    return dataclasses.field(default=default, metadata=metadata | {"was": was, "was_called": was_called})


def flags_from(
    cls: type, parser: argparse._ActionsContainer, *, only: Iterable[str] | None = None, under: str = ""
) -> None:
    """Add a flag for each field of a settings dataclass; all default to None, "not given".

    Args:
      cls: the dataclass.
      parser: an argument parser, or one of its groups.
      only: names of the fields to take; all of them by default.
      under: what applies before the class's default where a flag is not given, e.g. "the checkpoint's"; for the help.
    """
    for field in dataclasses.fields(cls):
        if only is not None and field.name not in only:
            continue
        metadata, kind = field.metadata, kind_of(cls, field.name)
        default = None if field.default in (None, dataclasses.MISSING) else field.default
        shown = ", else ".join(filter(None, (under, None if default is None else str(default))))
        options = {"default": None, "help": metadata.get("help", "") + (f" (default: {shown})" if shown else "")}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options |= {"type": metadata.get("read") or kind, "choices": metadata.get("choices") or None}
            options["metavar"] = metadata.get("metavar")
        names = filter(None, (field.name, metadata.get("was_called")))
        action = parser.add_argument(*(f"--{name}" for name in names), **options)
        action.range = metadata.get("range")  # `parse_command` checks it


def from_args(cls: type[Settings], args: argparse.Namespace, base: Settings | None = None) -> Settings:
    """Make the dataclass from the flags given on the command line.

    Args:
      cls: the dataclass.
      args: parsed flags; a field whose flag is None or absent was not given.
      base: settings that the flags override; the class's defaults by default.

    Raises:
      SfdError: a value that the class refuses.
    """
    values = {} if base is None else to_dict(base)
    given = {field.name: getattr(args, field.name, None) for field in dataclasses.fields(cls)}
    return cls(**values | {name: value for name, value in given.items() if value is not None})


def to_dict(settings: Any) -> dict[str, Any]:
    """Return the fields of a dataclass by name, JSON-able where their values are."""
    return {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}


def over_defaults(cls: type, group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a dataclass's defaults, overridden by the fields of a config group or a recipe.

    Names and values that an older version wrote are translated to those of today.
    """
    values = {}
    for field in dataclasses.fields(cls):
        names = filter(None, (field.name, field.metadata.get("was_called")))
        value = next((group[name] for name in names if name in group), defaults_of(cls)[field.name])
        values[field.name] = next((now for old, now in field.metadata.get("was", {}).items() if old == value), value)
    return values


def config_group(settings: Any) -> ml_collections.ConfigDict:
    """Return the ConfigDict of a dataclass; a field that is None is a placeholder of its type."""
    return part_group(type(settings), **to_dict(settings))


def part_group(cls: type, **given: Any) -> ml_collections.ConfigDict:
    """Return the ConfigDict of a dataclass's defaults, overridden by the given values, its name among them."""
    values = defaults_of(cls) | given
    for name in defaults_of(cls):
        if values[name] is None or values[name] is ...:
            values[name] = ml_collections.config_dict.placeholder(kind_of(cls, name))
    return ml_collections.ConfigDict(values)


def ranges_of(cls: type) -> dict[str, Range]:
    """Return the ranges that a dataclass's fields declare themselves, by name."""
    return {field.name: found for field in dataclasses.fields(cls) if (found := field.metadata.get("range"))}


def from_group(cls: type[Settings], values: Mapping[str, Any], called: str | None = None) -> Settings:
    """Make a dataclass from a config group, or from the copy of one in a checkpoint or recipe.

    Args:
      cls: the dataclass.
      values: its fields by name; a list stands for a tuple, as in JSON.
      called: what messages call the group; by default the class's name.

    Raises:
      SfdError: a key that the class lacks (with the nearest valid one), a missing one, or a value that it refuses.
    """
    called, defaults = called or cls.__name__, defaults_of(cls)
    for key in values:
        if key not in defaults:
            valid = nearest(key, defaults) if defaults else "it takes none"
            raise SfdError(f"{called} has no field '{key}': {valid}")
    if missing := [key for key, default in defaults.items() if default is ... and key not in values]:
        raise SfdError(f"{called} needs a value for: {', '.join(missing)}")
    return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


def describe(registry: Registry, part: Any) -> dict[str, Any]:
    """Return a registered dataclass as a config: {"name": its name in the registry, **its fields}.

    Raises:
      SfdError: its class is not in the registry.
    """
    for name, cls in registry.items():
        if type(part) is cls:
            _check_class(cls)
            return {"name": name, **to_dict(part)}
    raise SfdError(
        f"{type(part).__name__} are {registry.kind} without a registered name: register the class, a frozen dataclass, "
        "so that checkpoints can record it"
    )


def make(registry: Registry, config: Mapping[str, Any], registered_in: str | None = None) -> Any:
    """Make a registered dataclass from a config, the reverse of `describe`.

    Args:
      registry: of its kind.
      config: "name" and fields of the class; fields that are not given have their defaults.
      registered_in: the module that had registered it when the config was written, where that is known.

    Raises:
      SfdError: no such name, an unknown or missing field, or a value that the class refuses.
    """
    name, fields = config["name"], {key: value for key, value in config.items() if key != "name"}
    return from_group(registry.find(name, registered_in), fields, f"{registry.kind} '{name}'")


def defaults_of(cls: type) -> dict[str, Any]:
    """Return the defaults of a dataclass by field, `...` where there is none.

    Raises:
      SfdError: it is not itself a frozen dataclass, or has a field called `name`, which configs use for the class.
    """
    _check_class(cls)
    defaults = {}
    for field in dataclasses.fields(cls):
        made = field.default_factory() if field.default_factory is not dataclasses.MISSING else ...
        defaults[field.name] = made if field.default is dataclasses.MISSING else field.default
    return defaults


def _check_class(cls: type) -> None:
    params, called = vars(cls).get("__dataclass_params__"), f"{cls.__module__}.{cls.__qualname__}"
    if params is None or not params.frozen:  # a subclass without the decorator has only its parent's fields
        raise SfdError(f"{called} is not a frozen dataclass: decorate it with @dataclasses.dataclass(frozen=True)")
    if "name" in cls.__dataclass_fields__:
        raise SfdError(f"{called} has a field called 'name', which is the class's own in configs: rename the field")


def kind_of(cls: type, name: str) -> type:
    """Return the type of a dataclass's field, without None."""
    hint = typing.get_type_hints(cls)[name]
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        [hint] = [part for part in typing.get_args(hint) if part is not types.NoneType]
    return hint
