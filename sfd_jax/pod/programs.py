"""Programs of a pod, traced from shapes alone: the jitted functions of the other packages, not copies."""

import functools

import jax
import numpy as np
from jax.sharding import Mesh

from sfd_jax.distributed import batch_sharding, replicated
from sfd_jax.distributed.sharding import put_same
from sfd_jax.evaluation.features import inception_extractor, trace_features
from sfd_jax.generation import Clocks, SampleConfig
from sfd_jax.generation.sampler import Sampler
from sfd_jax.latents import LatentLayout, LatentStatistics
from sfd_jax.models import Network
from sfd_jax.models.encoders import Tiling, VisualEncoder, released_encoder
from sfd_jax.models.latent_encoder import LatentEncoder, jit_encoder
from sfd_jax.training import Task, TrainConfig, make_optimizer
from sfd_jax.training.frozen_features import FrozenFeatures, online_features, semvae_features
from sfd_jax.training.step import trace_train_step


def trace_training(task: Task, config: TrainConfig, mesh: Mesh, batch: dict) -> jax.stages.Traced:
    """Trace the training step of `fit`; arguments as for `trace_train_step`."""
    return trace_train_step(task, make_optimizer(config.optimizer, config.steps), config, mesh, batch)


def training_batch(network: Network, rows: int, *, repa_source: str, image_size: int) -> dict:
    """Return the shapes of a global batch, as `latent_transform` makes them.

    Args:
      network: a "lightning_dit".
      rows: global batch size.
      repa_source: batches have features with "stored", pixels with "online", otherwise neither.
      image_size: of the pixels.
    """
    dit = network.config
    shapes = {
        "latents": ((dit.input_size, dit.input_size, dit.in_channels), np.float32),
        "labels": ((), np.int32),
    }
    if repa_source == "stored":
        tokens = (dit.input_size // dit.patch_size) ** 2
        shapes["repa_features"] = ((tokens, dit.repa_features), np.float16)
    if repa_source == "online":
        shapes["pixels"] = ((image_size, image_size, 3), np.uint8)
    return {name: jax.ShapeDtypeStruct((rows, *shape), dtype) for name, (shape, dtype) in shapes.items()}


def training_targets(
    network: Network, layout: LatentLayout, *, repa_source: str, image_size: int, tile_grid: int
) -> FrozenFeatures | None:
    """Return the module that makes REPA's targets inside the step, with shapes for parameters, or None."""
    dit = network.config
    dtype = dit.compute_dtype
    if repa_source == "semvae":
        vae = semantic_vae(layout, input_dim=dit.repa_features, compute_dtype=dtype)
        return semvae_features(vae, vae.abstract_params(), layout, blank_statistics(layout), tile_grid)
    if repa_source == "online":
        tiling = Tiling.of_latents(image_size, dit.input_size, tile_grid)
        visual = VisualEncoder(released_encoder(compute_dtype=dtype), tiling)
        return online_features(visual, visual.network.abstract_params())
    return None


def trace_sampling(
    model: Network,
    weak: Network | None,
    layout: LatentLayout,
    clocks: Clocks,
    config: SampleConfig,
    mesh: Mesh,
    rows: int,
    decoding: bool = False,
) -> jax.stages.Traced:
    """Trace a program of `Sampler` for `rows` samples over all devices: sampling, or with `decoding` the decoder."""
    vae = texture_vae(layout)
    sampler = Sampler(
        (model, model.abstract_params()),
        (vae, vae.abstract_params()),
        weak=weak and (weak, weak.abstract_params()),
        layout=layout,
        statistics=blank_statistics(layout),
        clocks=clocks,
        config=config,
        mesh=mesh,
    )
    return sampler.trace_decoding(rows) if decoding else sampler.trace(rows)


def trace_extraction(encoder: LatentEncoder, mesh: Mesh, rows: int, image_size: int) -> jax.stages.Traced:
    """Trace the program of `sfd extract` on one host, for a batch of `rows` images."""
    params = {name: network.abstract_params() for name, network in encoder.networks.items()}
    split = batch_sharding(mesh)
    pixels = jax.ShapeDtypeStruct((rows, image_size, image_size, 3), np.uint8, sharding=split)
    index = jax.ShapeDtypeStruct((rows,), np.int32, sharding=split)
    return jit_encoder(encoder, mesh).trace(put_same(params, replicated(mesh)), pixels, index)


def trace_inception(mesh: Mesh, rows: int, image_size: int) -> jax.stages.Traced:
    """Trace the Inception features of `sfd evaluate` for `rows` images over all devices."""
    metadata = {"network": "inception", "network_config": {}}
    extractor = inception_extractor((inception().abstract_params(), metadata))
    return trace_features([extractor], image_size, batch_size=rows, mesh=mesh)


# --- Networks other than the diffusion model, as released ------------------------------------------------------


def extraction_networks(layout: LatentLayout) -> dict[str, Network]:
    """Return the networks of an extraction, by their names in `sfd extract`."""
    if not layout.semantic_channels:
        return {"texture_vae": texture_vae(layout)}
    visual = released_encoder()
    semantic = semantic_vae(layout, input_dim=visual.config.feature_width)
    return {"texture_vae": texture_vae(layout), "visual": visual, "semantic_vae": semantic}


def inception() -> Network:
    return Network("inception", {})


def texture_vae(layout: LatentLayout) -> Network:
    if layout.texture_channels == 4:  # DiT's, Stability's f8
        return Network("texture_vae", {"z_channels": 4, "ch_mult": (1, 2, 4, 4), "attention_levels": ()})
    return Network("texture_vae", {"z_channels": layout.texture_channels})


def semantic_vae(layout: LatentLayout, **overrides) -> Network:
    return Network("semantic_vae", {"bottleneck_dim": layout.semantic_channels, **overrides})


@functools.cache
def blank_statistics(layout: LatentLayout) -> LatentStatistics:
    """Return statistics of mean 0 and std 1; programs do not depend on their values."""
    parts = {"texture": layout.texture_channels, "semantic": layout.semantic_channels}
    fields = {}
    for name, channels in parts.items():
        fields |= {f"{name}_mean": np.zeros(channels, np.float32), f"{name}_std": np.ones(channels, np.float32)}
    return LatentStatistics(**fields)
