"""Make images from a checkpoint, on all devices of all hosts.

  sfd sample --checkpoint=DIR --texture_vae=DIR --out=DIR [--num=50000] [--labels=balanced] [--png]
  sfd sample --checkpoint=xl --weak=b --guidance_scale=1.5 --texture_vae=vae --out=samples_xl

The settings are those of the training config (`--config.sample.*` of `sfd train`), overridden by flags; they
are printed and stored in recipe.json.

The folder --out gets chunks as they are finished, then samples.npz (arr_0 images, arr_1 labels, as the ADM
suite reads them), grid.png and recipe.json; with --png also images/000000.png and so on. After a kill, the same
command makes the missing images. A folder with another recipe is refused. Sample i depends on --seed and i
alone: --batch_size, devices and hosts change nothing but float rounding (in --mode=released dopri5 has one step
size per batch, as released, so batch and chunk sizes are part of the recipe).
"""

from sfd_jax.cli.flags import command_parser, local_path, parse_command
from sfd_jax.cli.sampling_flags import SAMPLING_RULES, add_sampling_flags
from sfd_jax.experiment.sampling import check_flags, open_sampler


def main(argv: list[str]) -> int:
    """Run the job and write its outputs."""
    parser = command_parser("sample", __doc__)
    add_sampling_flags(parser, required=True)
    outputs = parser.add_argument_group("output")
    flag = outputs.add_argument
    flag("--out", type=local_path, required=True, metavar="DIR", help="folder of the job")
    flag(
        "--chunk_size",
        type=int,
        default=None,
        help="images per chunk, the most that a kill can lose (default: about 1,000)",
    )
    flag("--png", action="store_true", help="also write every sample as a PNG")
    flag("--no_npz", action="store_true", help="do not join the chunks to samples.npz")
    args = parse_command(parser, argv, rules=SAMPLING_RULES)
    check_flags(args)

    from sfd_jax import distributed
    from sfd_jax.distributed.heartbeat import Heartbeat
    from sfd_jax.distributed.lock import FolderLock
    from sfd_jax.distributed.preflight import Job
    from sfd_jax.generation import make_images, write_grid, write_pngs, write_samples_npz

    needs = (args.checkpoint, args.texture_vae, args.weak, args.latent_store)
    distributed.start(Job({"flags": vars(args)}, args.out, shared=False, needs=needs))
    sampler, labels, recipe, batch_size = open_sampler(args)
    for note in recipe["notes"]:
        distributed.say(f"note: {note}")

    def make(indices, labels):
        made = sampler(indices, labels, batch_size=batch_size)  # pads the last batch, to compile once
        heartbeat.at(int(indices[-1]) + 1)
        return made

    with FolderLock(args.out):
        with Heartbeat(args.out if distributed.is_host0() else None, "sample") as heartbeat:
            make_images(make, labels, args.out, recipe=recipe, batch_size=batch_size, chunk_size=args.chunk_size)
        if distributed.is_host0():
            written = [write_grid(args.out, sampler.class_names)]
            written += [] if args.no_npz else [write_samples_npz(args.out)]
            written += [write_pngs(args.out)] if args.png else []
            print(f"{len(labels)} images of {sampler.image_size} x {sampler.image_size}")
            for path in written:
                print(path)
    return 0
