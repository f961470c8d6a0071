"""Train a small visual encoder on images in class folders, to begin without DINOv2.

  sfd train_encoder --config=configs/visual_encoder.py:small --workdir=runs/encoder --config.data.path=IMAGES
  sfd train_encoder ... --config.data.held_out_split=val
      log the accuracy on IMAGES/val at each checkpoint
  sfd train_encoder ... --config.data.flips=False
      for letters, digits and other images that change their meaning when mirrored
  sfd train_encoder ... --init=CKPT
      start from the weights of another run, or from converted ones
  sfd train_encoder ... --check
      look for faults before a long job, without training

The network has the architecture of DINOv2. Linear classifiers of its class token and of its mean patch token learn the
labels; they are not saved. Give the work folder to `sfd extract --visual`, to `--config.data.visual_encoder` of
`sfd train_semvae` and `sfd train`, or to `sfd evaluate --dinov2`. Resuming and SIGTERM are as with `sfd train`.
"""

from sfd_jax.cli.flags import parse_training


def main(argv: list[str]) -> int:
    """Read the flags, then train or only look for faults."""
    args, found = parse_training("train_encoder", __doc__, argv, config="configs/visual_encoder.py")

    from sfd_jax.experiment.run import train_or_check
    from sfd_jax.experiment.training import open_visual_encoder

    open_run = lambda: open_visual_encoder(args.config, found, init=args.init)
    train_or_check(open_run, args.workdir, found, check=args.check, profile=args.profile)
    return 0
