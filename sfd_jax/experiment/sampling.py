"""From the flags that say what to sample to a sampler and its labels."""

import argparse
import dataclasses

import numpy as np

from sfd_jax.errors import Faults, SfdError
from sfd_jax.ranges import RULES, Only, useless


def load_checkpoint(flag: str, directory: str, step: int | None = None, weights: str = "ema") -> tuple[dict, dict]:
    """Return (params, metadata) of the checkpoint that a flag names; messages about it will name the flag too."""
    from sfd_jax.training import load_params

    params, metadata = load_params(directory, step, weights)
    return params, {**metadata, "which": weights, "given_as": f"{flag}={directory}"}


def sample_config(args: argparse.Namespace):
    """Return the SampleConfig of the flags, before anything is opened.

    Raises:
      SfdError: missing flags, values outside their ranges, or flags without effect; all of them are named.
    """
    from sfd_jax.generation import SampleConfig

    found = Faults()
    if not (args.checkpoint and args.texture_vae):
        found.append("sampling needs --checkpoint and --texture_vae")
    guidance = args.guidance or ("autoguidance" if args.weak else "none")
    if guidance == "autoguidance" and not args.weak:
        found.append("--guidance=autoguidance needs a weaker model: add --weak=CKPT")
    values = vars(args) | {"guidance": guidance}
    rules = (*RULES["sample"], Only("weak", "guidance", ("autoguidance",)))
    found += useless(rules, values, args.given, "--{}".format).values()
    fields = {field.name: values[field.name] for field in dataclasses.fields(SampleConfig)}
    found.stop()
    return SampleConfig(**{name: value for name, value in fields.items() if value is not None})


def open_sampler(args: argparse.Namespace):
    """Open what the flags name.

    Returns:
      (sampler, labels (N,) int32, recipe dict, batch size over all devices).

    Raises:
      SfdError: as `sample_config`, or checkpoints that do not fit.
    """
    from sfd_jax.distributed import make_mesh
    from sfd_jax.generation import make_labels, make_sampler
    from sfd_jax.latents import other_makers

    config = sample_config(args)
    mesh = make_mesh(fsdp=args.fsdp)

    params, metadata = load_checkpoint("--checkpoint", args.checkpoint, args.step, args.weights)
    store = _open_store(args.latent_store)
    if store is not None:
        if differing := other_makers(store.origin, metadata.get("latents")):
            raise SfdError(
                f"--latent_store={args.latent_store} holds latents of another {differing[0]} than the checkpoint"
            )
        metadata = {**metadata, "latents": metadata.get("latents") or store.origin}
    sampler = make_sampler(
        (params, metadata),
        _load_texture_vae(args, metadata),
        config,
        weak=load_checkpoint("--weak", args.weak, args.weak_step, args.weights) if args.weak else None,
        seed=args.seed,
        statistics=store and store.statistics,
        compute_dtype=args.dtype,
        mesh=mesh,
        other_texture_vae=args.other_texture_vae,
    )
    num = 50_000 if args.num is None else args.num
    labels = make_labels(args.labels, num, sampler.num_classes, sampler.class_names, args.seed, sampler.labels)
    recipe = {**sampler.recipe, "labels": {"mode": args.labels, "hash": _hash(labels)}}
    batch_size = args.batch_size * mesh.size
    if config.mode == "published" and config.solver == "dopri5":
        recipe["batch_size"] = batch_size  # one step size for all of a batch, as released
    return sampler, labels, recipe, batch_size


def _load_texture_vae(args: argparse.Namespace, model: dict) -> tuple[dict, dict]:
    """Return the texture VAE; where it holds averaged and raw weights, those that made the model's latents."""
    from sfd_jax.generation.parts import made_latents
    from sfd_jax.models.fingerprint import params_hash

    given, wanted = load_checkpoint("--texture_vae", args.texture_vae, weights=args.weights), made_latents(model)
    if wanted is not None and params_hash(given[0]) != wanted:
        other = load_checkpoint("--texture_vae", args.texture_vae, weights={"ema": "raw", "raw": "ema"}[args.weights])
        return other if params_hash(other[0]) == wanted else given
    return given


def _open_store(latent_store: str | None):
    if latent_store is None:
        return None
    from sfd_jax.data.latent_store import LatentStore

    return LatentStore(latent_store)


def _hash(labels: np.ndarray) -> str:
    import hashlib

    return hashlib.sha256(np.ascontiguousarray(labels, np.int32).tobytes()).hexdigest()
