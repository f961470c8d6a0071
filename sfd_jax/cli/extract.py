"""Encode images to latent shards with statistics, or convert released shards to ours.

  sfd extract --images=folder --path=IMAGENET --split=train --out=DIR
      --texture_vae=CKPT --visual=CKPT --semantic_vae=CKPT
      encode every image and its mirror image: texture and semantic latents
  sfd extract ... --pca=8
      semantic latents from principal components, fitted first, instead of a Semantic VAE
  sfd extract --repack=FOLDER --out=DIR
      convert latents_rankRR_shardNNN.safetensors to our shards, without encoding
  sfd extract ... --check
      look for faults in seconds before a long job; write nothing

A folder or tar holds class folders (or class tars), directly or in a folder named like the split. Labels number the
sorted names; if all names are numbers, they are the labels. Hidden entries are skipped; anything else that is not a
class is refused. Images of more than 89,478,485 pixels count as broken; sfd_jax/data/decoding.py describes the
handling of transparency, animations and grey of more than 8 bits.

CKPT is a folder made by `sfd convert` or a training command. Without --visual only texture latents are made.
The visual encoder gets 512 px images as quarters of 256 px, as released; with --tile_size=512 in one view, which
it sees at 448 px (patch size 14) or 512 px (16). Training reads this choice from the latents.

Shards, their manifest and the statistics are written to DIR. After a kill, the same command continues after the
last finished shard. On several hosts, start the same command on all of them: they divide the shards; DIR must be
one shared folder.
"""

import argparse
import dataclasses

import numpy as np

from sfd_jax.cli.flags import command_parser, local_path, parse_command, path
from sfd_jax.data.checks import check_images, check_writable
from sfd_jax.data.extract import ExtractConfig, bytes_per_image, repack, repack_plan
from sfd_jax.data.images import open_images
from sfd_jax.data.latent_store import LatentStore, Plan
from sfd_jax.data.released import ReleasedLatents
from sfd_jax.distributed import hosts
from sfd_jax.distributed.heartbeat import Heartbeat
from sfd_jax.distributed.lock import FolderLock
from sfd_jax.distributed.preflight import Job
from sfd_jax.errors import Faults, SfdError
from sfd_jax.experiment.checkpoints import trained_size
from sfd_jax.experiment.extraction import extract_latents, job_share, open_encoder, planned_latents, repack_statistics
from sfd_jax.ranges import IN_PACKAGES, Only
from sfd_jax.settings import flags_from, from_args
from sfd_jax.training import load_metadata

# The only settings with an effect on --repack.
REPACKED = ("repa", "dtype", "shard_size", "workers")


def main(argv: list[str]) -> int:
    """Extract, repack or check."""
    args = _parse(argv)
    config = from_args(ExtractConfig, args)
    if args.repack:
        return _repack(args, config)
    if not (args.images and args.texture_vae):
        raise SfdError("give --images and --texture_vae (or --repack)")
    return _extract(args, config)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = command_parser("extract", __doc__)
    flag = parser.add_argument
    flag("--out", type=local_path, required=True, help="folder of the latent shards")
    flag("--images", help="folder, tar, tfds, digits or mnist")
    flag("--path", type=local_path, default="", help="the folder, the tar, or the name of the TFDS data set")
    flag("--split", default="train", help="folder in PATH; --split= reads PATH itself (default: %(default)s)")
    flag("--texture_vae", type=path, metavar="CKPT", help="checkpoint of the texture VAE")
    flag("--visual", type=path, metavar="CKPT", help="checkpoint of the visual encoder")
    flag("--semantic_vae", type=path, metavar="CKPT", help="checkpoint of the Semantic VAE")
    flags_from(ExtractConfig, parser)
    flag("--expect_count", type=int, help="with --check: the expected number of images (known for ImageNet)")
    flag("--repack", type=local_path, metavar="FOLDER", help="folder of released shards, instead of images")
    flag(
        "--statistics",
        choices=("released", "measured"),
        default="released",
        help="with --repack: take *_stats.pt, which belong to the released weights, or measure",
    )
    flag("--check", action="store_true", help="only look for faults")
    settings = [field.name for field in dataclasses.fields(ExtractConfig) if field.name not in REPACKED]
    rules = (
        Only("statistics", "repack"),
        Only(" ".join(["images path split texture_vae visual semantic_vae", *settings]), "repack", never=True),
        Only("path", "images", IN_PACKAGES, never=True),
        Only("visual", "semantic_vae pca", hint="its features are compressed by one of them"),
        Only("semantic_vae pca repa", "visual repack"),
        Only("pca", "semantic_vae", never=True),
        Only("pca_images", "pca"),
        Only("semantic_posterior", "semantic_vae"),
        Only("tile_size", "visual"),
        Only("expect_count", "check"),
    )
    return parse_command(parser, argv, rules=rules)


def _extract(args: argparse.Namespace, config: ExtractConfig) -> int:
    source = open_images(args.images, args.path, args.split, config.image_size)
    paths = {name: getattr(args, name) for name in ("texture_vae", "visual", "semantic_vae")}
    hosts.start(Job({"flags": vars(args), "images": len(source)}, args.out, needs=tuple(paths.values())))
    if "image_size" not in args.given and (size := trained_size(load_metadata(args.texture_vae))):
        hosts.say(f"note: images of {size} px, since --texture_vae was trained on such")
        config, source.image_size = dataclasses.replace(config, image_size=size), size
    opened = open_encoder(config, paths)
    for note in (*source.notes, *opened.notes):
        hosts.say(f"note: {note}")
    if args.check:
        counts = {"expected_count": args.expect_count, "max_broken": config.max_broken}
        found = Faults(check_images(source, split=args.split, **counts))
        return _checked(found, args.out, planned_latents(source, opened, config))
    hosts.say(_summary(extract_latents(source, opened, config, args.out, {"images": args.images, "split": args.split})))
    return 0


def _repack(args: argparse.Namespace, config: ExtractConfig) -> int:
    source, statistics, found = ReleasedLatents(args.repack, repa=config.repa), None, Faults()
    with found:
        statistics = repack_statistics(source, args.statistics)
    if not args.check:
        found.stop()
        hosts.start(Job({"flags": vars(args), "images": len(source)}, args.out))
    for note in source.notes:
        hosts.say(f"note: {note}")
    if args.check:
        if args.expect_count is not None and len(source) != args.expect_count:
            found.append(f"the released shards hold {len(source):,} images, not {args.expect_count:,}")
        return _checked(found, args.out, repack_plan(source, config, statistics))
    with FolderLock(args.out), Heartbeat(args.out, "extract"):
        store = repack(source, args.out, config, statistics=statistics, share=job_share())
    hosts.say(_summary(store))
    return 0


def _checked(found: Faults, out: str, plan: Plan) -> int:
    """Print the size of a plan, and raise SfdError with all faults if there are any."""
    image = bytes_per_image(plan)
    print(f"{plan.total:,} images, {image:,} bytes each: {plan.total * image / 1e9:.2f} GB in all")
    found += check_writable(out, image * plan.total)
    found.stop()
    print("no faults found")
    return 0


def _summary(store: LatentStore) -> str:
    manifest = store.manifest
    size = sum(shard["bytes"] for shard in store.shards)
    lines = [
        f"{len(store):,} images in {len(store.shards)} shards, {size / 1e9:.3f} GB, "
        f"{size / max(1, len(store)):,.0f} bytes per image: {store.directory}"
    ]
    if other := _unlike(manifest):
        lines.append(f"note: {other}")
    lines += [f"skipped {fault['name']}: {fault['reason']}" for fault in manifest["skipped"]]
    return "\n".join(lines)


def _unlike(manifest: dict) -> str:
    """Return a note if released statistics do not fit the latents they came with, else ""."""
    for group in ("texture", "semantic"):
        mean, std, true_mean, true_std = (
            np.array(manifest[kind][f"{group}_{name}"])
            for kind in ("statistics", "measured_statistics")
            for name in ("mean", "std")
        )
        shift, ratio = np.abs(true_mean - mean) / std, true_std / std
        if shift.size and (shift.max() > 1 or ratio.max() > 2 or ratio.min() < 0.5):
            return (
                f"the released {group} statistics are not those of these latents: normalised by them, channels have "
                f"means up to {shift.max():.2g} from 0 and standard deviations from {ratio.min():.2g} to "
                f"{ratio.max():.2g}"
            )
    return ""
