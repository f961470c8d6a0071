"""Train a texture VAE on images.

  sfd train_texture_vae --config=configs/texture_vae.py --workdir=runs/vae --config.data.path=IMAGENET
  sfd train_texture_vae --config=configs/texture_vae.py:digits --workdir=runs/digits_vae

Reconstruction and KL loss, with --config.lpips=CKPT also LPIPS (`sfd convert` reads the `lpips` package's file),
without discriminator: enough for small data. For ImageNet take the published one (`sfd fetch`). PSNR, L1 and MSE
of the held-out split are logged at each checkpoint. Work folder, resuming and SIGTERM are as with `sfd train`.
"""

import functools

from sfd_jax.cli.flags import door_parser, parse_door


def main(argv: list[str]) -> int:
    """Open the door: read the flags, then train."""
    parser = door_parser("train_texture_vae", __doc__)
    parser.add_argument("--workdir", required=True, help="folder of the run")
    args = parse_door(parser, argv, config="configs/texture_vae.py")
    config, data = args.config, args.config.data

    from sfd_jax.cli.build import from_group, train_config
    from sfd_jax.cli.train import run
    from sfd_jax.data.images import open_images
    from sfd_jax.data.pipeline import pixel_transform
    from sfd_jax.models import Network
    from sfd_jax.training.texture_vae import TextureVAELoss, measure_texture_vae, texture_vae_task

    network = Network("texture_vae", config.model.to_dict())
    perceptual = frozen = None
    if config.lpips:
        from sfd_jax.cli.repa import open_frozen

        lpips, frozen = open_frozen(config.lpips, "lpips", config.model.compute_dtype)
        perceptual = lambda ours, theirs, params: lpips.apply(params, ours, theirs)
    source = open_images(data.kind, data.path, data.split, data.image_size)
    held_out = None
    if data.held_out_split:
        measure = functools.partial(measure_texture_vae, network)
        held_out = measure, open_images(data.kind, data.path, data.held_out_split, data.image_size)
    run(
        texture_vae_task(network, from_group(TextureVAELoss, "loss", config.loss), perceptual, frozen),
        train_config(config),
        config,
        args.workdir,
        source=source,
        transform=pixel_transform,
        metadata={"class_names": source.class_names},
        held_out=held_out,
    )
    return 0


if __name__ == "__main__":
    import sys

    from sfd_jax.cli.main import open_door

    sys.exit(open_door(main, "train_texture_vae", sys.argv[1:]))
