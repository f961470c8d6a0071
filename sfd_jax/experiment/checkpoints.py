"""From a checkpoint to its network and weights: what every command, the demo and the benchmarks open one with."""

import os
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from sfd_jax.models import Network, network_of
from sfd_jax.training import load_params
from sfd_jax.training.optimizer import average_notes


class OpenCheckpoint(NamedTuple):
    """A network with its weights, and what its checkpoint says of them.

    Attributes:
      network: computing in the type that was asked for.
      params: a nested dict of float32 arrays.
      metadata: see `training.checkpoint`; "which" says which weights they are, "given_as" what messages call them.
    """

    network: Network
    params: dict
    metadata: dict[str, Any]

    @property
    def weights(self) -> tuple[dict, dict]:
        """(params, metadata), as samplers and extractors take them."""
        return self.params, self.metadata

    @property
    def notes(self) -> list[str]:
        """Sentences on an average of the weights that has not run for long."""
        return average_notes(self.metadata)


def trained_size(metadata: Mapping[str, Any]) -> int | None:
    """Return the side in pixels of the images that a checkpoint's network was trained on; None where it tells none."""
    return ((metadata.get("config") or {}).get("data") or {}).get("image_size")


def open_checkpoint(
    directory: str | os.PathLike,
    kind: str | Collection[str] | None = None,
    *,
    flag: str | None = None,
    step: int | None = None,
    weights: str = "ema",
    compute_dtype: str | None = None,
) -> OpenCheckpoint:
    """Open a checkpoint.

    Args:
      directory: the work folder of a run, a folder of checkpoints, or one checkpoint.
      kind: the network that is wanted, a key of `models.NETWORKS`, or several of which any will do; None takes any.
      flag: the command's flag that named the folder; messages then say flag=folder.
      step: which checkpoint; the newest by default.
      weights: "ema" or "raw", where the checkpoint holds both.
      compute_dtype: "float32" or "bfloat16" instead of the checkpoint's, where the network has a choice.

    Raises:
      SfdError: no such checkpoint, a damaged one, or one of another network.
    """
    params, metadata = load_params(directory, step, weights)
    metadata |= {"which": weights, "given_as": f"{flag}={directory}" if flag else str(directory)}
    network = network_of(metadata, kind or metadata["network"], compute_dtype=compute_dtype)
    return OpenCheckpoint(network, params, metadata)
