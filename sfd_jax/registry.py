"""Registries of exchangeable parts by name, and the loading of plugins: parts from outside this package.

Each kind of part (networks, clocks, visual encoders, ...) has one `Registry`. A part of your own is registered when
its module is imported, which happens where

  a config file imports it,
  `--plugin=MODULE` (or `--plugin=FILE.py`) is given to any command, or SFD_PLUGINS=MODULE,FILE.py is set in the
  environment,
  or its distribution is installed with an entry point of group `sfd_jax.plugins`.

Modules that a checkpoint names are never imported: it records where its parts were registered only for messages.
"""

import argparse
import importlib
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from sfd_jax.errors import SfdError, nearest

Part = TypeVar("Part")


class Registry(dict[str, Part]):
    """Hold the parts of one kind by name; `registry[name]` of an unknown name raises SfdError with the nearest one.

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
        if taken != module:  # the same module may register again: a notebook's cell that runs twice
            raise SfdError(f"{module} registers {self.kind} '{name}', but {taken} has one of that name: choose another")
        self[name], self._modules[name] = part, module

    def registered_in(self, name: str) -> str | None:
        """Return the module that registered a part, None where this package did; checkpoints record it."""
        module = self._modules[name]
        return None if module.partition(".")[0] == __package__ else module

    def find(self, name: str, registered_in: str | None = None) -> Part:
        """Return a part; `registered_in` is the module that had registered it when a checkpoint recorded the name.

        Raises:
          SfdError: no such part; the message says what to import.
        """
        if name not in self and registered_in:
            raise SfdError(
                f"{self.kind} '{name}' is a part of the module {registered_in}, which is not imported: add "
                f"--plugin={registered_in} (or set SFD_PLUGINS={registered_in})"
            )
        return self[name]

    def __missing__(self, name: str) -> Part:
        raise SfdError(
            f"no {self.kind} '{name}': {nearest(str(name), self)} (load one of your own with --plugin=MODULE)"
        )


# What `sfd convert` reads and writes, in the order in which formats are tried; filled by `convert` and by encoders.
FORMATS: Registry[Any] = Registry("format")


def load_plugins(names: Iterable[str] = ()) -> None:
    """Import the modules that register parts: installed ones, those of SFD_PLUGINS, and those given.

    Args:
      names: modules, or files that end in .py. The working folder, or the file's folder, is searched too.

    Raises:
      SfdError: one of them does not exist, or a file has the name of another module. Errors inside a module are
        raised as they are.
    """
    for entry in importlib.metadata.entry_points(group="sfd_jax.plugins"):
        entry.load()
    of_environment = filter(None, map(str.strip, os.environ.get("SFD_PLUGINS", "").split(",")))
    for name in (*of_environment, *map(str.strip, names)):
        if not name:
            raise SfdError("an empty --plugin: give a module or a file that ends in .py")
        file = Path(name).expanduser().resolve()
        is_file = file.suffix == ".py"
        if (folder := str(file.parent if is_file else Path.cwd())) not in sys.path:
            sys.path.append(folder)
        try:
            _load_file(file) if is_file else importlib.import_module(name)
        except ModuleNotFoundError as error:
            if is_file or (error.name != name and not name.startswith(f"{error.name}.")):
                raise
            raise SfdError(f"plugin '{name}': no such module on the Python path or in {folder}") from error


def _load_file(file: Path) -> None:
    """Import this very file, as a module of its name."""
    if not file.is_file():
        raise SfdError(f"plugin '{file}': no such file")
    if file.stem in sys.modules:
        there = getattr(sys.modules[file.stem], "__file__", None)
        if there and Path(there).resolve() == file:
            return
        raise SfdError(
            f"plugin '{file}': another module has the name {file.stem} ({there or 'a part of Python'}); rename the file"
        )
    spec = importlib.util.spec_from_file_location(file.stem, file)
    sys.modules[file.stem] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[file.stem]
        raise


def take_plugins(arguments: list[str]) -> list[str]:
    """Load the plugins that a command's arguments name, and return the other arguments."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--plugin", action="append", default=[])
    known, others = parser.parse_known_args(arguments)
    load_plugins(known.plugin)
    return others
