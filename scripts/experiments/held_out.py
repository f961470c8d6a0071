"""Losses of trained models on held-out latents."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from sfd_jax.data.pipeline import latent_transform, make_eval_batches
from sfd_jax.diffusion.clocks import Clocks, split_params
from sfd_jax.diffusion.learned_clocks import LocalWeights, at_tau, corrected_loss
from sfd_jax.experiment.checkpoints import OpenCheckpoint
from sfd_jax.experiment.training_data import open_source
from sfd_jax.generation.parts import clocks_of
from sfd_jax.latents import LatentLayout, LatentStatistics
from sfd_jax.models import Network
from sfd_jax.randomness import keys_by_row, normal_by_row

Pair = tuple[float, float]

DRAWS = 32  # of noise and time for each image


def held_out_loss(opened: OpenCheckpoint, folder: str, batch_size: int, clocks: Clocks | None = None) -> float | None:
    """Return the corrected loss (docs/learned_clocks.md) of a model and clocks, which compares clocks.

    The weights over local time are those of the released recipe (offset 0.3), whatever the model's clocks.

    Args:
      opened: a diffusion model.
      folder: latents of held-out images, from the encoders of its training latents.
      batch_size: images at a time.
      clocks: by default the model's own.

    Returns:
      The mean over images, noise and tau; None for a model without semantic latents, whose loss has other parts.
    """
    layout, batches = _held_out(opened, folder, batch_size)
    if not layout.semantic_channels:
        return None
    params, trained = split_params(opened.params)
    clocks, loss = clocks or clocks_of(opened.metadata).bind(trained), opened.metadata["config"]["loss"]
    weights = LocalWeights(loss["time"], loss["semantic_weight"])
    errors = _corrected_losses(opened.network, layout, weights)

    def drawn(batch, draw):
        noise, place = _random(batch, draw)
        tau = clocks.tau_end * (draw + place) / DRAWS  # one in each part of [0, tau_end]
        return errors(params, batch["latents"], noise, batch["labels"], *at_tau(clocks, tau))

    found = [np.asarray(drawn(batch, draw))[mask] for batch, mask in batches for draw in range(DRAWS)]
    return float(np.concatenate(found).mean())


@functools.cache  # compiled once for all clocks
def _corrected_losses(network: Network, layout: LatentLayout, weights: LocalWeights):
    def errors(params, *given):
        return corrected_loss(functools.partial(network.apply, params), *given, layout=layout, weights=weights)

    return jax.jit(errors)


def errors_at(opened: OpenCheckpoint, folder: str, places: list[Pair], batch_size: int = 500) -> list[dict[str, float]]:
    """Return the mean squared errors of the velocity, "semantic" and "texture", at pairs of times.

    Args:
      opened: a diffusion model.
      folder: held-out latents.
      places: (t_semantic, t_texture) each.
      batch_size: images at a time.
    """
    layout, batches = _held_out(opened, folder, batch_size)

    @jax.jit
    def errors(params, batch, draw, place):
        noise, _ = _random(batch, draw)
        t_semantic, t_texture = (jnp.full(len(noise), t) for t in place)
        t = layout.per_channel(t_texture, t_semantic)[:, None, None]
        velocity = opened.network.apply(
            params, t * batch["latents"] + (1 - t) * noise, t_semantic, t_texture, batch["labels"]
        )
        texture, semantic = layout.split((velocity - (batch["latents"] - noise)) ** 2)
        return {"semantic": semantic.mean(axis=(1, 2, 3)), "texture": texture.mean(axis=(1, 2, 3))}

    params, batches = split_params(opened.params)[0], list(batches)

    def means(place):
        drawn = [(errors(params, batch, draw, place), mask) for batch, mask in batches for draw in range(4)]
        rows = lambda name: np.concatenate([np.asarray(each[name])[mask] for each, mask in drawn])
        return {name: float(rows(name).mean()) for name in ("semantic", "texture")}

    return [means(place) for place in places]


def _held_out(opened: OpenCheckpoint, folder: str, batch_size: int) -> tuple[LatentLayout, Iterator]:
    """Return the model's layout, and batches of normalised latents with the mask of their real rows."""
    statistics = LatentStatistics.from_dict(opened.metadata["latent_statistics"])
    layout = LatentLayout(statistics.texture_mean.size, statistics.semantic_mean.size)
    transform = latent_transform(layout, statistics)
    batches = make_eval_batches(open_source(folder, repa=False), batch_size=batch_size, transform=transform)
    return layout, ((batch, batch.pop("mask")) for batch in batches)


@jax.jit
def _random(batch: dict, draw: int) -> tuple[jax.Array, jax.Array]:
    """Return noise (B,H,W,C) and a number in [0, 1) (B,), by the image and the draw alone."""
    key, rows = jax.random.fold_in(jax.random.key(0), draw), batch["index"].astype(jnp.int32)
    place = lambda row_key: jax.random.uniform(jax.random.fold_in(row_key, 1))
    return normal_by_row(key, rows, batch["latents"].shape[1:]), jax.vmap(place)(keys_by_row(key, rows))
