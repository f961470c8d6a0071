"""The latents of a training run, and checks against its config and --init."""

import contextlib
from collections.abc import Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from sfd_jax.class_names import readable
from sfd_jax.convert.weight_files import read_statistics
from sfd_jax.data.latent_store import LatentSource, LatentStore
from sfd_jax.data.paired import WithPixels
from sfd_jax.data.released import ReleasedLatents, open_latents
from sfd_jax.diffusion.clocks import Clocks, join_params, split_params
from sfd_jax.distributed import start
from sfd_jax.errors import Faults, SfdError
from sfd_jax.files import must_be_local
from sfd_jax.generation.parts import clocks_of
from sfd_jax.latents import LatentLayout, LatentStatistics, other_makers
from sfd_jax.models import Network, network_of
from sfd_jax.models.encoders.tiles import RELEASED_GRID
from sfd_jax.training import load_metadata, load_params
from sfd_jax.training.optimizer import average_notes
from sfd_jax.trees import shapes_by_name


def open_source(path: str, *, repa: bool) -> LatentStore | ReleasedLatents:
    """Open the latents to train on, with their statistics.

    Raises:
      SfdError: there is no path, no latents, or released shards have no statistics.
    """
    must_be_local("--config.data.path", path)
    if not path:
        raise SfdError("give the latents: --config.data.path=FOLDER, made by `sfd extract`")
    return open_latents(path, repa=repa, read_statistics=read_statistics)


def check_data(config: ConfigDict, source: LatentStore | ReleasedLatents, found: Faults, *, repa: bool) -> list[str]:
    """Add to `found` how the latents differ from the config, with the flags that make it fit.

    Args:
      config: of the run.
      source: the latents.
      found: receives the faults.
      repa: whether stored features are needed.

    Returns:
      Notes on what of the latents is not used.

    Raises:
      SfdError: a record cannot be read.
    """
    statistics, latents = source.statistics, config.latents
    texture, semantic = statistics.texture_mean.size, statistics.semantic_mean.size
    if texture != latents.texture_channels or latents.semantic_channels not in (semantic, 0):
        found.append(
            f"the latents have {texture} texture and {semantic} semantic channels, but latents.texture_channels="
            f"{latents.texture_channels} and latents.semantic_channels={latents.semantic_channels}: "
            f"--config.latents.texture_channels={texture} --config.latents.semantic_channels={semantic}"
        )
    if config.data.flips and not (source.flips if hasattr(source, "flips") else source.orientations == 2):
        found.append("the latents hold no mirrored images, which data.flips=True needs: --config.data.flips=False")
    record, size = source[0], config.model.input_size
    grid, features = record["texture"].shape[0], record.get("repa_features")
    if grid != size:
        found.append(f"the latents are {grid} x {grid}, but model.input_size={size}: --config.model.input_size={grid}")
    if repa and features is None:
        with contextlib.suppress(SfdError):  # released shards read them only on request
            features = open_source(config.data.path, repa=True)[0].get("repa_features")
    if repa and features is None:
        found.append(
            f"the latents hold no visual features, which loss.repa_weight={config.loss.repa_weight:g} with "
            "data.repa_source=stored needs: extract them with `sfd extract --repa`, make them while training "
            "(docs/repa.md), or train without REPA: --config.model.repa_features=0 --config.loss.repa_weight=0"
        )
    elif repa and features.shape[-1] != config.model.repa_features > 0:
        found.append(
            f"the latents' visual features are {features.shape[-1]} wide, but model.repa_features="
            f"{config.model.repa_features}: --config.model.repa_features={features.shape[-1]}"
        )
    if semantic and not latents.semantic_channels:
        return [f"latents.semantic_channels=0: the {semantic} semantic channels of the latents are not used"]
    return []


def used_parts(layout: LatentLayout, source: LatentSource | WithPixels) -> tuple[LatentStatistics, dict[str, Any]]:
    """Return the statistics and the origin of the latents that a layout uses: all, or those of the texture alone."""
    if layout.semantic_channels:
        return source.statistics, source.origin
    weights = {name: digest for name, digest in source.origin["weights"].items() if name == "texture_vae"}
    return source.statistics.texture_alone(), {**source.origin, "weights": weights}


def completed(config: ConfigDict, source: LatentStore | ReleasedLatents) -> ConfigDict:
    """Return a config with model.num_classes and model.input_size, if None, taken from the latents."""
    config = config.copy_and_resolve_references()
    if config.model.num_classes is None:
        config.model.num_classes = len(source.class_names or ()) or max(source.label_counts()) + 1
    if config.model.input_size is None:
        config.model.input_size = source[0]["texture"].shape[0]
    return config


def with_tile_grid(config: ConfigDict, source: LatentStore | ReleasedLatents) -> tuple[ConfigDict, list[str]]:
    """Return a config with data.tile_grid, if None, as the latents were extracted, and a note for large images.

    Raises:
      SfdError: they were extracted in other tiles than the config says.
    """
    grid, made_with = config.model.input_size, source.origin["tile_grid"]
    # Configs of the demo's stages lack the setting.
    if given := config.data.get("tile_grid", made_with or RELEASED_GRID):
        if made_with not in (None, min(given, grid)):
            raise SfdError(
                f"the latents were extracted in tiles of {made_with} x {made_with} latent pixels, but data.tile_grid="
                f"{given}: leave it out, or extract them with another --tile_size"
            )
        return config, []
    config = config.copy_and_resolve_references()
    one_view = {grid: max(grid, RELEASED_GRID)}  # a tile may be larger than the image
    config.data.tile_grid = side = {None: RELEASED_GRID, **one_view}.get(made_with, made_with)
    if grid <= RELEASED_GRID or config.data.repa_source == "stored":
        return config, []
    views = "one view" if grid <= side else f"{(grid // side) ** 2} tiles"
    why = "like the latents" if made_with else "as released, since the latents do not say how they were extracted"
    return config, [f"REPA's targets are made of {views} an image, {why} (data.tile_grid={side})"]


def unused_classes(num_classes: int, source: LatentStore | ReleasedLatents) -> list[str]:
    """Return a note if some of the network's classes have no data."""
    known = source.label_counts() or source.class_names or ()
    if missing := num_classes - len(known):
        return [
            f"model.num_classes={num_classes}, but the data have images of {len(known)} classes: the embeddings of the "
            f"other {missing} are never trained, and sampling refuses those labels"
        ]
    return []


def load_init(path: str, network: Network, clocks: Clocks, seed: int) -> dict:
    """Return the initial weights from --init's checkpoint, with those of trained clocks if the clocks are the same.

    Raises:
      SfdError: as `load_params`.
    """
    theirs = clocks_of(load_metadata(path))
    shapes = join_params(network.abstract_params(), jax.eval_shape(lambda: theirs.init(jax.random.key(0))))
    params, trained = split_params(load_params(path, abstract=shapes)[0])
    return join_params(params, trained if theirs == clocks else clocks.init(jax.random.key(seed)))


def check_init(path: str, network: Network, made_from: Mapping[str, Any] | None) -> tuple[dict, list[str]]:
    """Compare the checkpoint of --init with this run.

    Args:
      path: of the checkpoint.
      network: the network to train.
      made_from: what made the latents or features to train on, if known.

    Returns:
      Its metadata, and notes on the differences.

    Raises:
      SfdError: it is of another network or another shape.
    """
    start()  # Orbax asks JAX for its devices
    metadata = {**load_metadata(path), "given_as": f"--init={path}"}
    saved = network_of(metadata, network.name)
    theirs, ours = saved.config_dict(), network.config_dict()
    changed = [name for name in theirs if theirs[name] != ours[name] and name != "compute_dtype"]
    differing = f"--init={path} has " + ", ".join(f"{name} {theirs[name]} (here {ours[name]})" for name in changed)
    if shapes_by_name(saved.abstract_params()) != shapes_by_name(network.abstract_params()):
        raise SfdError(f"{differing}: set config.model accordingly, or start from another checkpoint")
    makers = other_makers(metadata.get("latents"), made_from)
    notes = [f"--init={path} was trained on latents or features of another {line}" for line in makers]
    return metadata, notes + ([differing] if changed else []) + average_notes(metadata)


def check_diffusion_init(
    path: str, network: Network, clocks: Clocks, layout: LatentLayout, source: LatentSource | WithPixels
) -> list[str]:
    """Return notes on how the checkpoint of --init differs from a run of the diffusion model.

    Raises:
      SfdError: as `check_init`.
    """
    ours, origin = used_parts(layout, source)
    metadata, notes = check_init(path, network, origin)
    if (metadata.get("config") or {}).get("clocks") and (theirs := clocks_of(metadata)) != clocks:
        notes.append(f"--init={path} was trained with other clocks, {theirs}; this run's are {clocks}")
    statistics = metadata.get("latent_statistics")
    if statistics and not LatentStatistics.from_dict(statistics).same_scale(ours):
        notes.append(f"--init={path} was trained with other latent statistics than those of these latents")
    names = readable(metadata.get("class_names")), readable(source.class_names)
    if None not in names and names[0] != names[1]:
        notes.append(
            f"--init={path} was trained with other class names: its label embeddings start as those of other classes"
        )
    return notes
