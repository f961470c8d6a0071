"""Train the Semantic VAE on a visual encoder's features.

  sfd train_semvae --config=configs/semantic_vae.py --workdir=runs/semvae --config.data.path=latents/train
  sfd train_semvae ... --config.data.held_out_path=latents/val
      log MSE, L1, cosine similarity and KL of held-out features at each checkpoint
  sfd train_semvae ... --init=CKPT
      start from the weights of another run, or from converted ones
  sfd train_semvae ... --check
      look for faults before a long job, without training
  sfd train_semvae ... --config.data.visual_encoder=CKPT --config.data.images.path=IMAGENET
      make the features from images inside the step instead of storing them
  sfd train_semvae --config=configs/semantic_vae.py:small ...
      the same for small images, with the encoder of `sfd train_encoder`

The features are those of `sfd extract --repa` or of released shards. Use the checkpoint with
`sfd extract --semantic_vae=runs/semvae`. Work folder, resuming and SIGTERM are as with `sfd train`.
"""

from sfd_jax.cli.flags import parse_training


def main(argv: list[str]) -> int:
    """Read the flags, then train or only look for faults."""
    args, found = parse_training("train_semvae", __doc__, argv, config="configs/semantic_vae.py")

    from sfd_jax.experiment.run import train_or_check
    from sfd_jax.experiment.training import open_semantic_vae

    open_run = lambda: open_semantic_vae(args.config, found, init=args.init)
    train_or_check(open_run, args.workdir, found, check=args.check, profile=args.profile)
    return 0
