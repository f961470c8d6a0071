"""Parts that people exchange, by name, and how a command learns of those that stand outside this package.

Each kind of part (networks, clocks, visual encoders, ...) has one `Registry`. A part of one's own is registered when
its module is imported, which happens where

  a config file imports it,
  `--plugin=MODULE` (or `--plugin=FILE.py`) is given to any command, or SFD_PLUGINS=MODULE,FILE.py stands in the
  environment,
  or its distribution is installed with an entry point of group `sfd_jax.plugins`.

Nothing that a checkpoint names is ever imported: it keeps where its parts were registered for the message alone.
"""

import argparse
import importlib
import importlib.metadata
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from sfd_jax.errors import SfdError, nearest

Part = TypeVar("Part")


class Registry(dict[str, Part]):
    """The parts of one kind by name; `registry[name]` of an unknown one is an SfdError with the nearest name.

    Args:
      kind: what messages call such a part, e.g. "clocks".
    """

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        self._modules: dict[str, str] = {}

    def register(self, name: str, part: Part | None = None, module: str | None = None) -> Callable[[Part], Part] | None:
        """Add a part under a name; without `part` return a decorator that does.

        Args:
          module: where it is registered; by default the module of the class, function or object.

        Raises:
          SfdError: another module has taken the name.
        """
        if part is None:
            return lambda part: self.register(name, part, module) or part
        module = module or getattr(part, "__module__", type(part).__module__)
        taken = self._modules.get(name, module)
        if taken != module:  # the same module may register anew: a notebook's cell that runs twice
            raise SfdError(f"{module} registers {self.kind} '{name}', but {taken} has one of that name: choose another")
        self[name], self._modules[name] = part, module

    def registered_in(self, name: str) -> str | None:
        """Return the module that registered a part, None where this package did; for the records of checkpoints."""
        module = self._modules[name]
        return None if module.partition(".")[0] == __package__ else module

    def find(self, name: str, registered_in: str | None = None) -> Part:
        """Return a part; `registered_in` is the module that did so when the name was written down, where it is known.

        Raises:
          SfdError: no such part here; the message says what to import.
        """
        if name not in self and registered_in:
            raise SfdError(
                f"{self.kind} '{name}' is a part of the module {registered_in}, which is not imported: add "
                f"--plugin={registered_in} (or set SFD_PLUGINS={registered_in})"
            )
        return self[name]

    def __missing__(self, name: str) -> Part:
        raise SfdError(f"no {self.kind} '{name}': {nearest(str(name), self)}")


# What `sfd convert` reads and writes, in the order in which it is asked; filled by `convert` and by visual encoders.
FORMATS: Registry[Any] = Registry("format")


def load_plugins(names: Iterable[str] = ()) -> None:
    """Import the modules that register parts: installed ones, those of SFD_PLUGINS, and those given.

    Args:
      names: modules, or files that end in .py. The working folder is searched too.

    Raises:
      SfdError: one of them is not there. Whatever goes wrong inside of one is raised as it is.
    """
    for entry in importlib.metadata.entry_points(group="sfd_jax.plugins"):
        entry.load()
    for name in (*filter(None, os.environ.get("SFD_PLUGINS", "").split(",")), *names):
        file = Path(name).expanduser()
        module, folder = (file.stem, file.parent) if file.suffix == ".py" else (name, Path())
        if (folder := str(folder.resolve())) not in sys.path:
            sys.path.append(folder)
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module and not module.startswith(f"{error.name}."):
                raise
            raise SfdError(f"plugin '{name}': no such module on the Python path or in {folder}") from error


def take_plugins(arguments: list[str]) -> list[str]:
    """Load the plugins that a command's arguments name, and return the other arguments."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--plugin", action="append", default=[])
    known, others = parser.parse_known_args(arguments)
    load_plugins(known.plugin)
    return others
