"""The released latent shards, `latents_rankRR_shardNNN.safetensors`, read as they are.

Their arrays are channels first and have other names; a record comes out as from our own store:

    latents, latents_flip             -> texture, texture_flip            (H,W,C)
    latents_sv(_flip)                 -> semantic(_flip)                  (H,W,C)
    latents_dino(_flip)               -> semantic(_flip), the PCA variant of ReDi
    feats_dino(_flip)                 -> repa_features(_flip)             (N,F), rows then columns
    labels                            -> label

The images are numbered across the files in the order of their names.
"""

import collections
import functools
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from sfd_jax.data.latent_store import FLIPS, LatentSource, LatentStore
from sfd_jax.errors import SfdError
from sfd_jax.latents import LatentStatistics

CHANNELS_FIRST = ("latents", "latents_sv", "latents_dino", "feats_dino")
_FILE = re.compile(r"latents_rank(\d+)_shard(\d+)\.safetensors")


def open_latents(
    directory: str | os.PathLike,
    *,
    repa: bool = False,
    read_statistics: Callable[[Path], tuple[np.ndarray, np.ndarray]] | None = None,
) -> "LatentStore | ReleasedLatents":
    """Open latents to train on: our store, or released shards as they are.

    Args:
      directory: of either.
      repa: also read the stored features. (Our store reads all its fields in any case.)
      read_statistics: reads mean and std (C,) from a released `*_stats.pt`; with None released shards have no
        statistics.

    Returns:
      A random-access source with `statistics` and `class_names`.

    Raises:
      SfdError: neither is there, it is damaged, or its parts do not belong together.
    """
    if next(Path(directory).glob("latents_rank*_shard*.safetensors"), None) is None:
        return LatentStore(directory)
    source = ReleasedLatents(directory, repa=repa)
    if read_statistics is not None:
        source.statistics = released_statistics(source, read_statistics)
    return source


class ReleasedLatents(LatentSource):
    """Random access to a folder of released shards.

    Args:
      directory: the folder.
      repa: also read the stored features, which are twenty times larger than the latents.

    Attributes:
      statistics: None until set; released shards do not contain them.
      class_names: None.
      flips: the mirror images' arrays are stored too.
      fields: name -> (dtype, shape) of an image's arrays, from the headers; the mirror image's end in _flip.
      notes: assumptions made, as sentences.

    Raises:
      SfdError: no shards, a damaged one, one whose arrays are not of the same images, or shards with different arrays.
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
        self.notes = _gaps([_rank_and_shard(path) for path in self.paths])
        others = sorted(path.name for path in self.directory.glob("*.safetensors") if path not in found)
        if others:
            self.notes.append(f"not read, because not named as shards: {', '.join(others[:5])} ({len(others)} in all)")
        headers = [_header(path) for path in self.paths]
        self._ends = np.cumsum([header["labels"][1][0] for header in headers])
        self.names = _our_names(headers[0], repa, self.paths[0])
        self.flips = "latents_flip" in headers[0]
        self.fields = {}
        both = [theirs + suffix for suffix in FLIPS for theirs in self.names.values()]
        for path, header in zip(self.paths, headers, strict=True):
            for name in both:
                if (name in header) != (self.flips or not name.endswith("_flip")):
                    raise SfdError(
                        f"{path} {'holds' if name in header else 'does not hold'} the '{name}', unlike "
                        f"{self.paths[0].name} or its other arrays; do they belong together?"
                    )
        for path, header in zip(self.paths, headers, strict=True):
            for ours, theirs in self.names.items():
                for suffix in FLIPS if self.flips else FLIPS[:1]:
                    dtype, (_, *shape) = header[theirs + suffix]
                    field = (dtype, _our_shape(ours, shape))
                    expected = self.fields.setdefault(ours + suffix, self.fields.get(ours, field))
                    if field != expected:
                        raise SfdError(
                            f"{path}: '{theirs + suffix}' is {field[0]} {field[1]} an image (channels last), but "
                            f"{expected[0]} {expected[1]} elsewhere; do the shards belong together?"
                        )
        texture, semantic = self.fields["texture"][1][:2], self.fields["semantic"][1][:2]
        if texture != semantic:
            raise SfdError(
                f"{self.paths[0]}: the grids of '{self.names['texture']}' {texture} and "
                f"'{self.names['semantic']}' {semantic} differ; do they belong together?"
            )
        for path, labels in zip(self.paths, self._labels(), strict=True):
            if labels.size and not 0 <= labels.min() <= labels.max() < 2**31:
                raise SfdError(f"{path}: labels reach from {labels.min()} to {labels.max()}; expected 0 to 2^31 - 1")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, indices: np.ndarray, flip: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Return the fields of many images, stacked: arrays (B, ...) in their stored dtypes.

        Args:
          indices: int (B,), each in [0, len(source)).
          flip: bool (B,), True for the mirror image; None mirrors none.

        Raises:
          SfdError: flips are not stored.
        """
        indices, flip = self._checked(indices, flip)
        rows = [self._row(int(index), FLIPS[int(flipped)]) for index, flipped in zip(indices, flip, strict=True)]
        batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        return {**batch, "label": batch["label"].astype(np.int32), "index": indices}

    @functools.cached_property
    def origin(self) -> dict:
        """Return the same as `LatentStore.origin`; released shards do not record their encoders."""
        return {"weights": {}, "image_size": None, "tile_grid": None, "labels": np.unique(self.labels()).tolist()}

    def labels(self) -> np.ndarray:
        """Return the labels of all images, int64 (N,)."""
        return np.concatenate(self._labels()).astype(np.int64)

    def label_counts(self) -> dict[int, int]:
        """Return the number of images by label."""
        return dict(collections.Counter(self.labels().tolist()))

    def _labels(self) -> list[np.ndarray]:
        return [self._file(number).get_tensor("labels") for number in range(len(self.paths))]

    def _row(self, index: int, suffix: str) -> dict[str, np.ndarray]:
        number = int(np.searchsorted(self._ends, index, side="right"))
        row = index - int(self._ends[number - 1]) if number else index
        file = self._file(number)
        values = {"label": file.get_slice("labels")[row : row + 1][0]}
        for ours, theirs in self.names.items():
            values[ours] = _our_layout(ours, file.get_slice(theirs + suffix)[row : row + 1][0])
            if not np.isfinite(values[ours]).all():
                raise SfdError(
                    f"{self.paths[number]}: '{theirs + suffix}' of row {row} is not finite; download it again"
                )
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


def released_statistics(
    source: ReleasedLatents, read: Callable[[Path], tuple[np.ndarray, np.ndarray]]
) -> LatentStatistics:
    """Read the `*_stats.pt` beside released shards.

    Args:
      source: the shards.
      read: reads mean and std, float (C,) each, from a file, and refuses values that cannot normalise latents.

    Raises:
      SfdError: a file is missing, damaged, or of another number of channels than the latents.
    """
    parts = []
    for group, theirs in source.names.items():
        if group not in ("texture", "semantic"):
            continue
        path, channels = source.directory / f"{theirs}_stats.pt", source.fields[group][1][-1]
        if not path.exists():
            raise SfdError(f"{source.directory} lacks {path.name}, which belongs to its shards; copy it there")
        mean, std = read(path)
        if not mean.size == std.size == channels:
            raise SfdError(
                f"{path} is of {mean.size} channels, but '{theirs}' of the shards has {channels}: copy the file that "
                "belongs to these shards"
            )
        parts += [mean, std]
    return LatentStatistics(*parts)


def _gaps(numbers: list[tuple[int, ...]]) -> list[str]:
    """Return notes on gaps in the shards' numbers; refuse two shards of one number."""
    if twice := [number for number in numbers if numbers.count(number) > 1]:
        raise SfdError(f"two files are shard {twice[0][1]} of rank {twice[0][0]}; remove the copy")
    ranks = {rank: {shard for other, shard in numbers if other == rank} for rank, _ in numbers}
    lacking = lambda there: [number for number in range(max(there)) if number not in there]
    missing = [f"rank {rank} shard {shard}" for rank, shards in ranks.items() for shard in lacking(shards)]
    missing += [f"rank {rank}" for rank in lacking(ranks)]
    if not missing:
        return []
    return [f"shards are missing: {', '.join(missing[:5])} ({len(missing)} in all)"]


def _rank_and_shard(path: Path) -> tuple[int, ...]:
    return tuple(map(int, _FILE.fullmatch(path.name).groups()))


def _header(path: Path) -> dict[str, tuple[str, list[int]]]:
    try:
        with safe_open(path, "np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            header = {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise SfdError(f"{path} is damaged ({error}); download it again") from error
    if "labels" not in header or "latents" not in header:
        raise SfdError(f"{path} holds no 'latents' and 'labels'; is it a shard of latents?")
    kind, rows = header["labels"]
    if len(rows) != 1 or rows[0] == 0 or kind[0] not in "IU":
        raise SfdError(f"{path}: 'labels' is {kind} {rows}; expected whole numbers, one an image")
    for name in (theirs + suffix for theirs in CHANNELS_FIRST for suffix in FLIPS if theirs + suffix in header):
        kind, shape = header[name]
        if len(shape) != 4 or shape[0] != rows[0] or 0 in shape or kind not in ("F32", "F16", "BF16", "F64"):
            expected = f"floating point (N,C,H,W) with N = {rows[0]}, as 'labels' has"
            raise SfdError(f"{path}: '{name}' is {kind} {shape}; expected {expected}")
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
