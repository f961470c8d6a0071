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
        return latents, semvae_features(network, params, layout, latents.statistics, data.tile_grid)
    if kind == "online":
        from sfd_jax.data.images import open_images
        from sfd_jax.data.paired import WithPixels
        from sfd_jax.models.latent_encoder import VisualEncoder

        network, params = open_frozen(data.visual_encoder, "dinov2", dtype)
        _check_own(latents, "visual", params)
        # A tile's patches are as many as its latent pixels: 256 px are 16 x 16, seen at 16 x 14 = 224 px.
        side = min(data.tile_grid, config.model.input_size)
        tile_size = data.images.image_size * side // config.model.input_size
        encoder = VisualEncoder(network, view_size=side * network.config.patch_size, tile_size=tile_size)
        return WithPixels(latents, open_images(**data.images)), online_features(encoder, params)
    return latents, None


def open_frozen(path: str, kind: str, compute_dtype: str):
    """Return the network of a checkpoint, computing in `compute_dtype`, and its averaged parameters.

    Raises:
      SfdError: nothing there, or a network of another kind.
    """
    from sfd_jax.distributed import start
    from sfd_jax.models import Network
    from sfd_jax.training import load_params

    start()  # Orbax asks JAX for its devices
    params, metadata = load_params(path)
    if metadata["network"] != kind:
        raise SfdError(f"{path} holds a {metadata['network']}, not a {kind}")
    settings = dict(metadata["network_config"])
    if "compute_dtype" in Network(kind, settings).config_dict():
        settings["compute_dtype"] = compute_dtype
    return Network(kind, settings), params


def _check_own(latents: Any, name: str, params: dict) -> None:
    """Raise SfdError where a store says that its latents were made by other weights than these."""
    from sfd_jax.models.fingerprint import params_hash

    made_by = getattr(latents, "manifest", {}).get("weights", {}).get(name)
    if made_by and made_by != params_hash(params):
        raise SfdError(
            f"the latents were made with other weights of '{name}' than the checkpoint holds "
            f"({made_by[:12]}, not {params_hash(params)[:12]}): give the one that extracted them"
        )
