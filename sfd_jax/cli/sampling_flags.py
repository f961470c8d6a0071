"""The flags by which `sfd sample` and `sfd evaluate --live` say what to sample."""

import argparse

from sfd_jax.cli.flags import local_path, path
from sfd_jax.diffusion.sample_config import SampleConfig, SampleJob
from sfd_jax.ranges import Only
from sfd_jax.settings import defaults_of, flags_from

SAMPLING_RULES = (Only("weak_step", "weak"),)
# Flags that say nothing but how to sample; in `sfd evaluate` the others say more.
ONLY_SAMPLING = " ".join(
    ["checkpoint weak step weak_step latent_store dtype", *(name for name in defaults_of(SampleJob) if name != "num")]
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

    how = set(defaults_of(SampleConfig))
    images = parser.add_argument_group("which images")
    flags_from(SampleJob, images, only=set(defaults_of(SampleJob)) - how, under="the checkpoint's")
    images.add_argument(
        "--seed", type=int, default=0, help="sample i is a function of this seed and i alone (default: %(default)s)"
    )
    how_group = parser.add_argument_group("how", "--guidance is by default autoguidance with --weak")
    flags_from(SampleJob, how_group, only=how, under="the checkpoint's")

    where = parser.add_argument_group("on what")
    where.add_argument(
        "--fsdp",
        type=int,
        default=1,
        help="split the parameters over this many devices, where one cannot hold them (default: %(default)s)",
    )
