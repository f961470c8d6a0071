"""From the settings and checkpoints of an extraction to latent shards, or to the faults that would stop it."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from sfd_jax.data.extract import ExtractConfig, Share, extract, extract_plan
from sfd_jax.data.images import ImageSource, Tolerant
from sfd_jax.data.latent_store import LatentStore, Plan
from sfd_jax.data.pca import fit_pca, load_pca, save_pca
from sfd_jax.data.pipeline import make_eval_batches
from sfd_jax.data.released import ReleasedLatents, released_statistics
from sfd_jax.distributed import hosts
from sfd_jax.distributed.heartbeat import Heartbeat
from sfd_jax.distributed.lock import FolderLock
from sfd_jax.distributed.mesh import make_mesh
from sfd_jax.distributed.sharding import batch_sharding, replicated
from sfd_jax.errors import SfdError
from sfd_jax.experiment.checkpoints import open_checkpoint, trained_size
from sfd_jax.latents import LatentStatistics, other_makers
from sfd_jax.models import ENCODERS, Network
from sfd_jax.models.encoders import Tiling, VisualEncoder
from sfd_jax.models.fingerprint import params_hash
from sfd_jax.models.latent_encoder import LatentEncoder, jit_encoder
from sfd_jax.models.layers import check_divides
from sfd_jax.progress import ProgressBar
from sfd_jax.training.optimizer import average_notes


def make_encoder(networks: Mapping[str, Network], config: ExtractConfig) -> LatentEncoder:
    """Compose networks to the encoder of both groups of latents.

    Args:
      networks: "texture_vae"; "visual", absent for texture latents alone; "semantic_vae", absent for PCA.
      config: of the extraction.

    Raises:
      SfdError: networks or sizes do not fit each other.
    """
    texture, visual = networks["texture_vae"], networks.get("visual")
    check_divides(config.image_size, texture.config.downsampling, "the texture VAE's downsampling")
    if visual is not None:
        tiling = Tiling.of_pixels(config.image_size, config.tile_size, texture.config.downsampling)
        visual = VisualEncoder(visual, tiling)
    fields = ("texture_posterior", "semantic_posterior", "flips", "repa", "seed")
    shared = {name: getattr(config, name) for name in fields}
    return LatentEncoder(texture, visual, networks.get("semantic_vae"), **shared)


@dataclasses.dataclass(frozen=True)
class OpenEncoder:
    """An encoder with its weights.

    Attributes:
      encoder: the encoder.
      params: of its networks; "pca" is fitted later.
      checkpoints: source and step of each, for the manifest.
      notes: on the weights of the checkpoints.
    """

    encoder: LatentEncoder
    params: dict[str, Any]
    checkpoints: dict[str, dict]
    notes: list[str]


def open_encoder(config: ExtractConfig, paths: Mapping[str, str | None]) -> OpenEncoder:
    """Open the checkpoints of an extraction.

    Args:
      config: of the extraction.
      paths: checkpoints by the network names of `make_encoder`; None if there is none.

    Raises:
      SfdError: as `make_encoder`, or the Semantic VAE was trained on other features.
    """
    networks, params, metadata, notes = {}, {}, {}, []
    for name, path in paths.items():
        if path:
            kind = ENCODERS if name == "visual" else name
            opened = open_checkpoint(path, kind, flag=f"--{name}", weights=config.weights)
            networks[name], params[name], metadata[name] = opened
            seen = min(config.image_size, config.tile_size) if name == "visual" else config.image_size
            if (size := trained_size(metadata[name])) not in (None, seen) and name != "semantic_vae":
                notes.append(
                    f"{metadata[name]['given_as']} was trained on images of {size} px, but here they have {seen} px"
                )
            notes += average_notes(metadata[name])
    encoder = make_encoder(networks, config)
    if encoder.semantic is not None:
        trained_on, tokens = metadata["semantic_vae"].get("latents") or {}, encoder.visual.tiling.grid**2
        if differing := other_makers({"weights": {"visual": params_hash(params["visual"])}}, trained_on):
            raise SfdError(f"{metadata['semantic_vae']['given_as']} was trained on features of another {differing[0]}")
        # Other architectures process each token separately.
        if encoder.semantic.config.arch == "transformer" and trained_on.get("tokens") not in (None, tokens):
            wanted = math.isqrt(trained_on["tokens"]) * encoder.texture.config.downsampling
            raise SfdError(
                f"{metadata['semantic_vae']['given_as']} was trained on {trained_on['tokens']} tokens at once, but a "
                f"tile of {encoder.visual.tiling.tile_size} px has {tokens}: --tile_size={wanted} would do"
            )
    checkpoints = {name: {key: each.get(key) for key in ("source", "step")} for name, each in metadata.items()}
    return OpenEncoder(encoder, params, checkpoints, notes)


def local_mesh(batch_size: int) -> Mesh:
    """Return a mesh of this host's devices: each host encodes its own images.

    Raises:
      SfdError: the batch is no multiple of the devices.
    """
    devices = jax.local_devices()
    if batch_size % len(devices):
        raise SfdError(f"--batch_size={batch_size} must be a multiple of this host's {len(devices)} devices")
    return make_mesh(devices=devices)


def extract_latents(
    source: ImageSource, opened: OpenEncoder, config: ExtractConfig, out: str, about: Mapping[str, Any]
) -> LatentStore:
    """Encode a source into a latent store, on all hosts of a job, or continue an unfinished one.

    Args:
      source: the images.
      opened: the encoder.
      config: of the extraction.
      out: folder of the store.
      about: entries of the manifest on the source.

    Raises:
      SfdError: as `sfd_jax.data.extract.extract`.
    """
    mesh = local_mesh(config.batch_size)
    sharding, whole = batch_sharding(mesh), replicated(mesh)
    params = jax.device_put(opened.params, whole)
    jitted, done = jit_encoder(opened.encoder, mesh), itertools.count(1)

    def encode(pixels, index):
        if not isinstance(pixels, jax.core.Tracer):  # not when only shapes are traced
            heartbeat.at(next(done) * len(pixels))
        return jitted(params, pixels, index)

    with FolderLock(out), Heartbeat(out, "extract") as heartbeat:
        if config.pca:
            params["pca"] = jax.device_put(_pca(config, source, opened.encoder, params, out, sharding), whole)
        return extract(
            source,
            encode,
            out,
            config,
            about={**about, "checkpoints": opened.checkpoints},
            weights={name: params_hash(jax.device_get(tree)) for name, tree in params.items()},
            sharding=sharding,
            share=job_share(),
        )


def planned_latents(source: ImageSource, opened: OpenEncoder, config: ExtractConfig) -> Plan:
    """Return the plan of the store that `extract_latents` would write, without encoding.

    Raises:
      SfdError: parts do not fit each other, or there are no images.
    """
    local_mesh(config.batch_size)
    params = dict(opened.params)
    if config.pca:
        width = opened.encoder.visual.network.config.feature_width
        params["pca"] = {"mean": np.zeros(width, np.float32), "components": np.zeros((width, config.pca), np.float32)}
    return extract_plan(source, lambda pixels, index: opened.encoder(params, pixels, index), config, {}, {})


def job_share() -> Share:
    """Return which part of the shards is this host's, and whether it shows a progress bar."""
    # The timeout may be long, since JAX notices hosts that have died.
    barrier: Callable[[str], None] = functools.partial(hosts.barrier, timeout=24 * 3600.0)
    return Share(jax.process_index(), jax.process_count(), barrier, None if hosts.is_host0() else False)


def repack_statistics(source: ReleasedLatents, kind: str) -> LatentStatistics | None:
    """Read `*_stats.pt` beside released shards; return None to measure the statistics instead.

    Args:
      source: the shards.
      kind: "released" or "measured".
    """
    from sfd_jax.convert.weight_files import read_statistics

    if kind == "measured":
        return None
    try:
        return released_statistics(source, read_statistics)
    except SfdError as error:
        raise SfdError(f"{error}; or give --statistics=measured (which do not fit the released weights)") from error


def _pca(
    config: ExtractConfig,
    source: ImageSource,
    encoder: LatentEncoder,
    params: dict[str, Any],
    out: str,
    sharding: NamedSharding,
) -> dict[str, np.ndarray]:
    """Read the PCA in the output folder, or fit and save it on host 0; the same on every host."""
    path = Path(out) / "pca.npz"
    if not path.exists() and hosts.is_host0():
        path.parent.mkdir(parents=True, exist_ok=True)
        count = min(config.pca_images, len(source))
        # Evenly spaced images, since sources are ordered by class.
        indices = np.unique(np.linspace(0, len(source) - 1, count).round().astype(np.int64))
        how = {"batch_size": config.batch_size, "workers": config.workers}
        batches = make_eval_batches(Tolerant(source), indices=indices, **how)
        features = jax.jit(encoder.visual.features)

        def parts():
            with ProgressBar(desc="fit PCA", total=-(-len(indices) // config.batch_size), disable=None) as bar:
                for batch in batches:
                    tokens = features(params["visual"], jax.device_put(batch["pixels"], sharding))
                    yield np.asarray(tokens)[batch["mask"] & (batch["broken"] == "")]
                    bar.update()

        save_pca(path, fit_pca(parts(), config.pca))
    hosts.barrier("extract: PCA fitted", timeout=3600.0)
    pca = load_pca(path)
    hosts.say(f"PCA: {pca['components'].shape[1]} channels keep {pca['explained'].sum():.1%} of the variance")
    if pca["components"].shape[1] != config.pca:
        raise SfdError(f"{path} holds {pca['components'].shape[1]} channels, not {config.pca}; use another --out")
    return {name: pca[name] for name in ("mean", "components")}
