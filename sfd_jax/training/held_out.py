"""Metrics on held-out data during a run: every row counts once, padding does not count."""

import hashlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sfd_jax.data.image_files import ImageFolder
from sfd_jax.data.images import BrokenImage
from sfd_jax.distributed import put_batch
from sfd_jax.errors import SfdError
from sfd_jax.training.state import TrainState
from sfd_jax.training.step import add_metrics, mean_metrics

# (params, batch, *frozen) -> name to (B,): one number for each row, without randomness.
Measure = Callable[..., dict[str, jax.Array]]


def check_held_out(source: Any, held_out: Any, *, compared: int = 16, searched: int = 2000) -> None:
    """Raise SfdError where held-out rows are training rows, so that metrics would not be held-out ones.

    Image files of one folder are compared by their names. A few rows are compared by their content: in a small set
    with all training rows, in a large one with the row of the same number if both sets have the same size.

    Args:
      source, held_out: random access to records.
      compared: held-out rows to compare, spread evenly.
      searched: largest number of training rows of which all are searched.
    """
    chosen = np.unique(np.linspace(0, len(held_out) - 1, min(compared, len(held_out))).astype(int)).tolist()
    if len(source) <= searched:
        training = {_content(source, index) for index in range(len(source))}
        shared = sum(_content(held_out, index) in training for index in chosen)
    else:
        same = len(source) == len(held_out)
        shared = sum(same and _content(source, index) == _content(held_out, index) for index in chosen)
    datasets = [getattr(each, "dataset", None) for each in (source, held_out)]
    same_files = (
        all(isinstance(dataset, ImageFolder) for dataset in datasets)
        and len({os.path.realpath(dataset.root) for dataset in datasets}) == 1
        and np.intersect1d(*(dataset.paths for dataset in datasets)).size
    )
    # A single match may be a duplicate within the data set.
    if same_files or shared >= min(2, len(chosen)):
        raise SfdError(
            "the held-out data are training data, so held_out_ metrics would be training metrics. Give another "
            "data.held_out_split or data.held_out_path, or none"
        )


def _content(source: Any, index: int) -> bytes:
    try:
        record = source[index]
    except BrokenImage as broken:
        return str(broken).encode()
    name = next(name for name in ("pixels", "repa_features", "texture") if name in record)
    return hashlib.sha256(np.ascontiguousarray(record[name]).tobytes()).digest()


def held_out_metrics(
    measure: Measure, batches: Callable[[], Iterator[dict[str, np.ndarray]]], mesh: Mesh, frozen: tuple = ()
) -> Callable[[TrainState, int], dict[str, float]]:
    """Make the `evaluate` argument of `fit`: means of a measure of the averaged parameters.

    Args:
      measure: computes one number for each row.
      batches: makes the iterator over this host's batches, as `data.pipeline.make_eval_batches` does: all of one
        size, with `mask` (B,) False where a row only fills up its batch.
      mesh: the run's mesh; its size divides the batch size times the number of hosts.
      frozen: from `put_frozen`; passed to the measure.

    Returns:
      (state, step) -> {"held_out_NAME": mean over all rows}.
    """

    @jax.jit
    def sums(params, batch, frozen):
        mask = batch["mask"].astype(jnp.float32)
        values = measure(params, batch, *frozen)
        return {name: (jnp.sum(value * mask), jnp.sum(mask)) for name, value in values.items()}

    def evaluate(state: TrainState, step: int) -> dict[str, float]:
        del step
        total, params = None, state.average()
        for batch in batches():
            batch = {name: rows for name, rows in batch.items() if name != "index"}
            total = add_metrics(total, sums(params, put_batch(batch, mesh), frozen))
        return {f"held_out_{name}": value for name, value in mean_metrics(total).items()}

    return evaluate
