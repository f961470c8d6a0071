"""A training task: initial parameters, and a loss over batches."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

# A scalar is averaged over steps; a (sum, count) pair is summed over steps, then divided.
Metrics = dict[str, jax.Array | tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Task:
    """A training problem as two pure functions; `fit` uses nothing else.

    Attributes:
      name: for log lines and the run's record.
      network: the trained Network, or None; its config goes into the checkpoint.
      init: key -> params, a nested dict with string keys of float32 arrays: the network's, or
        {"network": the network's, "heads": those of classifiers that only training uses}, or
        {"network": the network's, "clocks": those of clocks that are trained}.
      loss: (params, batch, key) -> (scalar loss, metrics). To the arrays of the data's batch the step adds
        `row_indices` (B,) int32, each row's place in the global batch: what a row draws is a function of it and
        of the key (randomness.py). The loss is a mean over rows, so that accumulated small batches equal a
        big one; a metric is a scalar, or a pair (sum, count).
      frozen: parameters that the loss reads but that are not trained, e.g. of a network that computes targets. They
        are put on the mesh once and are inputs of the compiled step, not constants in it; the loss gets them as a
        fourth argument. Checkpoints hold only their hash.
    """

    name: str
    network: Any
    init: Callable[[jax.Array], dict]
    loss: Callable[..., tuple[jax.Array, Metrics]]
    frozen: dict | None = None

    @functools.cached_property
    def abstract_params(self) -> dict:
        """The tree of `init` with a ShapeDtypeStruct at each leaf; traced once, allocates nothing."""
        return jax.eval_shape(self.init, jax.eval_shape(lambda: jax.random.key(0)))
