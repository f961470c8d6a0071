"""Visual features computed inside the training step by a frozen network, so that none need be stored.

    online   a visual encoder on the batch's pixels: the features that would be stored
    semvae   the Semantic VAE's decoder on the batch's clean semantic latents: the features up to what the
             Semantic VAE loses, from latents only

REPA uses them as targets, and the Semantic VAE can be trained on the first kind.
"""

import dataclasses
from collections.abc import Callable

import jax

from sfd_jax.latents import LatentLayout, LatentStatistics
from sfd_jax.models.encoders import VisualEncoder
from sfd_jax.models.latent_encoder import decode_features
from sfd_jax.models.network import Network


@dataclasses.dataclass(frozen=True)
class FrozenFeatures:
    """Features as a function of a batch.

    Attributes:
      params: of the network, float32; for `Task.frozen`.
      compute: (params, batch) -> features (B, N, F).
    """

    params: dict
    compute: Callable[[dict, dict[str, jax.Array]], jax.Array]


def online_features(encoder: VisualEncoder, params: dict) -> FrozenFeatures:
    """Compute features from `pixels` (B, H, W, 3), uint8 or float32 in [-1, 1]."""
    return FrozenFeatures(params, lambda params, batch: encoder.features(params, batch["pixels"]))


def semvae_features(
    network: Network, params: dict, layout: LatentLayout, statistics: LatentStatistics, tile_grid: int
) -> FrozenFeatures:
    """Compute features from the semantic group of `latents` (B, H, W, C), normalised and clean.

    Args:
      network: a "semantic_vae".
      params: its parameters.
      layout: which channels are semantic.
      statistics: of the normalisation of the latents.
      tile_grid: latent pixels a side that the Semantic VAE encoded at once (16 released: 512 px are four tiles).
    """

    def compute(params: dict, batch: dict) -> jax.Array:
        _, semantic_latents = layout.split(batch["latents"])
        return decode_features(network, params, statistics.denormalise_semantic(semantic_latents), tile_grid)

    return FrozenFeatures(params, compute)
