"""From a config to a `Run`, one function for each kind of training.

Each adds to `found` the faults that can be found without a device, and raises all of them together.
"""

import functools
from typing import Any

import jax
from ml_collections import ConfigDict

from sfd_jax.data.checks import check_labels, check_released, check_store
from sfd_jax.data.images import ImageSource, open_images
from sfd_jax.data.latent_store import LatentStore
from sfd_jax.data.pipeline import feature_transform, latent_transform, pixel_transform
from sfd_jax.data.released import open_latents
from sfd_jax.errors import Faults, SfdError
from sfd_jax.experiment import build
from sfd_jax.experiment.checkpoints import trained_size
from sfd_jax.experiment.previews import preview_config
from sfd_jax.experiment.run import Run
from sfd_jax.experiment.targets import check_repa_source, open_frozen, open_targets
from sfd_jax.experiment.training_data import (
    check_data,
    check_diffusion_init,
    check_init,
    completed,
    load_init,
    open_source,
    unused_classes,
    used_parts,
    with_tile_grid,
)
from sfd_jax.latents import other_makers
from sfd_jax.models import ENCODERS, Network
from sfd_jax.models.encoders import Tiling, VisualEncoder
from sfd_jax.models.fingerprint import params_hash
from sfd_jax.models.layers import check_divides
from sfd_jax.ranges import IN_PACKAGES
from sfd_jax.settings import from_group
from sfd_jax.training import Task, TrainConfig, load_metadata, load_params
from sfd_jax.training.checkpoint import find_checkpoint
from sfd_jax.training.frozen_features import FrozenFeatures, online_features
from sfd_jax.training.semantic_vae import SemanticVAELoss, measure_semantic_vae, semantic_vae_task
from sfd_jax.training.texture_vae import TextureVAELoss, measure_texture_vae, texture_vae_task
from sfd_jax.training.visual_encoder import VisualEncoderLoss, measure_visual_encoder, visual_encoder_task


def open_diffusion(config: ConfigDict, found: Faults | None = None, *, init: str | None = None) -> Run:
    """Open a run of the two-clock diffusion transformer.

    Args:
      config: with the groups of configs/sfd.py.
      found: faults found so far.
      init: checkpoint with the weights to start from.

    Raises:
      SfdError: values are unknown or contradict each other, or the latents do not fit; all faults are named.
    """
    found, notes = Faults() if found is None else found, []
    if "probe" in config:
        raise SfdError(
            "the clocks are not learned yet: `with_learned_clocks` of experiment/learned_clocks.py does that"
        )
    if None in (config.model.num_classes, config.model.input_size):
        with found:
            config = completed(config, open_source(config.data.path, repa=False))
        found.stop()
    for part in (build.layout_from_config, build.network_from_config, build.diffusion_settings, build.task_from_config):
        with found:
            part(config)
    with found:
        train = build.train_config(config)
    with found:
        repa = config.loss.repa_weight > 0 and config.data.repa_source == "stored"
        check_repa_source(config)
    needed = {"semvae": config.data.semantic_vae, "online": config.data.visual_encoder}.get(config.data.repa_source)
    for checkpoint in filter(None, (init, needed)):
        with found:
            find_checkpoint(checkpoint)
    preview = preview_config(config, found)
    if config.model.repa_features and not config.loss.repa_weight:
        notes.append("loss.repa_weight=0 leaves REPA's projector untrained; --config.model.repa_features=0 removes it")
    with found:
        latents = open_source(config.data.path, repa=False)
        config, tiles = with_tile_grid(config, latents)
        notes += check_data(config, latents, found, repa=repa) + tiles
        found += check_labels(latents, config.model.num_classes)
        notes += unused_classes(config.model.num_classes, latents)
    found.stop()
    layout, latents = build.layout_from_config(config), open_source(config.data.path, repa=repa)
    source, targets = open_targets(config, layout, latents)
    task, clocks = build.task_from_config(config, targets), build.diffusion_settings(config)["clocks"]
    params = None
    if init:
        notes += check_diffusion_init(init, task.network, clocks, layout, source)
        params = load_init(init, task.network, clocks, config.seed)
    statistics, origin = used_parts(layout, source)
    metadata = {"latent_statistics": statistics.to_dict(), "class_names": source.class_names}
    metadata |= {"latents": origin, "registered_in": build.registered_in(config)}
    transform = latent_transform(layout, statistics, repa=repa)
    checks = functools.partial(_check_latents, config, latents, repa)
    more = dict(params=params, notes=tuple(notes), checks=checks, preview=preview)
    return Run(task, train, config, source, transform, metadata, **more)


def _check_latents(config: ConfigDict, latents: Any, repa: bool) -> list[str]:
    """Return the faults of all records."""
    wanted = {"num_classes": config.model.num_classes, "flips": config.data.flips}
    if isinstance(latents, LatentStore):
        return check_store(config.data.path, repa=repa, **wanted)
    return check_released(latents, **wanted)


def open_semantic_vae(
    config: ConfigDict, found: Faults | None = None, *, init: str | None = None, features: Any = None
) -> Run:
    """Open a run of the Semantic VAE.

    Args:
      config: with the groups of configs/semantic_vae.py.
      found: faults found so far.
      init: checkpoint whose weights to start from.
      features: records with `repa_features` (N, F) to train on, instead of those in `config.data`.

    Raises:
      SfdError: values are unknown or contradict each other, or the features do not fit; all faults are named.
    """
    found, data = Faults() if found is None else found, config.data
    network, loss, train = _network_loss_train("semantic_vae", config, SemanticVAELoss, found)
    maker, transform, held_out = None, feature_transform, None
    with found:
        if data.visual_encoder and (data.path or data.held_out_path):
            raise SfdError(
                "data.visual_encoder makes features from data.images, so data.path and data.held_out_path "
                "have no effect: give one or the other"
            )
        elif data.visual_encoder:
            source, held_out, maker, tokens = _open_images(config)
            transform, weights = pixel_transform, {"visual": params_hash(maker.params)}
        elif data.path or features is not None:
            source = open_latents(data.path, repa=True) if features is None else features
            held_out = open_latents(data.held_out_path, repa=True) if data.held_out_path else None
            weights = _visual(source)
            tokens, width = source[0]["repa_features"].shape
            if width != config.model.input_dim:
                found.append(
                    f"the features are {width} wide, but model.input_dim={config.model.input_dim}: "
                    f"--config.model.input_dim={width}"
                )
            others = {"weights": _visual(held_out)} if held_out else None
            if differing := other_makers(others, {"weights": weights}):
                raise SfdError(
                    f"the held-out features are of another encoder than the training features: {differing[0]}"
                )
        else:
            raise SfdError(
                "give features, --config.data.path=FOLDER made by `sfd extract --repa`; or images and an encoder to "
                "make them, --config.data.visual_encoder=CKPT --config.data.images.path=IMAGES"
            )
    if not found and loss.classification_weight > 0:
        found += check_labels(source, loss.num_classes, "loss.num_classes")
    found.stop()
    measure = functools.partial(measure_semantic_vae, network, source=maker)
    metadata = {"latents": {"weights": weights, "tokens": tokens}}  # encoder and number of the features
    task = semantic_vae_task(network, loss, maker)
    params, notes = _first_params(init, task, config.seed, {"weights": weights})
    held_out = (measure, held_out) if held_out else None
    return Run(task, train, config, source, transform, metadata, params=params, notes=notes, held_out=held_out)


def _first_params(
    init: str | None, task: Task, seed: int, made_from: dict | None = None
) -> tuple[dict | None, tuple[str, ...]]:
    """Return the parameters that --init's checkpoint gives a task, with drawn heads, and notes on it."""
    if not init:
        return None, ()
    _, notes = check_init(init, task.network, made_from)
    params, key = load_params(init, abstract=task.network.abstract_params())[0], jax.random.key(seed)
    if "heads" in task.abstract_params:
        params = {"network": params, "heads": jax.jit(lambda key: task.init(key)["heads"])(key)}
    return params, tuple(notes)


def _visual(latents: Any) -> dict[str, str]:
    """Return the hash of the encoder that made a source's features, if known."""
    return {name: digest for name, digest in latents.origin["weights"].items() if name == "visual"}


def _open_images(config: ConfigDict) -> tuple[ImageSource, ImageSource | None, FrozenFeatures, int]:
    """Return training images, held-out ones or None, the module that makes features, and the tokens per image."""
    images = config.data.images
    network, params = open_frozen(config.data.visual_encoder, ENCODERS, config.model.compute_dtype)
    if network.config.feature_width != config.model.input_dim:
        raise SfdError(
            f"model.input_dim={config.model.input_dim}, but data.visual_encoder={config.data.visual_encoder} "
            f"makes features of {network.config.feature_width}"
        )
    if (size := trained_size(load_metadata(config.data.visual_encoder))) not in (None, config.data.view_size):
        raise SfdError(
            f"data.visual_encoder={config.data.visual_encoder} was trained on images of {size} px and would see "
            f"{config.data.view_size} px here: --config.data.images.image_size={size} --config.data.view_size={size}"
        )
    encoder = VisualEncoder(network, Tiling.whole(images.image_size, config.data.view_size, network))
    split = lambda name: _kept(open_images(images.kind, images.path, name, images.image_size), config)
    held_out = split(images.held_out_split) if images.held_out_split else None
    return split(images.split), held_out, online_features(encoder, params), encoder.tiling.grid**2


def open_texture_vae(config: ConfigDict, found: Faults | None = None, *, init: str | None = None) -> Run:
    """Open a run of the texture VAE.

    Args:
      config: with the groups of configs/texture_vae.py.
      found: faults found so far.
      init: checkpoint whose weights to start from.

    Raises:
      SfdError: values are unknown or contradict each other, or there are no images; all faults are named.
    """
    found, data = Faults() if found is None else found, config.data
    network, loss, train = _network_loss_train("texture_vae", config, TextureVAELoss, found)
    perceptual = frozen = held_out = None
    with found:
        if network:
            check_divides(data.image_size, network.config.downsampling, "the texture VAE's downsampling")
    with found:
        if config.lpips and not config.loss.perceptual_weight:
            raise SfdError("lpips has no effect with loss.perceptual_weight=0: leave one of them out")
        if config.lpips:
            lpips, frozen = open_frozen(config.lpips, "lpips", config.model.compute_dtype)
            perceptual = lambda ours, theirs, params: lpips.apply(params, ours, theirs)
    with found:
        source = _images_of(config, data.split)
    with found:
        if data.held_out_split and not found:
            measure = functools.partial(measure_texture_vae, network)
            held_out = measure, _images_of(config, data.held_out_split)
    found.stop()
    task = texture_vae_task(network, loss, perceptual, frozen)
    params, notes = _first_params(init, task, config.seed)
    metadata = {"class_names": source.class_names}
    return Run(task, train, config, source, pixel_transform, metadata, params=params, notes=notes, held_out=held_out)


def open_visual_encoder(config: ConfigDict, found: Faults | None = None, *, init: str | None = None) -> Run:
    """Open a run of a small visual encoder on labelled images.

    Args:
      config: with the groups of configs/visual_encoder.py.
      found: faults found so far.
      init: checkpoint whose weights to start from.

    Raises:
      SfdError: values are unknown or contradict each other, or there are no images; all faults are named.
    """
    found, data, held_out = Faults() if found is None else found, config.data, None
    with found:
        source = _images_of(config, data.split)
        if config.loss.num_classes is None:
            config = config.copy_and_resolve_references()
            config.loss.num_classes = len(source.class_names)
    if config.loss.num_classes is None:
        found.stop()
    network, loss, train = _network_loss_train("dinov2", config, VisualEncoderLoss, found)
    with found:
        if data.get("held_out_split") and not found:
            held_out = _images_of(config, data.held_out_split)
            if held_out.class_names != source.class_names:
                raise SfdError(
                    f"the held-out images have the classes {', '.join(held_out.class_names)}, the training images "
                    f"{', '.join(source.class_names)}: give both splits the same class folders"
                )
            held_out = functools.partial(measure_visual_encoder, network), held_out
    if not found:
        found += check_labels(source, loss.num_classes, "loss.num_classes")
    found.stop()
    task = visual_encoder_task(network, loss)
    params, notes = _first_params(init, task, config.seed)
    metadata = {"class_names": source.class_names}
    return Run(task, train, config, source, pixel_transform, metadata, params=params, notes=notes, held_out=held_out)


def _images_of(config: ConfigDict, split: str) -> ImageSource:
    data = config.data
    if not data.path and data.kind not in IN_PACKAGES:
        raise SfdError("give the images: --config.data.path=IMAGES")
    return _kept(open_images(data.kind, data.path, split, data.image_size), config)


def _kept(source: ImageSource, config: ConfigDict) -> ImageSource:
    """Keep a small set in memory once decoded, unless several processes would each keep all of it."""
    if not config.data.workers:
        source.keep()
    return source


def _network_loss_train(name: str, config: ConfigDict, loss: type, found: Faults) -> tuple[Network, Any, TrainConfig]:
    """Build network, loss and TrainConfig; a part with faults is None."""
    made = [None, None, None]
    with found:
        made[0] = Network(name, config.model.to_dict())
    with found:
        made[1] = from_group(loss, config.loss, "config group 'loss'")
    with found:
        made[2] = build.train_config(config)
    return tuple(made)
