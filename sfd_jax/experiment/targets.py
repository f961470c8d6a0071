"""Sources of REPA's targets, chosen by `data.repa_source` of a config (docs/repa.md compares them)."""

from collections.abc import Collection
from typing import Any

from ml_collections import ConfigDict

from sfd_jax.data.images import open_images
from sfd_jax.data.latent_store import LatentSource
from sfd_jax.data.paired import WithPixels
from sfd_jax.distributed import say, start
from sfd_jax.errors import SfdError, nearest
from sfd_jax.experiment.checkpoints import open_checkpoint
from sfd_jax.latents import LatentLayout
from sfd_jax.models import ENCODERS, Network
from sfd_jax.models.encoders import Tiling, VisualEncoder
from sfd_jax.models.encoders.tiles import tiles_of_grid
from sfd_jax.models.fingerprint import params_hash
from sfd_jax.ranges import IN_PACKAGES
from sfd_jax.training.frozen_features import FrozenFeatures, online_features, semvae_features

REPA_SOURCES = ("stored", "semvae", "online")


def check_repa_source(config: ConfigDict) -> str:
    """Return the source of the targets: a name of `REPA_SOURCES`, or "none" without REPA.

    Raises:
      SfdError: the source is unknown, its checkpoint or images are not given, or tokens and features do not match.
    """
    data = config.data
    if data.repa_source not in REPA_SOURCES:
        raise SfdError(f"data.repa_source='{data.repa_source}' is unknown; {nearest(data.repa_source, REPA_SOURCES)}")
    if config.loss.repa_weight <= 0:
        return "none"
    if (patch := config.model.get("patch_size", 1)) > 1:
        raise SfdError(
            f"REPA compares a token with the feature of one latent pixel, but with model.patch_size={patch} a token "
            f"stands for {patch**2} of them: --config.model.repa_features=0 --config.loss.repa_weight=0 trains without"
        )
    if data.repa_source == "semvae" and not data.semantic_vae:
        raise SfdError("data.repa_source=semvae needs the Semantic VAE: --config.data.semantic_vae=CKPT")
    if data.repa_source == "semvae" and not config.latents.semantic_channels:
        raise SfdError(
            "data.repa_source=semvae decodes the semantic latents, but latents.semantic_channels=0: take "
            "data.repa_source=stored or online"
        )
    if data.repa_source == "online":
        if not data.visual_encoder:
            raise SfdError("data.repa_source=online needs a visual encoder: --config.data.visual_encoder=CKPT")
        if not data.images.path and data.images.kind not in IN_PACKAGES:
            raise SfdError("data.repa_source=online needs the latents' images: --config.data.images.path=IMAGES")
    return data.repa_source


def open_targets(config: ConfigDict, layout: LatentLayout, latents: LatentSource) -> tuple[Any, FrozenFeatures | None]:
    """Open the source of the targets.

    Args:
      config: of the run, with `data.tile_grid` of the latents.
      layout: of the latents.
      latents: source of records, with its statistics.

    Returns:
      (source, targets): records to train on, with pixels for "online"; and the FrozenFeatures of the task, None
      if the targets are stored or there are none.
    """
    kind, data = check_repa_source(config), config.data
    dtype = config.model.compute_dtype
    if kind == "semvae":
        network, params = open_frozen(data.semantic_vae, "semantic_vae", dtype)
        stored = latents.statistics.semantic_mean.size
        if network.config.bottleneck_dim != stored:
            raise SfdError(
                f"data.semantic_vae={data.semantic_vae} decodes {network.config.bottleneck_dim} channels, but the "
                f"latents have {stored} semantic ones: give the Semantic VAE that made them"
            )
        _check_own(latents, "semantic_vae", params)
        _check_width(config, network.config.input_dim, "data.semantic_vae")
        tiles_of_grid(config.model.input_size, data.tile_grid)
        return latents, semvae_features(network, params, layout, latents.statistics, data.tile_grid)
    if kind == "online":
        network, params = open_frozen(data.visual_encoder, ENCODERS, dtype)
        _check_own(latents, "visual", params)
        _check_width(config, network.config.feature_width, "data.visual_encoder")
        size, made_from = data.images.image_size, latents.origin["image_size"]
        if made_from not in (None, size):
            raise SfdError(f"the latents were made from images of {made_from} px, but data.images.image_size={size}")
        encoder = VisualEncoder(network, Tiling.of_latents(size, config.model.input_size, data.tile_grid))
        return WithPixels(latents, open_images(**data.images)), online_features(encoder, params)
    return latents, None


def _check_width(config: ConfigDict, width: int, field: str) -> None:
    if config.model.repa_features != width:
        raise SfdError(f"model.repa_features={config.model.repa_features}, but {field} makes features of {width}")


def open_frozen(path: str, kind: str | Collection[str], compute_dtype: str) -> tuple[Network, dict]:
    """Return the network of a checkpoint, computing in `compute_dtype`, and its EMA parameters.

    Args:
      path: the checkpoint.
      kind: as for `network_of`.
      compute_dtype: "float32" or "bfloat16", if the network has this setting.

    Raises:
      SfdError: there is no checkpoint, or it is of another network.
    """
    start()  # Orbax asks JAX for its devices
    opened = open_checkpoint(path, kind, compute_dtype=compute_dtype)
    for note in opened.notes:
        say(f"note: {note}")
    return opened.network, opened.params


def _check_own(latents: Any, name: str, params: dict) -> None:
    """Raise SfdError if the metadata of the latents name other weights than these."""
    weights = latents.origin["weights"]
    made_by = weights.get(name)
    if weights and made_by is None:
        raise SfdError(f"the latents were made by {', '.join(weights)}, not by a '{name}': choose another repa_source")
    if made_by is None:
        say(f"note: the latents do not say which '{name}' made them; it was not checked that the given one did")
    elif made_by != params_hash(params):
        raise SfdError(
            f"the latents were made with other weights of '{name}' than the checkpoint holds "
            f"({made_by[:12]}, not {params_hash(params)[:12]}): give the one that extracted them"
        )
