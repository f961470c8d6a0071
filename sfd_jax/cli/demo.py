"""From real handwritten digits to new ones, on a laptop's processor, with nothing downloaded.

Trains every part of Semantic-First Diffusion on the 1,437 training digits that ship inside scikit-learn:
texture VAE, visual encoder, Semantic VAE, the two-clock diffusion model and a weaker one for
AutoGuidance; then makes 1,000 new digits and judges them. The work folder then holds samples.npz,
samples.png, stages.png, losses.png, metrics.json and report.md. Killed and started again, it goes on
from the last finished work and ends with the same samples.
"""

import os
from pathlib import Path

import jax

from sfd_jax.cli.flags import command_parser, local_path, parse_command
from sfd_jax.errors import needs_extra


def main(argv: list[str]) -> int:
    """Run the demo's stages that are not done yet."""
    parser = command_parser("demo", __doc__)
    parser.add_argument(
        "--workdir", type=local_path, default="demo_out", help="folder of the run (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, help="of everything drawn (default: the config's, 0)")
    args = parse_command(parser, argv, config="configs/digits.py")
    if args.seed is not None:
        args.config.seed = args.seed
    # Digits are small: the demo is for the processor, and gives there what README.md shows.
    if not os.environ.get("JAX_PLATFORMS"):
        jax.config.update("jax_platforms", "cpu")

    with needs_extra("demo", "the demo"):  # its pictures come last, minutes later
        import matplotlib  # noqa: F401

    from sfd_jax.distributed.lock import FolderLock
    from sfd_jax.experiment.demo import results, stages
    from sfd_jax.experiment.demo.record import DemoRecord

    workdir = Path(args.workdir).absolute()
    with FolderLock(workdir):
        demo = stages.Demo(args.config, workdir)
        record = DemoRecord(workdir, args.config.to_dict())
        record.run("texture_vae", "texture VAE: 32x32 pixels to 4x4 latents", lambda: stages.train_texture_vae(demo))
        record.run("encoder", "visual encoder, a small ViT with registers", lambda: stages.train_encoder(demo))
        of_features = "Semantic VAE on the encoder's patch features"
        record.run("semantic_vae", of_features, lambda: stages.train_semantic_vae(demo))
        record.run("latents", "training digits to latent shards with statistics", lambda: stages.extract(demo))
        record.run("diffusion", "two-clock diffusion model", lambda: stages.train_diffusion(demo, "diffusion"))
        record.run("weak", "weaker model for AutoGuidance", lambda: stages.train_diffusion(demo, "weak"))
        record.run("sample", "new digits", lambda: results.make_samples(demo))
        record.run("metrics", "judge them beside real ones", lambda: results.measure(demo))
        record.run("pictures", "samples.png, stages.png, losses.png", lambda: results.draw_pictures(demo))
        results.write_report(demo, record.stages)
    _print_summary(workdir, record.stages)
    return 0


def _print_summary(workdir: Path, stages: dict[str, dict]) -> None:
    print()
    for name, values in (
        ("samples", stages["metrics"]["samples"]),
        ("real training digits", stages["metrics"]["real"]),
    ):
        print(
            f"{name:<21} read as their label {values['read_as_label']:.1%}, Frechet distance "
            f"{values['frechet_distance']:.2f}, precision {values['precision']:.3f}, recall {values['recall']:.3f}"
        )
    seconds = sum(stage["seconds"] for stage in stages.values())
    print(f"\n{seconds:.0f} s in all. Look at {workdir / 'samples.png'}, then read {workdir / 'report.md'}.")
