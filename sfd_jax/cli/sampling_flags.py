"""The sampling flags of `sfd sample` and `sfd evaluate --live`."""

import argparse

from sfd_jax.cli.flags import local_path, path
from sfd_jax.diffusion.sample_config import SampleConfig, SampleJob
from sfd_jax.ranges import Only
from sfd_jax.settings import defaults_of, flags_from

SAMPLING_RULES = (Only("weak_step", "weak"),)
# Flags that only affect sampling; the others have further uses in `sfd evaluate`.
ONLY_SAMPLING = " ".join(
    ["checkpoint weak step weak_step latent_store dtype", *(name for name in defaults_of(SampleJob) if name != "num")]
)


def add_sampling_flags(parser: argparse.ArgumentParser, required: bool) -> None:
    """Add the flags; `required` makes --checkpoint and --texture_vae required."""
    which = parser.add_argument_group("models")
    flag = which.add_argument
    flag(
        "--checkpoint",
        type=path,
        required=required,
        metavar="DIR",
        help="a run's work folder, or a converted or trained checkpoint of the diffusion model",
    )
    flag(
        "--texture_vae", type=path, required=required, metavar="DIR", help="checkpoint of the texture VAE, the decoder"
    )
    flag("--weak", type=path, metavar="DIR", help="checkpoint of AutoGuidance's weaker model")
    flag(
        "--other_texture_vae",
        action="store_true",
        help="allow a --texture_vae that did not make the model's latents, e.g. with a finetuned decoder",
    )
    flag("--step", type=int, help="step of the checkpoint (default: the newest)")
    flag("--weak_step", type=int, help="step of the --weak checkpoint (default: the newest)")
    flag(
        "--weights",
        choices=("ema", "raw"),
        default="ema",
        help="EMA or raw parameters, if a checkpoint holds both (default: %(default)s)",
    )
    flag(
        "--latent_store",
        type=local_path,
        metavar="DIR",
        help="latent shards whose statistics to use if the checkpoint has none",
    )
    flag(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="dtype of the diffusion model's matmuls (default: the checkpoint's)",
    )

    how = set(defaults_of(SampleConfig))
    images = parser.add_argument_group("images")
    flags_from(SampleJob, images, only=set(defaults_of(SampleJob)) - how, under="the checkpoint's")
    images.add_argument(
        "--seed", type=int, default=0, help="sample i depends on this seed and i alone (default: %(default)s)"
    )
    how_group = parser.add_argument_group("solver and guidance", "with --weak, --guidance is autoguidance by default")
    flags_from(SampleJob, how_group, only=how, under="the checkpoint's")

    where = parser.add_argument_group("devices")
    where.add_argument(
        "--fsdp",
        type=int,
        default=1,
        help="shard the parameters over this many devices, if one cannot hold them (default: %(default)s)",
    )
