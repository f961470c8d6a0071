"""Images to latent shards: read, encode, write, and continue after a kill.

The engine is independent of the networks. The caller passes `encode`, a jitted function of a batch of pixels and their
indices. The engine reads every image exactly once and in order, keeps batches at one size (so that the
function is compiled once and no result depends on the other images of a batch), skips and lists broken
images, and divides the shards among hosts.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sfd_jax.data.checks import check_writable
from sfd_jax.data.images import BrokenImage, BrokenImages, ImageSource, Tolerant
from sfd_jax.data.latent_store import (
    LatentStore,
    LatentStoreWriter,
    Plan,
    latent_fields,
    orientations,
    record_dtype,
)
from sfd_jax.data.pipeline import make_eval_batches
from sfd_jax.data.record_files import CRC_BYTES
from sfd_jax.data.released import ReleasedLatents
from sfd_jax.errors import SfdError, refuse
from sfd_jax.latents import LatentStatistics
from sfd_jax.progress import ProgressBar
from sfd_jax.ranges import check_fields
from sfd_jax.settings import setting, to_dict

# encode(pixels uint8 (B,H,W,3), index int32 (B,)) -> {"texture": (B,H,W,C), "semantic": ..., ...}
Encode = Callable[[jax.Array, jax.Array], dict[str, jax.Array]]
POSTERIORS = ("sample", "mean")


@dataclasses.dataclass(frozen=True)
class ExtractConfig:
    """Configure extraction: the settings that decide the latents (`identity`), and how the work is done."""

    image_size: int = setting(256, "pixels a side; if not given, the size that the texture VAE was trained on")
    tile_size: int = setting(256, "pixels a side that the visual encoder sees at once")
    pca: int | None = setting(None, "principal components instead of a Semantic VAE", metavar="CHANNELS")
    pca_images: int = setting(50_000, "images to fit them on")
    weights: str = setting("ema", "which weights of checkpoints that hold both", choices=("ema", "raw"))
    texture_posterior: str = setting("sample", "texture latents", choices=POSTERIORS)
    semantic_posterior: str = setting("sample", "semantic latents", choices=POSTERIORS)
    flips: bool = setting(True, "mirrored images too")
    repa: bool = setting(False, "store the visual features as well (large: see docs/repa.md)")
    seed: int = setting(0, "seed of the posterior samples")
    dtype: str = setting("bfloat16", "dtype of the stored latents", choices=("bfloat16", "float32"))
    batch_size: int = setting(64, "images a host encodes at once")
    shard_size: int = setting(4096, "images a shard")
    workers: int = setting(0, "processes that read images (0: threads)")
    max_broken: int = setting(0, "broken images to skip before stopping, over all hosts")

    def __post_init__(self):
        check_fields("extract", self)

    def identity(self) -> dict[str, Any]:
        """Return the settings that decide the latents, for the manifest, under the names of the first version."""
        how = ("pca_images", "dtype", "batch_size", "shard_size", "workers", "max_broken")
        return {name: value for name, value in to_dict(self).items() if name not in how} | {"pca": self.pca or 0}


@dataclasses.dataclass(frozen=True)
class Share:
    """Choose the shards that this host writes, in a job of several hosts.

    Attributes:
      index, count: it writes every `count`-th shard from `index`.
      barrier: waits for the other hosts; needed where there are several.
      progress: show a progress bar; None shows it on a terminal.
    """

    index: int = 0
    count: int = 1
    barrier: Callable[[str], None] | None = None
    progress: bool | None = None


def extract(
    source: ImageSource,
    encode: Encode,
    out_dir: str | os.PathLike,
    config: ExtractConfig,
    *,
    about: Mapping[str, Any],
    weights: dict[str, str],
    sharding: jax.sharding.Sharding | None = None,
    share: Share = Share(),
) -> LatentStore:
    """Encode every image of a source into a latent store, or continue an unfinished one.

    Args:
      source: random access to {"pixels" uint8 (H,W,3), "label", "index"}.
      encode: a traceable function of `pixels` uint8 (B,H,W,3) and `index` int32 (B,) that returns
        `texture` and `semantic` (B,H,W,C), and optionally their `_flip` and `repa_features` (B,N,F)
        with its `_flip`. Whatever is random in it must be a function of the index.
      out_dir: folder of the store.
      config: how the work is done, and what `encode` was made from.
      about: JSON-able description of the source; kept in the manifest beside `config.identity()`, and
        compared with it when an unfinished store is continued.
      weights: network -> hash of its weights; kept and compared in the same way.
      sharding: of a batch over this host's devices; None for the default device.
      share: this host's part of the work.

    Returns:
      The finished store.

    Raises:
      SfdError: the folder belongs to another run, cannot be written or lacks space; too many
        broken images; latents that are not finite.
    """
    plan = extract_plan(source, encode, config, about, weights)
    images = lambda indices: _encoded(source, encode, indices, config.batch_size, sharding, config.workers)
    return _fill(out_dir, plan, images, share, BrokenImages(config.max_broken))


def extract_plan(
    source: ImageSource, encode: Encode, config: ExtractConfig, about: Mapping[str, Any], weights: dict[str, str]
) -> Plan:
    """Return the plan of the store that `extract` would write; nothing is encoded."""
    if len(source) == 0:
        raise SfdError("there are no images to extract")
    size = source.image_size
    shapes = jax.eval_shape(
        encode,
        jax.ShapeDtypeStruct((config.batch_size, size, size, 3), np.uint8),
        jax.ShapeDtypeStruct((config.batch_size,), np.int32),
    )
    repa = shapes.get("repa_features")
    fields = latent_fields(
        shapes["texture"].shape[1:],
        shapes["semantic"].shape[1:],
        dtype=config.dtype,
        flips="texture_flip" in shapes,
        repa_shape=None if repa is None else repa.shape[1:],
        repa_dtype="float32" if repa is not None and repa.dtype == np.float32 else "float16",
    )
    names = getattr(source, "class_names", None)
    return Plan(len(source), config.shard_size, fields, {**config.identity(), **about}, weights, names)


def repack(
    source: ReleasedLatents,
    out_dir: str | os.PathLike,
    config: ExtractConfig = ExtractConfig(),
    *,
    statistics: LatentStatistics | None = None,
    share: Share = Share(),
) -> LatentStore:
    """Turn released shards into a latent store, or continue an unfinished one.

    Args:
      source: the released shards; with `repa` their features are stored too.
      out_dir: folder of the store.
      config: only `dtype`, `shard_size` and `workers` are used.
      statistics: the released ones, which go with the released weights; None measures them.
      share: this host's part of the work.

    Returns:
      The finished store.

    Raises:
      SfdError: as for `extract`, or a released shard is damaged.
    """
    plan = repack_plan(source, config, statistics)
    images = lambda indices: _records(source, indices, config.workers)
    return _fill(out_dir, plan, images, share, BrokenImages(0), statistics)


def repack_plan(source: ReleasedLatents, config: ExtractConfig, statistics: LatentStatistics | None) -> Plan:
    """Return the plan of the store that `repack` would write."""
    shapes = {name: shape for name, (_, shape) in source.fields.items()}
    fields = latent_fields(
        shapes["texture"],
        shapes["semantic"],
        dtype=config.dtype,
        flips=source.flips,
        repa_shape=shapes.get("repa_features"),
    )
    about = {
        "repacked_from": source.directory.name,
        "statistics": statistics.hash() if statistics else "measured",
    }
    return Plan(len(source), config.shard_size, fields, about, {}, None)


def _fill(
    out_dir: str | os.PathLike,
    plan: Plan,
    images: Callable[[np.ndarray], Iterator[tuple[int, dict | BrokenImage]]],
    share: Share,
    broken: BrokenImages,
    statistics: LatentStatistics | None = None,
) -> LatentStore:
    """Write this host's missing shards from `images(indices)`, and the manifest when all are written."""
    writer = LatentStoreWriter(out_dir, plan)
    shards = [s for s in range(plan.num_shards) if s % share.count == share.index]
    pending = [s for s in shards if not writer.is_done(s)]
    counted: set[int] = set()
    count_broken(writer, broken, counted)
    if pending:
        (Path(out_dir) / "manifest.json").unlink(missing_ok=True)
        refuse(check_writable(out_dir, sum(len(plan.span(s)) for s in pending) * bytes_per_image(plan)))
        bar = ProgressBar(
            desc=f"write {Path(out_dir).name}",
            total=sum(len(plan.span(s)) for s in shards),
            initial=sum(len(plan.span(s)) for s in shards if s not in pending),
            unit="image",
            before="reading and compiling",
            disable=None if share.progress is None else not share.progress,
        )
        with bar:
            stream = images(np.concatenate([np.asarray(plan.span(s)) for s in pending]))
            for shard in pending:
                _write_shard(writer, shard, stream, broken, bar)
                count_broken(writer, broken, counted)  # the other hosts' too, so that all stop early
    wait = share.barrier or (lambda name: None)
    wait("latents: all shards written")
    count_broken(writer, broken, counted)  # all of them, so that every host decides the same
    if share.index == 0 and (pending or not (Path(out_dir) / "manifest.json").exists()):
        writer.finish(statistics)
    wait("latents: manifest written")
    return LatentStore(out_dir)


def count_broken(writer: LatentStoreWriter, broken: BrokenImages, counted: set[int]) -> None:
    """Add the broken images of all hosts' finished shards that are not among the `counted` ones.

    Raises:
      SfdError: there are more than the job tolerates.
    """
    for shard in set(range(writer.plan.num_shards)) - counted:
        if writer.is_done(shard):
            counted.add(shard)
            for fault in writer.facts(shard)["skipped"]:
                broken.add(BrokenImage(fault["name"], fault["reason"]))


def bytes_per_image(plan: Plan) -> int:
    """Return how many bytes an image takes on disk."""
    return (record_dtype(plan.fields).itemsize + CRC_BYTES) * orientations(plan.fields)


def _records(source: ReleasedLatents, indices: np.ndarray, workers: int) -> Iterator[tuple[int, dict]]:
    both = _BothOrientations(source) if source.flips else source
    for batch in make_eval_batches(both, batch_size=64, indices=indices, workers=workers):
        mask = batch.pop("mask")
        for row in np.flatnonzero(mask):
            yield int(batch["index"][row]), {name: values[row] for name, values in batch.items()}


class _BothOrientations:
    """Read latents together with those of the mirror images, under the field names of a store."""

    def __init__(self, source: ReleasedLatents):
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def read(self, indices: np.ndarray, flip: np.ndarray) -> dict[str, np.ndarray]:
        batch = self.source.read(indices, flip)
        mirror = self.source.read(indices, ~flip)
        return batch | {f"{name}_flip": mirror[name] for name in self.source.names}


def _encoded(
    source: Any,
    encode: Encode,
    indices: np.ndarray,
    batch_size: int,
    sharding: jax.sharding.Sharding | None,
    workers: int,
) -> Iterator[tuple[int, dict | BrokenImage]]:
    """Yield (index, fields or BrokenImage) for each index, in order."""
    batches = make_eval_batches(Tolerant(source), batch_size=batch_size, indices=indices, workers=workers)
    waiting = None
    for batch in batches:
        pixels, index = batch["pixels"], batch["index"].astype(np.int32)
        if sharding is not None:
            pixels, index = jax.device_put((pixels, index), sharding)
        latents = encode(pixels, index)
        # The devices encode this batch while the previous one is written.
        if waiting is not None:
            yield from _unpack(*waiting)
        waiting = (batch, latents)
    if waiting is not None:
        yield from _unpack(*waiting)


def _unpack(batch: dict, latents: dict) -> Iterator[tuple[int, dict | BrokenImage]]:
    latents = jax.device_get(latents)
    for row in np.flatnonzero(batch["mask"]):
        index = int(batch["index"][row])
        if batch["broken"][row]:
            yield index, BrokenImage(str(batch["name"][row]), str(batch["broken"][row]))
        else:
            fields = {name: values[row] for name, values in latents.items()}
            yield index, {**fields, "label": batch["label"][row], "index": index}


def _write_shard(writer: LatentStoreWriter, shard: int, images, broken: BrokenImages, bar) -> None:
    with writer.open_shard(shard) as out:
        for index in writer.plan.span(shard):
            found, fields = next(images)
            if found != index:
                raise AssertionError(f"image {found} came where {index} was expected")
            if isinstance(fields, BrokenImage):
                broken.add(fields)
                out.skip(index, fields.name, fields.reason)
            else:
                out.add(fields)
            bar.update()
