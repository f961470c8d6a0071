"""The parity pack: cases of released answers, with weights drawn from a seed instead of stored.

A case is NAME.json (configuration, keys and shapes of the weights, seed) and NAME.npz (`in_*`, and
the answers `out_*`, `grad_*`, `after_*`, `ema_*`), in PyTorch's layout. Sizes and seeds are read
from the JSON, so packs of other sizes work too. A case records which answers were read, since an
answer that is not compared proves nothing.
"""

import functools
import json
import os
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sfd_jax.convert.lazy_array import LazyArray
from sfd_jax.errors import SfdError

ANSWERS = ("out_", "grad_", "after_", "ema_")


def pack_folders(text: str | os.PathLike) -> list[Path]:
    """Return the folders of a list with colons between, as SFD_PARITY_DIR and `--pack` take it."""
    return [Path(part) for part in os.fspath(text).split(os.pathsep) if part]


def case_names(directory: str | os.PathLike) -> list[str]:
    """Return the sorted names of a pack's cases, including those with a missing file.

    Raises:
      SfdError: the folder is missing or has no case.
    """
    directory = Path(directory)
    names = {path.stem for path in [*directory.glob("*.json"), *directory.glob("*.npz")]}
    if not names:
        raise SfdError(f"no parity pack in '{directory}': it has no NAME.json with NAME.npz")
    return sorted(names)


class Case:
    """One case of a pack.

    Args:
      directory: the pack.
      name: the case.

    Raises:
      SfdError: a file is missing or damaged.
    """

    def __init__(self, directory: str | os.PathLike, name: str):
        self.name, self.folder = name, Path(directory) / name  # files beside the arrays, if any
        self._unread: set[str] = set()
        path = Path(directory) / f"{name}.json"
        try:
            self.spec = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise SfdError(f"parity case {name}: '{path}' cannot be read ({error})") from error
        if not isinstance(self.spec, dict):
            raise SfdError(f"parity case {name}: '{path}' is not a JSON object")
        self._arrays_path = path.with_suffix(".npz")
        if not self.is_key_list:
            with self._arrays() as arrays:
                self._names = set(arrays.files)
            self._unread = {name for name in self._names if name.startswith(ANSWERS)}

    @property
    def is_key_list(self) -> bool:
        """Whether this is only a list of released keys and shapes, without arrays."""
        return self.name.endswith("_state_dict")

    @property
    def seed(self) -> int:
        return self.get("seed")

    def get(self, field: str) -> Any:
        """Return a field of the JSON; raise SfdError if it is missing."""
        if field not in self.spec:
            raise SfdError(f"parity case {self.name}: its JSON lacks '{field}'")
        return self.spec[field]

    def has(self, array: str) -> bool:
        return array in self._names

    def array(self, name: str) -> np.ndarray:
        """Return an input or an answer; the answer then counts as compared."""
        if name not in self._names:
            raise SfdError(f"parity case {self.name}: its npz lacks '{name}'")
        self._unread.discard(name)
        with self._arrays() as arrays:
            return arrays[name]

    def arrays(self, prefix: str) -> dict[str, np.ndarray]:
        """Return all arrays whose names begin with `prefix`, by the rest of their names."""
        names = sorted(name for name in self._names if name.startswith(prefix))
        return {name.removeprefix(prefix): self.array(name) for name in names}

    def images(self, name: str) -> np.ndarray:
        """Return an array (B, C, H, W) as (B, H, W, C)."""
        return np.ascontiguousarray(np.moveaxis(self.array(name), 1, -1))

    def unread(self) -> list[str]:
        """Return the answers that were not compared."""
        return sorted(self._unread)

    def weights(self, params: str = "params", seed: str = "seed") -> dict[str, LazyArray]:
        """Return the case's weights by key, each drawn when it is loaded."""
        gain = self.spec.get("conv_gain", 1.0)
        return {
            key: drawn_weight(key, shape, self.get(seed), gain if key.endswith(".conv.weight") else 1.0)
            for key, shape in self.get(params).items()
        }

    def _arrays(self):
        try:
            return np.load(self._arrays_path, allow_pickle=False)
        except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
            raise SfdError(f"parity case {self.name}: '{self._arrays_path}' cannot be read ({error})") from error


def drawn_weight(key: str, shape: Sequence[int], seed: int, gain: float = 1.0) -> LazyArray:
    """Return the weight that the pack draws for a key, shape and seed."""
    shape = tuple(shape)
    load = functools.partial(_draw, key, shape, seed, np.float32(gain))
    return LazyArray(shape, np.dtype(np.float32), load)


def _draw(key: str, shape: tuple[int, ...], seed: int, gain: np.float32) -> np.ndarray:
    random = np.random.RandomState((zlib.crc32(key.encode()) + 7919 * seed) % 2**32)
    n = random.standard_normal(shape).astype(np.float32)
    last = key.rsplit(".", 1)[-1]
    if last == "running_var":
        n = 1 + 0.2 * np.abs(n)
    elif last == "running_mean":
        n *= 0.1
    elif last == "gamma":
        n = 0.3 + 0.05 * n
    elif last == "weight" and len(shape) == 1:
        n = 1 + 0.1 * n
    elif len(shape) <= 1:
        n *= 0.05
    elif last in _TOKENS or "embedding_table" in key:
        n *= 0.1
    else:
        n /= np.float32(np.sqrt(np.prod(shape[1:])))
    return n * gain if gain != 1 else n


_TOKENS = ("cls_token", "register_tokens", "mask_token", "pos_embed")
