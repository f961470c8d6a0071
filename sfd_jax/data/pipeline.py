"""Batches as a function of (seed, step, rows).

Training reads the source as an endless stream of positions; position p is element `p % N` of epoch
`p // N`, and every epoch has its own shuffling. Global batch number `step` has the positions
`step * G ... (step + 1) * G - 1`; a host reads those rows of it that its devices hold
(`distributed.host_rows`). So the step is the whole state of the loader, and any number of hosts, with
devices in any order, reads the same global batches. Nothing is dropped at the end of an epoch.

A source has `len(source)` and `source[i] -> dict`; flips mirror its `pixels`. One that also has
`read(indices, flip) -> dict of stacked arrays` is read a batch at a time and flips its records itself:
latents cannot be mirrored, so those of the mirror images are stored. Grain does the prefetching.
"""

import dataclasses
import functools
import signal
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from typing import Any

import grain
import numpy as np
from absl import flags as absl_flags

from sfd_jax.errors import SfdError
from sfd_jax.latents import LatentLayout, LatentStatistics, normalised_composite
from sfd_jax.ranges import check

Batch = dict[str, np.ndarray]
Transform = Callable[[Batch], Batch]  # from stacked records, already flipped

_LAST_STEP = 2**62  # the training loop decides the end, not the loader


def make_batches(
    source: Any,
    *,
    seed: int,
    global_batch_size: int,
    rows: np.ndarray | None = None,
    transform: Transform | None = None,
    workers: int = 0,
    flips: bool = False,
    cache: bool = False,
) -> "TrainBatches":
    """Make the training batches of one host.

    Args:
      source: random access to records.
      seed: decides order and flips, together with the epoch.
      global_batch_size: images in a batch over all hosts.
      rows: int (B,) in [0, global_batch_size), the rows of each batch to read; None for all.
      transform: see `latent_transform` and `pixel_transform`; None keeps the records as they are.
      workers: processes that prepare batches ahead; 0 does so in threads of this process.
      flips: flip each image with probability 1/2, once for all its arrays.
      cache: hold all records in memory, for small data sets.

    Returns:
      `batches`: call `batches(start_step)` for an endless iterator, `batches.at(step)` for one batch.

    Raises:
      SfdError: an empty source.
    """
    check(seed=seed, global_batch_size=global_batch_size, workers=workers)
    if len(source) == 0:
        raise SfdError("cannot make batches of an empty source")
    return TrainBatches(
        source=InMemory(source, flips) if cache else source,
        seed=seed,
        global_batch_size=global_batch_size,
        rows=np.arange(global_batch_size) if rows is None else np.asarray(rows),
        transform=transform,
        workers=workers,
        flips=flips,
    )


@dataclasses.dataclass(frozen=True)
class TrainBatches:
    """Batches by number; see `make_batches`."""

    source: Any
    seed: int
    global_batch_size: int
    rows: np.ndarray
    transform: Transform | None
    workers: int
    flips: bool

    def __call__(self, start_step: int = 0) -> Iterator[Batch]:
        """Return the endless iterator over batches `start_step`, `start_step + 1`, ..."""
        return prefetch(self.at, start_step, _LAST_STEP, self.workers)

    def at(self, step: int) -> Batch:
        """Return the wanted rows of global batch `step`; arrays lead with B."""
        epochs, indices = self.order(step * self.global_batch_size + self.rows)
        flip = flip_of(self.seed, epochs, indices) if self.flips else np.zeros(len(self.rows), bool)
        batch = read_records(self.source, indices, flip)
        return self.transform(batch) if self.transform else batch

    def order(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Map positions of the endless stream to (epoch, index in the source), int64 (B,) each."""
        epochs, places = np.divmod(positions, len(self.source))
        indices = np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            indices[here] = epoch_order(self.seed, int(epoch), len(self.source))[places[here]]
        return epochs, indices


@functools.lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """Return the order of one epoch, a permutation of `count` indices, int64.

    RandomState's stream is frozen by numpy's compatibility policy, so a run may continue under another version.
    """
    return np.random.RandomState(epoch_seed(seed, epoch)).permutation(count)


@functools.lru_cache(maxsize=16)
def epoch_seed(seed: int, epoch: int) -> int:
    """Return the 32-bit seed of one epoch; not `seed + epoch`, or seed 0's second epoch would be seed 1's first."""
    return int(np.random.SeedSequence([seed % 2**64, epoch]).generate_state(1)[0])


def flip_of(seed: int, epochs: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Decide by a fair coin, a function of (seed, epoch, index), whether an image is flipped.

    Args:
      seed: the run's.
      epochs: int64 (B,).
      indices: int64 (B,), in the source.

    Returns:
      bool (B,).

    Source: the finalizer of SplitMix64 (Steele, Lea and Flood, 2014) as a counter-based generator.
    """
    keys = [epoch_seed(~seed, int(epoch)) << 32 for epoch in epochs]
    bits = np.array(keys, np.uint64) + indices.astype(np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        bits = (bits ^ (bits >> np.uint64(shift))) * np.uint64(factor)
    return ((bits ^ (bits >> np.uint64(31))) & np.uint64(1)).astype(bool)


def make_eval_batches(
    source: Any,
    *,
    batch_size: int,
    host_index: int = 0,
    host_count: int = 1,
    transform: Transform | None = None,
    workers: int = 0,
    indices: np.ndarray | None = None,
) -> Iterator[Batch]:
    """Iterate once over a source in order: every element exactly once, nothing dropped.

    Args:
      source: random access to records.
      batch_size: images in a batch of this host; the same for every batch, so that a jitted function
        is compiled once.
      host_index, host_count: host h takes every H-th batch. All hosts see equally many batches.
      transform: as in `make_batches`; never flips.
      workers: as in `make_batches`.
      indices: which elements, in which order; None for all.

    Returns:
      Iterator over batches with `mask`, bool (B,): False where an element only fills up the batch.
    """
    check(batch_size=batch_size, workers=workers)
    if len(source) == 0:
        raise SfdError("cannot make batches of an empty source")
    indices = np.arange(len(source)) if indices is None else np.asarray(indices, np.int64)
    reader = _EvalBatches(source, batch_size, host_index, host_count, transform, indices)
    rounds = -(-len(indices) // (batch_size * host_count))
    return prefetch(reader.at, 0, rounds, workers)


@dataclasses.dataclass(frozen=True)
class _EvalBatches:
    source: Any
    batch_size: int
    host_index: int
    host_count: int
    transform: Transform | None
    indices: np.ndarray

    def at(self, step: int) -> Batch:
        first = (step * self.host_count + self.host_index) * self.batch_size
        indices = self.indices[first : first + self.batch_size]
        mask = np.arange(self.batch_size) < len(indices)
        # Fill up with a real element: zeros could be out of range for the transform.
        filler = indices[-1] if len(indices) else self.indices[0]
        indices = np.concatenate([indices, np.full(self.batch_size - len(indices), filler)])
        batch = read_records(self.source, indices, np.zeros(self.batch_size, bool))
        if self.transform:
            batch = self.transform(batch)
        return {**batch, "mask": mask}


def read_records(source: Any, indices: np.ndarray, flip: np.ndarray) -> Batch:
    """Read records and stack them: arrays (B, ...) by name; `label` int32, `index` int64.

    Args:
      source: see the module.
      indices: int (B,).
      flip: bool (B,), True for the mirror image.
    """
    if hasattr(source, "read"):
        return source.read(indices, flip)
    records = [source[int(index)] for index in indices]
    batch = {name: np.stack([record[name] for record in records]) for name in records[0]}
    for name, dtype in (("label", np.int32), ("index", np.int64)):
        if name in batch:
            batch[name] = batch[name].astype(dtype)
    if flip.any():
        batch["pixels"] = mirrored(batch["pixels"], flip)
    return batch


def mirrored(pixels: np.ndarray, flip: np.ndarray) -> np.ndarray:
    """Mirror images (B,H,W,3) left to right where `flip` (B,)."""
    return np.where(flip[:, None, None, None], pixels[:, :, ::-1], pixels)


class InMemory:
    """Hold all records of a source in memory, as stacked arrays; with flips the mirrored ones too."""

    def __init__(self, source: Any, flips: bool):
        every = np.arange(len(source))
        self.orientations = [
            read_records(source, every, np.full(len(source), flip)) for flip in ((False, True) if flips else (False,))
        ]

    def __len__(self) -> int:
        return len(next(iter(self.orientations[0].values())))

    def read(self, indices: np.ndarray, flip: np.ndarray) -> Batch:
        batch = {name: values[indices] for name, values in self.orientations[0].items()}
        if flip.any():
            for name, values in self.orientations[1].items():
                batch[name][flip] = values[indices[flip]]
        return batch


def prefetch(function: Callable[[int], Batch], start: int, stop: int, workers: int) -> Iterator[Batch]:
    """Iterate over `function(start), ..., function(stop - 1)`, computed ahead.

    Args:
      function: must be picklable where there are workers.
      start, stop: as in `range`.
      workers: processes; 0 for two threads in this process.
    """
    dataset = grain.MapDataset.range(start, stop).map(function)
    if workers:
        if not absl_flags.FLAGS.is_parsed():  # Grain reads absl's flags, which our commands do not use
            absl_flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
        one_thread = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
        processes = dataset.to_iter_dataset(one_thread).mp_prefetch(options)
        # A thread copies batches out of the shared memory: Ctrl-C, which interrupts only the main thread, could
        # otherwise stop it before that memory is freed.
        iterator = iter(grain.experimental.ThreadPrefetchIterDataset(processes.map(_copied), prefetch_buffer_size=1))
    else:
        two_threads = grain.ReadOptions(num_threads=2, prefetch_buffer_size=2)  # more would not fit the CPU's cache
        iterator = iter(dataset.to_iter_dataset(two_threads))
    # Ctrl-C reaches the whole process group. The workers, started by the first `next`, inherit the blocked signal
    # (this process ends them); here it is only delayed.
    before = None
    if workers:
        resource_tracker.ensure_running()  # its own start would unblock the signal
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        try:
            first = next(iterator, None)
        finally:
            if before is not None:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if first is not None:
            yield first
            yield from iterator
    finally:  # also when the generator is dropped: ends the processes and frees their shared memory
        iterator.close()


def _copied(batch: Batch) -> Batch:
    return {name: np.array(values) for name, values in batch.items()} if isinstance(batch, dict) else np.array(batch)


def pixel_transform(batch: Batch) -> Batch:
    """Turn image records into a training batch.

    Args:
      batch: `pixels` uint8 (B,H,W,3), `label`, `index`.

    Returns:
      `pixels` float32 (B,H,W,3) in [-1,1], `labels` int32 (B,), `index` int64 (B,).
    """
    pixels = batch["pixels"].astype(np.float32) / np.float32(127.5) - np.float32(1)
    return {"pixels": pixels, "labels": batch["label"], "index": batch["index"]}


def feature_transform(batch: Batch) -> Batch:
    """Turn stored visual features into a batch for the Semantic VAE.

    Args:
      batch: `repa_features` (B,N,F), `label`, `index`.

    Returns:
      `features` float32 (B,N,F), `labels` int32 (B,), `index` int64 (B,).

    Raises:
      SfdError: the records hold no features.
    """
    features = _wanted(batch, "repa_features").astype(np.float32)
    return {"features": features, "labels": batch["label"], "index": batch["index"]}


def latent_transform(layout: LatentLayout, statistics: LatentStatistics, *, repa: bool = False) -> Transform:
    """Make the transform from stored latents to diffusion batches.

    Args:
      layout: of the channels; without semantic channels, those of the records are left out.
      statistics: for the normalisation, of the layout's channels.
      repa: also pass on the stored features.

    Returns:
      A transform to `latents` float32 (B,H,W,C), normalised; `labels` int32 (B,); `index` int64
      (B,); with repa `repa_features` (B,N,F) in their stored dtype; where the records hold
      `pixels` uint8 (B,H,W,3) (see paired.py), these too, still as bytes: a quarter to move.

    Raises:
      SfdError (when called): the records hold no latents or features.
    """
    return functools.partial(_latent_batch, layout=layout, statistics=statistics, repa=repa)


def _latent_batch(batch: Batch, *, layout: LatentLayout, statistics: LatentStatistics, repa: bool) -> Batch:
    latents = normalised_composite(layout, statistics, _wanted(batch, "texture"), _wanted(batch, "semantic"))
    result = {"latents": latents, "labels": batch["label"], "index": batch["index"]}
    if repa:
        result["repa_features"] = _wanted(batch, "repa_features")
    if "pixels" in batch:
        result["pixels"] = batch["pixels"]
    return result


def _wanted(batch: Batch, name: str) -> np.ndarray:
    if name not in batch:
        raise SfdError(f"the data hold no '{name}'; extract it (`sfd extract --help`)")
    return batch[name]
