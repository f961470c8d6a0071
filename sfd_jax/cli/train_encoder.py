"""Train a small visual encoder on images in class folders, so that nobody needs DINOv2 to begin.

  sfd train_encoder --config=configs/visual_encoder.py:small --workdir=runs/encoder --config.data.path=IMAGES
  sfd train_encoder ... --config.data.held_out_split=val
      log the accuracy on IMAGES/val at each checkpoint
  sfd train_encoder ... --config.data.flips=False
      for letters, digits and whatever else means something else when mirrored
  sfd train_encoder ... --init=CKPT
      start from the weights of another run, or from converted ones
  sfd train_encoder ... --check
      look for faults before a long job, without training

The network has the shape of DINOv2. It learns the labels from its class token and from the mean of its patch tokens;
the classifiers are not saved. The work folder is what `sfd extract --visual`, `--config.data.visual_encoder` of
`sfd train_semvae` and `sfd train`, and `sfd evaluate --dinov2` take. Resuming and SIGTERM are as with `sfd train`.
"""

from sfd_jax.cli.flags import parse_training


def main(argv: list[str]) -> int:
    """Read the flags, then train or only look for faults."""
    args, found = parse_training("train_encoder", __doc__, argv, config="configs/visual_encoder.py")

    from sfd_jax.experiment.run import train_or_check
    from sfd_jax.experiment.training import open_visual_encoder

    open_run = lambda: open_visual_encoder(args.config, found, init=args.init)
    train_or_check(open_run, args.workdir, found, check=args.check)
    return 0
