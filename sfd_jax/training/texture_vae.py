"""Train a texture VAE: reconstruct pixels through a posterior on a small grid.

Batches: `pixels` (B, H, W, 3) in [-1, 1]. This trains small VAEs, such as the digits', optionally with a
perceptual distance; the released one was trained with LPIPS and a discriminator.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from sfd_jax.errors import SfdError
from sfd_jax.models.network import Network
from sfd_jax.models.posterior import sample_posterior
from sfd_jax.randomness import normal_by_row
from sfd_jax.ranges import check_fields
from sfd_jax.training.task import Task
from sfd_jax.training.terms import gaussian_kl


@dataclasses.dataclass(frozen=True)
class TextureVAELoss:
    """Weights of the loss.

    Attributes:
      l1_weight, mse_weight: absolute and squared error, means over pixels and colours.
      kl_weight: KL to the unit Gaussian, summed over the latent of an image. (LDM sums the error too: its
        weight divided by 3 H W is ours.)
      perceptual_weight: of the perceptual distance, where one is given.
    """

    l1_weight: float = 1.0
    mse_weight: float = 0.0
    kl_weight: float = 1e-6
    perceptual_weight: float = 1.0

    def __post_init__(self):
        check_fields("loss", self)


def texture_vae_task(
    network: Network,
    weights: TextureVAELoss,
    perceptual: Callable[..., jax.Array] | None = None,
    frozen: dict | None = None,
) -> Task:
    """Return the task for a "texture_vae" network.

    Args:
      network: the network.
      weights: of the loss.
      perceptual: (reconstruction, pixels), both (B, H, W, 3) in [-1, 1] -> distances (B,); e.g. LPIPS.
      frozen: its parameters, if any: its third argument.

    Raises:
      SfdError: no term of the reconstruction has a weight.
    """
    if not (weights.l1_weight or weights.mse_weight or (perceptual and weights.perceptual_weight)):
        raise SfdError(
            "loss.l1_weight=0 and loss.mse_weight=0, and no perceptual distance: nothing trains the reconstruction; "
            "give one of them a weight"
        )

    def loss(params: dict, batch: dict, key: jax.Array, *frozen: dict):
        pixels = batch["pixels"]
        mean, logvar = network.apply(params, pixels, method="encode")
        raw_latents = sample_posterior(mean, logvar, normal_by_row(key, batch["row_indices"], mean.shape[1:]))
        reconstruction = network.apply(params, raw_latents, method="decode")

        error = reconstruction - pixels
        metrics = {
            "l1": jnp.abs(error).mean(),
            "mse": jnp.square(error).mean(),
            "kl": gaussian_kl(mean, logvar).mean(),
        }
        total = sum(getattr(weights, f"{name}_weight") * value for name, value in metrics.items())
        if perceptual is not None:
            metrics["perceptual"] = perceptual(reconstruction, pixels, *frozen).mean()
            total += weights.perceptual_weight * metrics["perceptual"]
        return total, metrics

    return Task("texture_vae", network, network.init, loss, frozen=frozen)


def measure_texture_vae(network: Network, params: dict, batch: dict, *frozen: dict) -> dict[str, jax.Array]:
    """Measure the reconstruction from the mean latent, one number for each row.

    Args:
      network: the "texture_vae".
      params: its parameters.
      batch: `pixels` (B, H, W, 3) in [-1, 1].
      frozen: parameters of the perceptual distance, which is not measured here.

    Returns:
      "l1", "mse", "psnr" (in decibels, of the clipped reconstruction) and "kl": (B,) each.
    """
    del frozen
    pixels = batch["pixels"]
    mean, logvar = network.apply(params, pixels, method="encode")
    reconstruction = network.apply(params, mean, method="decode")
    error = reconstruction - pixels
    clipped = jnp.square(jnp.clip(reconstruction, -1.0, 1.0) - pixels).mean(axis=(1, 2, 3))
    return {
        "l1": jnp.abs(error).mean(axis=(1, 2, 3)),
        "mse": jnp.square(error).mean(axis=(1, 2, 3)),
        "psnr": 10.0 * jnp.log10(4.0 / jnp.maximum(clipped, 1e-10)),  # pixels span 2
        "kl": gaussian_kl(mean, logvar),
    }
