"""Where a run takes REPA's targets from: `data.repa_source` of its config (docs/repa.md compares them)."""

from typing import Any

from sfd_jax.errors import SfdError, nearest

REPA_SOURCES = ("stored", "semvae", "online")


def check_repa_source(config: Any) -> str:
    """Return where the targets come from: a name of `REPA_SOURCES`, or "none" without REPA.

    Raises:
      SfdError: unknown source, or one whose checkpoint or images are not given.
    """
    data = config.data
    if data.repa_source not in REPA_SOURCES:
        raise SfdError(f"data.repa_source='{data.repa_source}' is unknown; {nearest(data.repa_source, REPA_SOURCES)}")
    if config.loss.repa_weight <= 0:
        return "none"
    if data.repa_source == "semvae" and not data.semantic_vae:
        raise SfdError("data.repa_source=semvae needs the Semantic VAE: --config.data.semantic_vae=CKPT")
    if data.repa_source == "online":
        if not data.visual_encoder:
            raise SfdError("data.repa_source=online needs DINOv2: --config.data.visual_encoder=CKPT")
        if not data.images.path and data.images.kind != "digits":
            raise SfdError("data.repa_source=online needs the latents' images: --config.data.images.path=IMAGES")
    return data.repa_source


def open_targets(config: Any, layout: Any, latents: Any):
    """Open what the targets are made from.

    Args:
      config: of the run.
      layout: of the latents.
      latents: source of records, with its statistics.

    Returns:
      (source, targets): records to train on, with pixels for "online"; and the FrozenFeatures of the task, None
      where the targets are stored or there are none.
    """
    from sfd_jax.training.frozen_features import online_features, semvae_features

    kind, data = check_repa_source(config), config.data
    dtype = config.model.compute_dtype
    if kind == "semvae":
        network, params = open_frozen(data.semantic_vae, "semantic_vae", dtype)
        stored = latents.statistics.semantic_mean.size
        if network.config.bottleneck_dim != stored:
            raise SfdError(
                f"data.semantic_vae={data.semantic_vae} decodes {network.config.bottleneck_dim} channels, but the "
                f"latents have {stored} semantic ones: they are not its own"
            )
        _check_own(latents, "semantic_vae", params)
        _check_width(config, network.config.input_dim, "data.semantic_vae")
        _check_tiles(config)
        return latents, semvae_features(network, params, layout, latents.statistics, data.tile_grid)
    if kind == "online":
        from sfd_jax.data.images import open_images
        from sfd_jax.data.paired import WithPixels
        from sfd_jax.models.latent_encoder import VisualEncoder

        network, params = open_frozen(data.visual_encoder, "dinov2", dtype)
        _check_own(latents, "visual", params)
        _check_width(config, network.config.width, "data.visual_encoder")
        _check_images(config, latents)
        # A tile's patches are as many as its latent pixels: 256 px are 16 x 16, seen at 16 x 14 = 224 px.
        side = min(data.tile_grid, config.model.input_size)
        tile_size = data.images.image_size * side // config.model.input_size
        encoder = VisualEncoder(network, view_size=side * network.config.patch_size, tile_size=tile_size)
        images = open_images(**data.images)
        total = getattr(latents, "manifest", {}).get("total")
        if latents.origin["weights"] and total != len(images):
            raise SfdError(f"the latents were made from {total:,} images, but data.images names {len(images):,}")
        return WithPixels(latents, images), online_features(encoder, params)
    return latents, None


def _check_width(config: Any, width: int, field: str) -> None:
    if config.model.repa_features != width:
        raise SfdError(f"model.repa_features={config.model.repa_features}, but {field} makes features of {width}")


def _check_tiles(config: Any) -> None:
    grid, tile = config.model.input_size, config.data.tile_grid
    if tile < 1 or grid > tile and grid % tile:
        raise SfdError(f"data.tile_grid={tile} does not divide model.input_size={grid}: {grid} or a divisor would do")


def _check_images(config: Any, latents: Any) -> None:
    """Raise SfdError where data.images are of another size than the latents were made from, or do not fit the grid."""
    size, grid, made_from = config.data.images.image_size, config.model.input_size, latents.origin["image_size"]
    _check_tiles(config)
    if made_from not in (None, size):
        raise SfdError(f"the latents were made from images of {made_from} px, but data.images.image_size={size}")
    if size % grid:
        low = size // grid * grid
        raise SfdError(
            f"data.images.image_size={size} does not divide by model.input_size={grid}: {low or grid} or {low + grid} "
            "would do"
        )


def open_frozen(path: str, kind: str, compute_dtype: str):
    """Return the network of a checkpoint, computing in `compute_dtype`, and its averaged parameters.

    Raises:
      SfdError: nothing there, or a network of another kind.
    """
    from sfd_jax.distributed import say, start
    from sfd_jax.models import network_of
    from sfd_jax.training import load_params
    from sfd_jax.training.optimizer import average_notes

    start()  # Orbax asks JAX for its devices
    params, metadata = load_params(path)
    metadata["given_as"] = path
    for note in average_notes(metadata):
        say(f"note: {note}")
    return network_of(metadata, kind, compute_dtype=compute_dtype), params


def _check_own(latents: Any, name: str, params: dict) -> None:
    """Raise SfdError where a source says that its latents were made by other weights than these."""
    from sfd_jax.distributed import say
    from sfd_jax.models.fingerprint import params_hash

    weights = latents.origin["weights"]
    made_by = weights.get(name)
    if weights and made_by is None:
        raise SfdError(f"the latents were made by {', '.join(weights)}, not by a '{name}': take another repa_source")
    if made_by is None:
        say(f"note: the latents do not tell which '{name}' made them; that the one given did was not checked")
    elif made_by != params_hash(params):
        raise SfdError(
            f"the latents were made with other weights of '{name}' than the checkpoint holds "
            f"({made_by[:12]}, not {params_hash(params)[:12]}): give the one that extracted them"
        )
