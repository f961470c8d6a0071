"""Latents on disk: shards of plain records with random access, and a manifest that describes them.

    manifest.json            written last; a store without it is not finished
    plan.json                what the folder will hold, written first
    latents-00003.bin        the images of `Plan.span(3)`, in order
    latents-00003.json       count, checksum and moments of that shard, skipped images

A shard is its records, one after another. A record is one image, or its mirror image: the raw little-endian
bytes of its fields, without any header, in the order and with the dtypes and shapes that the manifest lists,
and then the CRC-32C of these bytes. So one system call reads a record into a row of a batch. Fields: `texture`
(H,W,C), `semantic` (H,W,C), where extracted `repa_features` (N,F), `label` int32 and `index` int64 (its number in
the image source). Where the manifest lists `texture_flip` and so on, each image is followed by its mirror image,
a record with the same names: the loader draws one of the two and does not read the other. All latents are raw,
that is not normalised.

A shard gets its final name only when it is complete and on the disk. The CRC of a record is checked on every
read. Stores of format 2, whose shards are ArrayRecord files (latents-00003.ar), are read too.
"""

import dataclasses
import json
import os
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from sfd_jax.data.moments import Moments
from sfd_jax.data.record_files import ArrayRecordFile, RecordFile, write_record
from sfd_jax.errors import SfdError
from sfd_jax.files import PART, differences, file_sha256, sync, write_json
from sfd_jax.latents import LatentStatistics

FORMAT, OLD_FORMAT = "sfd_jax latents 3", "sfd_jax latents 2"  # the old one until 2026-11-28
FLIPS = ("", "_flip")  # suffixes of the fields of an image and of its mirror image
PER_IMAGE = ("label", "index")  # the same for both
DTYPES = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "int32": np.dtype("<i4"),
    "int64": np.dtype("<i8"),
}


class LatentSource:
    """Base class of latent sources: access to one image, and the checks of `read`'s arguments.

    Attributes:
      directory: its folder.
      flips: the mirror images are stored too.
    """

    directory: Path
    flips: bool

    def __getitem__(self, index: int) -> dict:
        """Return the fields of one image, not mirrored; `label` and `index` as ints."""
        fields = {name: values[0] for name, values in self.read(np.array([index])).items()}
        return {**fields, "label": int(fields["label"]), "index": int(fields["index"])}

    def _checked(self, indices: np.ndarray, flip: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Return the checked arguments of `read`; refuse indices out of range, and flips that are not stored."""
        indices = np.asarray(indices, np.int64)
        flip = np.zeros(len(indices), bool) if flip is None else flip
        if indices.size and not (indices.min() >= 0 and indices.max() < len(self)):
            raise IndexError(f"index outside the {len(self)} images of {self.directory}")
        if flip.any() and not self.flips:  # they cannot be made from latents
            raise SfdError(
                f"flips are asked for, but {self.directory} holds no 'texture_flip'; "
                "extract with flips, or train with --config.data.flips=False"
            )
        return indices, flip


class LatentStore(LatentSource):
    """Read a finished store.

    Args:
      directory: where the manifest and the shards are.

    Attributes:
      manifest: count, label_counts, fields, shards, statistics, class_names, config, weights, skipped.
      statistics: of the two groups.
      class_names: list of names, or None.

    Raises:
      SfdError: no manifest, or it has another format or contradicts itself; a shard is missing or has another length.
    """

    def __init__(self, directory: str | os.PathLike):
        self.directory = Path(directory)
        self.manifest = _read_manifest(self.directory)
        try:
            self._read_parts()
        except (AttributeError, KeyError, TypeError, ValueError, SfdError) as error:
            raise SfdError(
                f"{self.directory / 'manifest.json'} is damaged ({error}); delete it and run the command that made it "
                "once more"
            ) from error
        self._ends = np.cumsum([shard["count"] for shard in self.shards])
        self._files: dict[int, RecordFile | ArrayRecordFile] = {}
        self._lock = threading.Lock()
        for shard in self.shards:
            path = self.directory / shard["name"]
            size = path.stat().st_size if path.exists() else None
            if size != shard["bytes"]:
                found = "is missing" if size is None else f"has {size} bytes, not {shard['bytes']}"
                raise self._damaged(shard, found)

    def _read_parts(self) -> None:
        """Read the manifest's entries, and compare them with each other."""
        manifest = self.manifest
        if manifest["shard_size"] < 1:
            raise ValueError(f"shard_size {manifest['shard_size']}")
        self.record_dtype = record_dtype(manifest["fields"])
        if lacking := {"texture", "semantic", *PER_IMAGE} - set(self.record_dtype.names):
            raise ValueError(f"its fields lack {', '.join(sorted(lacking))}")
        self.orientations = orientations(manifest["fields"])
        self.flips = self.orientations == 2
        self.statistics = LatentStatistics.from_dict(manifest["statistics"])
        self.class_names = manifest["class_names"]
        self.shards = [
            {key: shard[key] for key in ("name", "count", "bytes", "sha256")} for shard in manifest["shards"]
        ]
        counts = {sum(shard["count"] for shard in self.shards), sum(self.label_counts().values()), manifest["count"]}
        if len(counts) > 1 or min(counts) <= 0:
            raise ValueError("the counts of its shards, its labels and its images differ, or are 0")
        for group in ("texture", "semantic"):
            channels = self.record_dtype[group].shape[-1]
            if getattr(self.statistics, f"{group}_mean").size != channels:
                raise ValueError(f"its {group} statistics are not of {channels} channels")
        # The plan keeps the hash of released statistics if any were given; otherwise they were measured.
        given = manifest["config"].get("statistics", "measured")
        whole = manifest["statistics"] == manifest.get("measured_statistics", manifest["statistics"])
        if not (whole if given == "measured" else self.statistics.hash() == given):
            raise ValueError("its statistics are not those that it was written with")
        texture, semantic = self.record_dtype["texture"].shape, self.record_dtype["semantic"].shape
        if semantic[-1] and texture[:-1] != semantic[:-1]:
            raise ValueError(f"the grids of its texture {texture} and semantic {semantic} latents differ")

    def __len__(self) -> int:
        return self.manifest["count"]

    @property
    def origin(self) -> dict:
        """Return what a checkpoint records of its latents: hashes of the encoders, sizes, and labels.

        `tile_grid` is the side in latent pixels of the tiles that the visual encoder saw; None if unknown.
        """
        config, grid = self.manifest["config"] or {}, self.record_dtype["texture"].shape[0]
        size, tile = config.get("image_size"), config.get("tile_size")
        return {
            "weights": self.manifest.get("weights") or {},
            "image_size": size,
            "tile_grid": grid * min(tile, size) // size if tile and size else None,
            "labels": sorted(map(int, self.manifest["label_counts"])),
        }

    def read(self, indices: np.ndarray, flip: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Return the fields of many images, stacked: arrays (B, ...) in their stored dtypes.

        Args:
          indices: int (B,), each in [0, len(store)).
          flip: bool (B,), True for the mirror image; None mirrors none.

        Raises:
          SfdError: a record is damaged (the message names its shard), or flips are not stored.
        """
        indices, flip = self._checked(indices, flip)
        shards = np.searchsorted(self._ends, indices, side="right")
        starts = self._ends[shards] - [self.shards[shard]["count"] for shard in shards]
        numbers = (indices - starts) * self.orientations + flip
        layout = self.record_dtype
        batch = {name: np.empty((len(indices), *layout[name].shape), layout[name].base) for name in layout.names}
        # The bytes of each field's rows, into which a record is read.
        fields = [values.reshape(len(indices), -1).view(np.uint8) for values in batch.values() if values.size]
        files = {shard: self._file(shard) for shard in set(shards.tolist())}

        def read_rows(rows: Iterable[int], wait: bool) -> list[int]:
            """Read the records of rows; return the rows that would have to wait for the disk."""
            late = []
            for row in rows:
                try:
                    if not files[shards[row]].read(int(numbers[row]), [field[row] for field in fields], wait):
                        late.append(row)
                except (RuntimeError, ValueError, OSError, IndexError) as error:
                    raise self._damaged(self.shards[shards[row]], f"cannot be read ({error})") from error
            return late

        # A disk or a network serves the requests of a whole batch at once.
        read_rows(read_rows(range(len(indices)), wait=False), wait=True)
        foreign = batch["index"] // self.manifest["shard_size"] != shards
        if foreign.any():
            raise self._damaged(self.shards[int(shards[foreign][0])], "holds the images of another shard")
        return batch

    def label_counts(self) -> dict[int, int]:
        """Return the number of images by label."""
        return {int(label): count for label, count in self.manifest["label_counts"].items()}

    def verify(self, shards: list[int] | None = None) -> None:
        """Read whole shards, by number or all; raise SfdError that names the first one that fails its checksum."""
        for number in range(len(self.shards)) if shards is None else shards:
            shard = self.shards[number]
            if file_sha256(self.directory / shard["name"]) != shard["sha256"]:
                raise self._damaged(shard, "does not match its checksum")

    def _file(self, number: int) -> RecordFile | ArrayRecordFile:
        shard = self.shards[number]
        with self._lock:
            if number not in self._files:
                path, record_bytes = self.directory / shard["name"], self.record_dtype.itemsize
                try:
                    old = self.manifest["format"] == OLD_FORMAT
                    file = ArrayRecordFile(path) if old else RecordFile(path, record_bytes)
                    if len(file) != (expected := shard["count"] * self.orientations):
                        raise ValueError(f"it holds {len(file)} records, not {expected}")
                except (RuntimeError, ValueError, OSError) as error:
                    raise self._damaged(shard, f"cannot be read ({error})") from error
                self._files[number] = file
            return self._files[number]

    def _damaged(self, shard: dict, what: str) -> SfdError:
        return SfdError(
            f"shard {self.directory / shard['name']} {what}; delete it and run the command that made "
            "it again (only this shard is redone), or copy it again from an intact store"
        )

    def __getstate__(self):  # loader processes open their own files
        return {"directory": self.directory}

    def __setstate__(self, state):
        self.__init__(state["directory"])


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a store will hold: two runs may write to one folder only if their plans are equal.

    Attributes:
      total: images in the source, broken ones included.
      shard_size: images a shard.
      fields: name -> {"dtype", "shape"} of one image, in order; those of its mirror image end in _flip.
      config: JSON-able description of the source and of how its images were encoded.
      weights: network -> hash of its weights.
      class_names: names by label, or None.
    """

    total: int
    shard_size: int
    fields: dict[str, dict]
    config: dict
    weights: dict[str, str]
    class_names: list[str] | None

    @property
    def num_shards(self) -> int:
        return -(-self.total // self.shard_size)

    def span(self, shard: int) -> range:
        """Return the source indices that a shard covers."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.total))

    def to_dict(self) -> dict:
        return json.loads(json.dumps({"format": FORMAT, **dataclasses.asdict(self)}))


class LatentStoreWriter:
    """Write a store shard by shard; an interrupted store can be continued.

    Several processes may write to one folder if each opens different shards.

    Args:
      directory: made if it does not exist.
      plan: what it will hold.

    Raises:
      SfdError: the folder holds something else, or cannot be written.
    """

    def __init__(self, directory: str | os.PathLike, plan: Plan):
        self.directory = Path(directory)
        self.plan = plan
        with _writing(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / "plan.json"
        if path.exists():
            _refuse_other_plan(path, plan.to_dict())
        elif any(self.directory.glob("latents-*")) or (self.directory / "manifest.json").exists():
            raise SfdError(f"{self.directory} holds shards without a plan.json; use another folder")
        else:
            with _writing(path):  # every host writes it
                write_json(path, plan.to_dict(), shared=True)

    def is_done(self, shard: int) -> bool:
        """Tell whether a shard is complete."""
        data, _ = self._paths(shard)
        try:
            facts = self.facts(shard)
            whole = {"name", "count", "bytes", "sha256", "moments", "label_counts", "skipped"} <= facts.keys()
            return whole and data.stat().st_size == facts["bytes"]
        except (OSError, ValueError, AttributeError):  # missing, or facts that are damaged: it is redone
            return False

    def facts(self, shard: int) -> dict:
        """Return the record of a complete shard: count, bytes, sha256, moments, skipped images."""
        return json.loads(self._paths(shard)[1].read_text())

    @contextmanager
    def open_shard(self, shard: int) -> Iterator["ShardWriter"]:
        """Open a shard for writing; it gets its final name when the block ends without an exception."""
        data, facts = self._paths(shard)
        partial = data.with_name(f"{data.name}{PART}")
        writer = ShardWriter(partial, self.plan.fields)
        try:
            yield writer
            # Facts first, so that a shard with its final name has facts.
            known = writer.finish(data.name)
            with _writing(data):
                write_json(facts, known)
                os.replace(partial, data)
                sync(self.directory)
        except BaseException:
            writer.discard()
            raise

    def finish(self, statistics: LatentStatistics | None = None) -> None:
        """Write the manifest from the facts of all shards.

        Args:
          statistics: recorded instead of the measured ones; for latents that go with weights which
            were trained with these.

        Raises:
          SfdError: a shard is missing, or no shard holds an image.
        """
        numbers = range(self.plan.num_shards)
        missing = [number for number in numbers if not self.is_done(number)]
        if missing:
            raise SfdError(
                f"{self.directory} lacks {len(missing)} of {len(numbers)} shards (the first is "
                f"{self._paths(missing[0])[0].name}); run the same command again"
            )
        facts = [self.facts(number) for number in numbers]
        if not any(shard["count"] for shard in facts):
            raise SfdError(f"no image of {self.plan.total} could be read; {self.directory} is empty")
        measured = _statistics([shard["moments"] for shard in facts])
        manifest = {
            **self.plan.to_dict(),
            "count": sum(shard["count"] for shard in facts),
            "label_counts": dict(sorted(_label_counts(facts).items())),
            "skipped": [skipped for shard in facts for skipped in shard["skipped"]],
            "statistics": (statistics or measured).to_dict(),
            # Over all positions of all stored images; flipped ones are not counted, as in the released code.
            "measured_statistics": measured.to_dict(),
            "shards": [{key: shard[key] for key in ("name", "count", "bytes", "sha256")} for shard in facts],
        }
        with _writing(self.directory / "manifest.json"):
            write_json(self.directory / "manifest.json", manifest)
        for leftover in self.directory.glob(f"*{PART}"):  # of processes that were killed
            leftover.unlink()

    def _paths(self, shard: int) -> tuple[Path, Path]:
        stem = self.directory / f"latents-{shard:05d}"
        return stem.with_suffix(".bin"), stem.with_suffix(".json")


class ShardWriter:
    """Write one shard under a temporary name; see `LatentStoreWriter.open_shard`."""

    def __init__(self, path: Path, fields: dict[str, dict]):
        self.path = path
        self.dtype = record_dtype(fields)
        self.orientations = orientations(fields)
        self.count = 0
        self.skipped: list[dict] = []
        self.label_counts: Counter[int] = Counter()
        self.moments: dict[str, list[Moments]] = {"texture": [], "semantic": []}
        with _writing(path):
            path.unlink(missing_ok=True)
            self._file = open(path, "wb")  # noqa: SIM115  # closed by finish or discard

    def add(self, fields: dict[str, Any]) -> None:
        """Append one image: an array or number for every field of the plan, those of the mirror image included.

        Raises:
          SfdError: a field is missing, or has a shape or a value that cannot be stored.
        """
        records = [self._record(fields, flip) for flip in FLIPS[: self.orientations]]
        with _writing(self.path):
            for record in records:
                write_record(self._file, record.tobytes())
        self.count += 1
        self.label_counts[int(records[0]["label"])] += 1
        for group, moments in self.moments.items():
            moments.append(Moments.of(records[0][group]))

    def _record(self, fields: dict[str, Any], flip: str) -> np.ndarray:
        record = np.zeros((), self.dtype)
        for name in self.dtype.names:
            given = name if name in PER_IMAGE else name + flip
            if given not in fields:
                raise SfdError(f"image {fields.get('index')} lacks the field '{given}'")
            value = np.asarray(fields[given])
            if value.shape != self.dtype[name].shape:
                raise SfdError(
                    f"field '{given}' of image {fields.get('index')} has shape {value.shape}, "
                    f"not {self.dtype[name].shape}"
                )
            if name in PER_IMAGE and not (value.dtype.kind in "iu" and 0 <= value <= np.iinfo(self.dtype[name]).max):
                raise SfdError(f"image {fields.get('index')} has the {name} {value}; expected a whole number from 0")
            record[name] = value
            # Checked after rounding to the stored dtype, which may overflow.
            if value.dtype.kind not in "iu" and not np.isfinite(record[name].astype(np.float32)).all():
                raise SfdError(
                    f"field '{given}' of image {fields.get('index')} is not finite; are the weights "
                    "and the precision right?"
                )
        return record

    def skip(self, index: int, name: str, reason: str) -> None:
        """Note an image of this shard that could not be read."""
        self.skipped.append({"index": index, "name": name, "reason": reason})

    def finish(self, name: str) -> dict:
        """Put the shard on the disk and return its facts."""
        with _writing(self.path):
            self._file.close()
            sync(self.path)
        return {
            "name": name,
            "count": self.count,
            "bytes": self.path.stat().st_size,
            "sha256": file_sha256(self.path),
            "moments": {
                group: Moments.merge(moments, like=self.dtype[group].shape[-1]).to_dict()
                for group, moments in self.moments.items()
            },
            "label_counts": dict(sorted(self.label_counts.items())),
            "skipped": self.skipped,
        }

    def discard(self) -> None:
        """Throw away what was written."""
        with suppress(OSError):  # the write had failed already
            self._file.close()
        self.path.unlink(missing_ok=True)


def _label_counts(facts: list[dict]) -> Counter[int]:
    return sum((Counter({int(k): n for k, n in shard["label_counts"].items()}) for shard in facts), Counter())


def _statistics(moments: list[dict]) -> LatentStatistics:
    groups = [
        Moments.merge([Moments.from_dict(shard[group]) for shard in moments]) for group in ("texture", "semantic")
    ]
    return LatentStatistics(*(part.astype(np.float32) for group in groups for part in (group.mean, group.std)))


def latent_fields(
    texture_shape: tuple[int, ...],
    semantic_shape: tuple[int, ...],
    *,
    dtype: str,
    flips: bool,
    repa_shape: tuple[int, int] | None = None,
    repa_dtype: str = "float16",
) -> dict[str, dict]:
    """List the fields of an image.

    Args:
      texture_shape, semantic_shape: (H,W,C); C of semantic may be 0.
      dtype: "bfloat16" or "float32", of the latents.
      flips: also store the latents of the mirrored image.
      repa_shape: (N,F) of the REPA features, None for none.
      repa_dtype: dtype of those; float16 as released.

    Returns:
      name -> {"dtype", "shape"}, as in `Plan.fields`.
    """
    groups = {"texture": (dtype, texture_shape), "semantic": (dtype, semantic_shape)}
    if repa_shape is not None:
        groups["repa_features"] = (repa_dtype, repa_shape)
    fields = {}
    for name, (kind, shape) in groups.items():
        for suffix in FLIPS if flips else FLIPS[:1]:
            fields[name + suffix] = {"dtype": kind, "shape": [int(size) for size in shape]}
    fields["label"] = {"dtype": "int32", "shape": []}
    fields["index"] = {"dtype": "int64", "shape": []}
    return fields


def record_dtype(fields: dict[str, dict]) -> np.dtype:
    """Return the numpy dtype of one record, an image or its mirror image, from the fields of a plan."""
    unknown = [field["dtype"] for field in fields.values() if field["dtype"] not in DTYPES]
    if unknown:
        raise SfdError(f"unknown dtype '{unknown[0]}' of a stored field; known: {', '.join(DTYPES)}")
    upright = {name: field for name, field in fields.items() if not name.endswith("_flip")}
    return np.dtype([(n, DTYPES[f["dtype"]], tuple(f["shape"])) for n, f in upright.items()])


def orientations(fields: dict[str, dict]) -> int:
    """Return the number of records of an image: 2 with its mirror image, else 1."""
    return 2 if any(name.endswith("_flip") for name in fields) else 1


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SfdError(f"cannot write {path}: {error}; is the disk full or read-only?") from error


def _read_manifest(directory: Path) -> dict:
    path = directory / "manifest.json"
    if not path.exists():
        if (directory / "plan.json").exists():
            raise SfdError(f"the latents in {directory} are not finished; run the command that makes them again")
        raise SfdError(f"no latents in {directory} (no manifest.json); make them with `sfd extract`")
    try:
        manifest = json.loads(path.read_text())
        kind = manifest["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise SfdError(f"{path} is damaged ({error}); run `sfd extract` again to rewrite it") from error
    if kind not in (FORMAT, OLD_FORMAT):
        raise SfdError(f"{path} is of format '{kind}'; this version reads '{FORMAT}': make the latents again")
    wanted = ("count", "label_counts", "fields", "shards", "statistics", "class_names", "config", "skipped")
    if lacking := [key for key in wanted if key not in manifest]:
        raise SfdError(f"{path} lacks {', '.join(lacking)}; run `sfd extract` again to rewrite it")
    return manifest


def _refuse_other_plan(path: Path, plan: dict) -> None:
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise SfdError(f"{path} is damaged ({error}); use another folder") from error
    if differing := list(differences(found, plan).values()):
        raise SfdError(
            f"{path.parent} belongs to another run: {'; '.join(differing[:5])}. "
            "Use another folder, or the settings of that run"
        )
