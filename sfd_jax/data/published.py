"""The released latent shards, `latents_rankRR_shardNNN.safetensors`, read as they are.

Their arrays are channels first and named otherwise; a record comes out as from our own store:

    latents, latents_flip             -> texture, texture_flip            (H,W,C)
    latents_sv(_flip)                 -> semantic(_flip)                  (H,W,C)
    latents_dino(_flip)               -> semantic(_flip), the PCA variant of ReDi
    feats_dino(_flip)                 -> repa_features(_flip)             (N,F), rows then columns
    labels                            -> label

The images are numbered through the files in the order of their names.
"""

import functools
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from sfd_jax.data.latent_store import FLIPS, LatentStore, refuse_flips
from sfd_jax.errors import SfdError
from sfd_jax.latents import LatentStatistics

_FILE = re.compile(r"latents_rank(\d+)_shard(\d+)\.safetensors")


def open_latents(
    directory: str | os.PathLike,
    *,
    repa: bool = False,
    released_statistics: Callable[[Path], LatentStatistics] | None = None,
) -> "LatentStore | PublishedLatents":
    """Open latents to train on: our store, or released shards as they are.

    Args:
      directory: of either.
      repa: the stored features are wanted. (A store of ours reads what it holds in any case.)
      released_statistics: reads the `*_stats.pt` of a folder of released shards.

    Returns:
      A random-access source with `statistics` and `class_names`.

    Raises:
      SfdError: neither is there, or it is damaged.
    """
    if next(Path(directory).glob("latents_rank*_shard*.safetensors"), None) is None:
        return LatentStore(directory)
    source = PublishedLatents(directory, repa=repa)
    if released_statistics is not None:
        source.statistics = released_statistics(source.directory)
    return source


class PublishedLatents:
    """Random access to a folder of released shards.

    Args:
      directory: the folder.
      repa: also read the stored features, which are twenty times larger than the latents.

    Attributes:
      statistics: None until somebody sets them; released shards do not hold theirs.
      class_names: None; released shards do not hold them.
      flips: the mirror images' arrays are there too.
      fields: name -> (dtype, shape) of an image's arrays, from the headers; the mirror image's end in _flip.

    Raises:
      SfdError: no shards, one that is damaged, or shards that differ in what they hold.
    """

    def __init__(self, directory: str | os.PathLike, *, repa: bool = False):
        self.directory = Path(directory)
        self.repa = repa
        self.statistics: LatentStatistics | None = None
        self.class_names: list[str] | None = None
        found = [path for path in self.directory.glob("*.safetensors") if _FILE.fullmatch(path.name)]
        if not found:
            raise SfdError(f"no latents_rankRR_shardNNN.safetensors in {self.directory}")
        self.paths = sorted(found, key=_rank_and_shard)
        self._open_files: dict[int, Any] = {}
        self._lock = threading.Lock()
        headers = [_header(path) for path in self.paths]
        self._ends = np.cumsum([header["labels"][1][0] for header in headers])
        self.names = _our_names(headers[0], repa, self.paths[0])
        self.flips = all(f"{theirs}_flip" in headers[0] for theirs in self.names.values())
        self.fields = {}
        for suffix in FLIPS if self.flips else FLIPS[:1]:
            for ours, theirs in self.names.items():
                dtype, shape = headers[0][theirs + suffix]
                self.fields[ours + suffix] = (dtype, _our_shape(ours, shape[1:]))
                for path, header in zip(self.paths, headers):
                    if theirs + suffix not in header or header[theirs + suffix][1][1:] != shape[1:]:
                        raise SfdError(
                            f"{path} does not hold the '{theirs + suffix}' of {self.paths[0].name}, "
                            f"{list(shape[1:])} an image; do the shards belong together?"
                        )

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict:
        """Return the fields of one image as it is, not mirrored, as `LatentStore` does."""
        record = {name: values[0] for name, values in self.read(np.array([index])).items()}
        return {**record, "label": int(record["label"]), "index": int(record["index"])}

    def read(self, indices: np.ndarray, flip: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Return the fields of many images, stacked: arrays (B, ...) in their stored dtypes.

        Args:
          indices: int (B,), each in [0, len(source)).
          flip: bool (B,), True for the mirror image; None mirrors none.

        Raises:
          SfdError: flips are not stored.
        """
        indices = np.asarray(indices, np.int64)
        flip = np.zeros(len(indices), bool) if flip is None else flip
        if indices.size and not (0 <= indices.min() and indices.max() < len(self)):
            raise IndexError(f"index outside the {len(self)} images of {self.directory}")
        if not self.flips:
            refuse_flips(flip, self.directory)
        rows = [self._row(int(index), FLIPS[int(flipped)]) for index, flipped in zip(indices, flip)]
        batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        return {**batch, "label": batch["label"].astype(np.int32), "index": indices}

    @functools.cached_property
    def origin(self) -> dict:
        """Return what `LatentStore.origin` does; released shards do not tell who made them."""
        return {"weights": {}, "image_size": None, "labels": np.unique(self.labels()).tolist()}

    def labels(self) -> np.ndarray:
        """Return the labels of all images, int64 (N,)."""
        parts = [self._file(number).get_tensor("labels") for number in range(len(self.paths))]
        return np.concatenate(parts).astype(np.int64)

    def _row(self, index: int, suffix: str) -> dict[str, np.ndarray]:
        number = int(np.searchsorted(self._ends, index, side="right"))
        row = index - int(self._ends[number - 1]) if number else index
        file = self._file(number)
        values = {"label": file.get_slice("labels")[row : row + 1][0]}
        for ours, theirs in self.names.items():
            values[ours] = _our_layout(ours, file.get_slice(theirs + suffix)[row : row + 1][0])
        return values

    def _file(self, number: int) -> Any:
        with self._lock:
            if number not in self._open_files:
                self._open_files[number] = safe_open(self.paths[number], "np")
            return self._open_files[number]

    def __getstate__(self):  # loader processes open their own files
        return {"directory": self.directory, "repa": self.repa, "statistics": self.statistics}

    def __setstate__(self, state):
        self.__init__(state["directory"], repa=state["repa"])
        self.statistics = state["statistics"]


def published_statistics(texture: dict[str, Any], semantic: dict[str, Any]) -> LatentStatistics:
    """Build statistics from the contents of `latents_stats.pt` and `latents_sv_stats.pt`.

    Args:
      texture, semantic: {"mean", "std"}, each of shape (1,C,1,1).

    Raises:
      SfdError: a part is missing.
    """
    for name, stats in (("texture", texture), ("semantic", semantic)):
        for key in ("mean", "std"):
            if key not in stats:
                raise SfdError(f"the {name} statistics hold no '{key}', only {', '.join(stats)}")
    flat = [np.asarray(stats[key], np.float32).reshape(-1)
            for stats in (texture, semantic) for key in ("mean", "std")]  # fmt: skip
    return LatentStatistics(*flat)


def _rank_and_shard(path: Path) -> tuple[int, ...]:
    return tuple(map(int, _FILE.fullmatch(path.name).groups()))


def _header(path: Path) -> dict[str, tuple[str, list[int]]]:
    try:
        with safe_open(path, "np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            header = {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise SfdError(f"{path} is damaged ({error}); download it again") from error
    if "labels" not in header or "latents" not in header:
        raise SfdError(f"{path} holds no 'latents' and 'labels'; is it a shard of latents?")
    return header


def _our_names(header: dict, repa: bool, path: Path) -> dict[str, str]:
    names = {"texture": "latents"}
    semantic = [name for name in ("latents_sv", "latents_dino") if name in header]
    if not semantic:
        raise SfdError(f"{path} holds no semantic latents (latents_sv or latents_dino)")
    names["semantic"] = semantic[0]
    if repa:
        names["repa_features"] = "feats_dino"
        if "feats_dino" not in header:
            raise SfdError(f"{path} holds no REPA features (feats_dino)")
    return names


def _our_shape(name: str, shape: list[int]) -> tuple[int, ...]:
    channels, height, width = shape
    return (height * width, channels) if "repa" in name else (height, width, channels)


def _our_layout(name: str, value: np.ndarray) -> np.ndarray:
    value = np.moveaxis(value, 0, -1)
    return value.reshape(-1, value.shape[-1]) if "repa" in name else value
