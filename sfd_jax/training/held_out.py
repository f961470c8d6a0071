"""Numbers on held-out data while a run goes: every row counts once, padding not at all."""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sfd_jax.distributed import put_batch
from sfd_jax.training.state import TrainState
from sfd_jax.training.step import add_metrics, mean_metrics

# (params, batch) -> name to (B,): one number a row, without randomness. Frozen parameters come third.
Measure = Callable[..., dict[str, jax.Array]]


def held_out_metrics(
    measure: Measure, batches: Callable[[], Iterator[dict[str, np.ndarray]]], mesh: Mesh, frozen: tuple = ()
) -> Callable[[TrainState, int], dict[str, float]]:
    """Make the `evaluate` argument of `fit`: means of a measure of the averaged parameters.

    Args:
      measure: what to compute of each row.
      batches: makes the iterator over this host's batches, as `data.pipeline.make_eval_batches` does: all of one
        size, with `mask` (B,) False where a row only fills up its batch.
      mesh: the run's mesh, which the batch size times the number of hosts divides by.
      frozen: from `put_frozen`; handed on to the measure.

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
        total = None
        for batch in batches():
            batch = {name: rows for name, rows in batch.items() if name != "index"}
            total = add_metrics(total, sums(state.ema_params, put_batch(batch, mesh), frozen))
        return {f"held_out_{name}": value for name, value in mean_metrics(total).items()}

    return evaluate
