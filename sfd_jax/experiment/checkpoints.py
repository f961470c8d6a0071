"""From a checkpoint to its network and weights, for commands, the demo and benchmarks."""

import os
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from sfd_jax.models import Network, network_of
from sfd_jax.training import load_params
from sfd_jax.training.optimizer import average_notes


class OpenCheckpoint(NamedTuple):
    """A network with its weights and metadata.

    Attributes:
      network: computes in the requested dtype.
      params: a nested dict of float32 arrays.
      metadata: see `training.checkpoint`; "which" is "ema" or "raw", "given_as" is its name in messages.
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
        """Notes on an EMA that still holds much of the initial weights."""
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
      kind: the expected network, a key of `models.NETWORKS`, or several allowed ones; None allows any.
      flag: the command's flag with the folder, for messages.
      step: which checkpoint; the newest by default.
      weights: "ema" or "raw", if the checkpoint holds both.
      compute_dtype: "float32" or "bfloat16" instead of the checkpoint's, if the network has this setting.

    Raises:
      SfdError: the checkpoint is missing, damaged, or of another network.
    """
    params, metadata = load_params(directory, step, weights)
    metadata |= {"which": weights, "given_as": f"{flag}={directory}" if flag else str(directory)}
    network = network_of(metadata, kind or metadata["network"], compute_dtype=compute_dtype)
    return OpenCheckpoint(network, params, metadata)
