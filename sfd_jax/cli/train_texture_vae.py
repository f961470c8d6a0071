"""Train a texture VAE on images.

  sfd train_texture_vae --config=configs/texture_vae.py --workdir=runs/vae --config.data.path=IMAGENET
  sfd train_texture_vae --config=configs/texture_vae.py:small --workdir=runs/vae --config.data.path=IMAGES
      for images of 64 px, on a laptop or one GPU
  sfd train_texture_vae --config=configs/texture_vae.py:digits --workdir=runs/digits_vae
  sfd train_texture_vae ... --init=CKPT
      start from the weights of another run, or from converted ones (to fine-tune the released VAE)
  sfd train_texture_vae ... --check
      look for faults before a long job, without training

The loss is reconstruction and KL, with --config.lpips=CKPT also LPIPS (`sfd convert` reads the `lpips` package's
file), without a discriminator: enough for small data. For ImageNet use the released one (`sfd fetch`). PSNR, L1 and
MSE of the held-out split are logged at each checkpoint. Work folder, resuming and SIGTERM are as with `sfd train`.
"""

from sfd_jax.cli.flags import parse_training


def main(argv: list[str]) -> int:
    """Read the flags, then train or only look for faults."""
    args, found = parse_training("train_texture_vae", __doc__, argv, config="configs/texture_vae.py")

    from sfd_jax.experiment.run import train_or_check
    from sfd_jax.experiment.training import open_texture_vae

    open_run = lambda: open_texture_vae(args.config, found, init=args.init)
    train_or_check(open_run, args.workdir, found, check=args.check, profile=args.profile)
    return 0
