"""The flags by which `sfd sample` and `sfd evaluate --live` say what to sample."""

import argparse

from sfd_jax.cli.flags import local_path, path
from sfd_jax.ranges import Only

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
