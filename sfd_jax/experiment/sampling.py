"""From the flags of sampling to a sampler and its labels."""

import argparse
import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from sfd_jax.diffusion.sample_config import SampleConfig, SampleJob
from sfd_jax.errors import Faults, SfdError
from sfd_jax.experiment.checkpoints import open_checkpoint
from sfd_jax.ranges import RULES, Only, useless
from sfd_jax.settings import defaults_of, over_defaults, to_dict

if TYPE_CHECKING:
    from sfd_jax.generation import Sampler


def check_flags(args: argparse.Namespace) -> None:
    """Raise SfdError for faults of the flags that can be found without a checkpoint."""
    found = Faults()
    if not (args.checkpoint and args.texture_vae):
        found.append("sampling needs --checkpoint and --texture_vae")
        with found:
            sample_job(_given(args), {}, weak=args.weak)
    if args.guidance == "autoguidance" and not args.weak:
        found.append("--guidance=autoguidance needs a weaker model: add --weak=CKPT")
    found.stop()


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """Return the sampling settings among the flags that were given."""
    return {name: value for name in defaults_of(SampleJob) if (value := getattr(args, name)) is not None}


def sample_job(
    given: Mapping[str, Any], saved: Mapping[str, Any], *, weak: str | bool | None, flag: str = "--{}"
) -> tuple[SampleJob, list[str]]:
    """Return the saved settings of a checkpoint overridden by given ones, and notes on saved ones that were dropped.

    Saved settings are dropped if a given one contradicts them: `nfe` with --num_steps, the scales of one kind of
    guidance with another kind, and AutoGuidance without a weaker model.

    Args:
      given: settings by name.
      saved: the group `sample` of the checkpoint's config; empty if it has none.
      weak: AutoGuidance's weaker model, or whether there is one.
      flag: how messages call a setting, {} standing for its name.

    Raises:
      SfdError: values outside their ranges, or settings without effect; all of them are named.
    """
    notes, defaults, base = [], defaults_of(SampleJob), over_defaults(SampleJob, saved)
    guidance = given.get("guidance") or ("autoguidance" if weak else base["guidance"])
    if guidance == "autoguidance" and not weak:
        guidance = "none"
        notes.append(
            "the checkpoint's settings are for AutoGuidance, but no weaker model was given "
            f"({flag.format('weak')}=CKPT): these samples are without guidance"
        )
    if base["guidance"] not in ("none", guidance):
        of_other = {name: defaults[name] for name in base if name.startswith("guidance")}
        dropped = [f"{name}={base[name]}" for name in of_other if base[name] != defaults[name] and name not in given]
        if guidance == "autoguidance" and "guidance" not in given:
            notes.append(
                f"{flag.format('weak')} selects autoguidance; other settings of the checkpoint are dropped: "
                + " ".join(dropped)
            )
        base |= of_other
    if "num_steps" in given:
        base["nfe"] = None
    values = base | given | {"guidance": guidance}
    rules = (*RULES["sample"], Only("weak", "guidance", ("autoguidance",)))
    faults = useless(rules, values | {"weak": weak}, {*given, *(["weak"] if weak else [])}, flag.format)
    if {"guidance_scale", *(both := ("guidance_scale_semantic", "guidance_scale_texture"))} <= given.keys():
        scale, *others = map(flag.format, ("guidance_scale", *both))
        faults.setdefault("guidance_scale", f"{scale} has no effect beside {' and '.join(others)}")
    Faults(faults.values()).stop()
    return SampleJob.effective(values), notes


def open_sampler(args: argparse.Namespace) -> tuple["Sampler", np.ndarray, dict[str, Any], int]:
    """Open a sampler with the checkpoint's settings overridden by flags, and print the settings.

    Returns:
      (sampler, labels (N,) int32, recipe dict, batch size over all devices).

    Raises:
      SfdError: as `sample_job`, or checkpoints that do not fit.
    """
    from sfd_jax.data.latent_store import LatentStore
    from sfd_jax.distributed import make_mesh, say
    from sfd_jax.generation import make_labels, make_sampler
    from sfd_jax.latents import other_makers

    mesh = make_mesh(fsdp=args.fsdp)
    which = {"step": args.step, "weights": args.weights}
    params, metadata = open_checkpoint(args.checkpoint, "lightning_dit", flag="--checkpoint", **which).weights
    job, notes = sample_job(_given(args), (metadata.get("config") or {}).get("sample") or {}, weak=args.weak)
    say(f"sampling with {described(job)}")
    store = None
    if args.latent_store is not None:
        store = LatentStore(args.latent_store)
        if differing := other_makers(store.origin, metadata.get("latents")):
            raise SfdError(
                f"--latent_store={args.latent_store} holds latents of another {differing[0]} than the checkpoint"
            )
        metadata = {**metadata, "latents": metadata.get("latents") or store.origin}
    weak = None
    if args.weak:
        which["step"] = args.weak_step
        weak = open_checkpoint(args.weak, "lightning_dit", flag="--weak", **which).weights
    sampler = make_sampler(
        (params, metadata),
        open_texture_vae(args.texture_vae, metadata, args.weights),
        job,
        weak=weak,
        seed=args.seed,
        statistics=store and store.statistics,
        compute_dtype=args.dtype,
        mesh=mesh,
        other_texture_vae=args.other_texture_vae,
    )
    labels = make_labels(job.labels, job.num, sampler.num_classes, sampler.class_names, args.seed, sampler.labels)
    if sampler.class_names and job.labels not in ("balanced", "random"):
        names = (f"{label} ({sampler.class_names[label]})" for label in dict.fromkeys(labels.tolist()))
        say("classes: " + ", ".join(names))
    extra = {
        "labels": {"mode": job.labels, "hash": hashlib.sha256(labels.astype(np.int32).tobytes()).hexdigest()},
        "notes": notes + sampler.recipe["notes"],
    }
    recipe = {**sampler.recipe, **extra}
    batch_size = job.batch_size * mesh.size
    if job.mode == "released" and job.solver == "dopri5":
        recipe["batch_size"] = batch_size  # one step size per batch, as released
    return sampler, labels, recipe, batch_size


def described(job: SampleConfig) -> str:
    """Return the settings that have an effect, as "name=value name=value"."""
    values = to_dict(job)
    idle = useless(RULES["sample"], values, values)
    return " ".join(f"{name}={value}" for name, value in values.items() if value is not None and name not in idle)


def open_texture_vae(folder: str, model: dict, weights: str = "ema") -> tuple[dict, dict]:
    """Return the texture VAE; where it holds averaged and raw weights, those that made the model's latents.

    Args:
      folder: of its checkpoint.
      model: the diffusion model's metadata.
      weights: "ema" or "raw", where the metadata do not decide.
    """
    from sfd_jax.generation.parts import made_latents
    from sfd_jax.models.fingerprint import params_hash

    def load(weights: str) -> tuple[dict, dict]:
        return open_checkpoint(folder, "texture_vae", flag="--texture_vae", weights=weights).weights

    given, wanted = load(weights), made_latents(model)
    if wanted is not None and params_hash(given[0]) != wanted:
        other = load({"ema": "raw", "raw": "ema"}[weights])
        return other if params_hash(other[0]) == wanted else given
    return given
