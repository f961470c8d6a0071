"""The corrected loss of a trained model on held-out latents, which compares clocks (docs/learned_clocks.md)."""

import jax
import jax.numpy as jnp
import numpy as np

from sfd_jax.data.pipeline import latent_transform, make_eval_batches
from sfd_jax.diffusion.learned_clocks import LocalWeights, at_tau, corrected_loss
from sfd_jax.experiment.checkpoints import OpenCheckpoint
from sfd_jax.experiment.training_data import open_source
from sfd_jax.generation.parts import clocks_of
from sfd_jax.latents import LatentLayout, LatentStatistics
from sfd_jax.randomness import keys_by_row

DRAWS = 32  # of noise and time for each image


def held_out_loss(opened: OpenCheckpoint, folder: str, batch_size: int) -> float | None:
    """Return the corrected loss of a model with its own clocks and labels, on the same noise for all models.

    The weights over local time are those of the released recipe (offset 0.3), whatever the model's clocks.

    Args:
      opened: a diffusion model.
      folder: latents of held-out images, from the encoders of its training latents.
      batch_size: images at a time.

    Returns:
      The mean over images, noise and tau; None for a model without semantic latents, whose loss has other parts.
    """
    network, params, metadata = opened
    statistics = LatentStatistics.from_dict(metadata["latent_statistics"])
    layout = LatentLayout(statistics.texture_mean.size, statistics.semantic_mean.size)
    if not layout.semantic_channels:
        return None
    clocks, loss = clocks_of(metadata), metadata["config"]["loss"]
    weights = LocalWeights(loss["time"], loss["semantic_weight"])

    @jax.jit
    def errors(params, batch, draw):
        key, rows = jax.random.fold_in(jax.random.key(0), draw), batch["index"].astype(jnp.int32)
        noise = lambda key: jax.random.normal(key, batch["latents"].shape[1:])
        place = lambda key: jax.random.uniform(jax.random.fold_in(key, 1))
        tau = clocks.tau_end * (draw + jax.vmap(place)(keys_by_row(key, rows))) / DRAWS  # one in each part of [0, end]
        predict = lambda *inputs: network.apply(params, *inputs)
        given = batch["latents"], jax.vmap(noise)(keys_by_row(key, rows)), batch["labels"], *at_tau(clocks, tau)
        return corrected_loss(predict, *given, layout=layout, weights=weights)

    source, transform = open_source(folder, repa=False), latent_transform(layout, statistics)
    found = []
    for batch in make_eval_batches(source, batch_size=batch_size, transform=transform):
        mask = batch.pop("mask")
        found += [np.asarray(errors(params, batch, jnp.int32(draw)))[mask] for draw in range(DRAWS)]
    return float(np.concatenate(found).mean())
