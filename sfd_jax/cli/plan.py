"""Estimate memory, time, chip-hours and storage of a training run on a TPU slice.

  sfd plan --config=configs/sfd.py:xl --topology=v5e:4x4
  sfd plan --config=configs/sfd.py:1p6b --topology=v4:4x4x4 --utilisation=0.5

The training step is compiled ahead of time, without a TPU (see `sfd compile_pod --help`): memory and FLOPs are the
compiler's. Times are estimates: FLOPs divided by a fraction (--utilisation) of the chips' peak rate, without start,
evaluation, checkpoints and interruptions. Exit status 1 if the step does not fit.
"""

from sfd_jax.cli.compile_pod import add_topology_flags, measured, write_json
from sfd_jax.cli.flags import command_parser, parse_command


def main(argv: list[str]) -> int:
    """Compile the step and print the plan of the run."""
    parser = command_parser("plan", __doc__)
    add_topology_flags(parser)
    flag = parser.add_argument
    flag(
        "--utilisation",
        type=float,
        default=0.4,
        help="assumed fraction of the peak matrix rate that the step reaches (default: %(default)s)",
    )
    flag("--images", type=int, default=None, help="number of images in the data set (default: ImageNet's training set)")
    args = parse_command(parser, argv, config="configs/sfd.py:xl")

    from sfd_jax.pod import make_plan, table
    from sfd_jax.pod.plan import IMAGENET_TRAIN, plan_table

    config = args.config
    step = measured(args, "train")
    if not step.memory:
        print(table(step))
        write_json(args.json, {"step": step.to_dict()})
        return 1
    size, stored = config.model.input_size, config.loss.repa_weight > 0 and config.data.repa_source == "stored"
    plan = make_plan(
        step,
        utilisation=args.utilisation,
        images=args.images or IMAGENET_TRAIN,
        texture_shape=(size, size, config.latents.texture_channels),
        semantic_shape=(size, size, config.latents.semantic_channels),
        repa_shape=((size // config.model.patch_size) ** 2, config.model.repa_features) if stored else None,
        keep_last=config.train.keep_last,
        keep_every=config.train.keep_every,
    )
    print(plan_table(plan))
    if not step.fits:
        print("the step does not fit into the chip's memory")
    write_json(args.json, plan.to_dict())
    return 0 if step.fits else 1
