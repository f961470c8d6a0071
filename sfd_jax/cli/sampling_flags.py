"""The flags by which `sfd sample` and `sfd evaluate --live` say what to sample, and what they open."""

import argparse
import dataclasses

import numpy as np

from sfd_jax.cli.flags import local_path, path
from sfd_jax.errors import Faults, SfdError
from sfd_jax.ranges import RULES, Only, useless

SAMPLING_RULES = (Only("weak_step", "weak"),)
# Flags that say nothing but how to sample; --texture_vae, --weights, --num, --seed and --fsdp say more in `sfd evaluate`.
ONLY_SAMPLING = (
    "checkpoint weak step weak_step latent_store dtype labels solver mode num_steps calls atol rtol timestep_shift "
    "guidance guidance_scale guidance_scale_semantic guidance_scale_texture guidance_interval_start "
    "guidance_interval_groups batch_size"
)


def add_sampling_flags(parser: argparse.ArgumentParser, required: bool) -> None:
    """Add the flags; `required` makes checkpoint and texture VAE obligatory."""
    which = parser.add_argument_group("what to sample from")
    flag = which.add_argument
    flag(
        "--checkpoint",
        type=path,
        required=required,
        metavar="DIR",
        help="a run's work folder, or a converted or trained checkpoint of the diffusion model",
    )
    flag(
        "--texture_vae", type=path, required=required, metavar="DIR", help="checkpoint of the texture VAE that decodes"
    )
    flag("--weak", type=path, metavar="DIR", help="checkpoint of AutoGuidance's weaker model")
    flag(
        "--other_texture_vae",
        action="store_true",
        help="--texture_vae is meant to be another one than made the model's latents, e.g. with a finetuned decoder",
    )
    flag("--step", type=int, help="which step's checkpoint (default: the newest)")
    flag("--weak_step", type=int, help="the same for --weak")
    flag(
        "--weights",
        choices=("ema", "raw"),
        default="ema",
        help="averaged or raw parameters, where a checkpoint holds both (default: %(default)s)",
    )
    flag(
        "--latent_store",
        type=local_path,
        metavar="DIR",
        help="latent shards whose statistics to use where the checkpoint holds none",
    )
    flag(
        "--dtype", choices=("float32", "bfloat16"), help="of the diffusion model's matmuls (default: the checkpoint's)"
    )

    images = parser.add_argument_group("which images")
    flag = images.add_argument
    flag(
        "--num",
        type=int,
        default=50_000 if required else None,
        help="N, how many" + (" (default: %(default)s)" if required else " (default: all there are; live 50000)"),
    )
    flag(
        "--labels",
        default="balanced",
        help="balanced (N/classes each, shuffled by a fixed seed), random, or classes by number or name: "
        "'207', '207,360', 'otter', or with ';' where names hold commas (default: %(default)s)",
    )
    flag("--seed", type=int, default=0, help="sample i is a function of this seed and i alone (default: %(default)s)")

    how = parser.add_argument_group("how")
    flag = how.add_argument
    flag("--solver", default="dopri5", help="dopri5, euler, heun, midpoint, rk4 or ab2 (default: %(default)s)")
    flag(
        "--mode",
        default="staged",
        help="staged: every stage of the clocks on its own; published: the released grid, masks and "
        "controller (default: %(default)s)",
    )
    flag(
        "--num_steps", type=int, default=100, help="grid points of the other solvers than dopri5 (default: %(default)s)"
    )
    flag(
        "--calls",
        type=int,
        default=0,
        help="network calls that the other solvers may take, instead of --num_steps (default: --num_steps counts)",
    )
    flag("--atol", type=float, default=1e-6, help="dopri5's absolute tolerance (default: %(default)s)")
    flag("--rtol", type=float, default=1e-3, help="dopri5's relative tolerance (default: %(default)s)")
    flag(
        "--timestep_shift",
        type=float,
        default=0.0,
        help="s of s u / (1 + (s - 1) u) on the normalised grid; 0 leaves it even (default: %(default)s)",
    )
    flag("--guidance", default=None, help="none, cfg or autoguidance (default: autoguidance with --weak, else none)")
    flag("--guidance_scale", type=float, help="needed with guidance; 1 would be none")
    flag(
        "--guidance_scale_semantic",
        type=float,
        help="AutoGuidance's scale of the semantic channels (default: the common one)",
    )
    flag("--guidance_scale_texture", type=float, help="the same of the texture channels")
    flag(
        "--guidance_interval_start",
        type=float,
        default=0.0,
        help="guide a group of channels once its clock has reached this; 0: always (default: %(default)s)",
    )
    flag(
        "--guidance_interval_groups",
        default="both",
        help="which groups heed the start: tex, sem or both (default: %(default)s)",
    )

    where = parser.add_argument_group("on what")
    flag = where.add_argument
    flag("--batch_size", type=int, default=16, help="images per device at once (default: %(default)s)")
    flag(
        "--fsdp",
        type=int,
        default=1,
        help="split the parameters over this many devices, where one cannot hold them (default: %(default)s)",
    )


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
