"""Train a texture VAE on images.

  sfd train_texture_vae --config=configs/texture_vae.py --workdir=runs/vae --config.data.path=IMAGENET
  sfd train_texture_vae --config=configs/texture_vae.py:digits --workdir=runs/digits_vae
  sfd train_texture_vae ... --check
      look for faults before a long job, and train nothing

Reconstruction and KL loss, with --config.lpips=CKPT also LPIPS (`sfd convert` reads the `lpips` package's file),
without discriminator: enough for small data. For ImageNet take the published one (`sfd fetch`). PSNR, L1 and MSE
of the held-out split are logged at each checkpoint. Work folder, resuming and SIGTERM are as with `sfd train`.
"""

import functools

from sfd_jax.cli.flags import door_parser, parse_door, path
from sfd_jax.errors import Faults, SfdError


def main(argv: list[str]) -> int:
    """Open the door: read the flags, then train."""
    parser = door_parser("train_texture_vae", __doc__)
    parser.add_argument("--workdir", type=path, required=True, help="folder of the run")
    parser.add_argument("--check", action="store_true", help="only look for faults")
    found = Faults()
    args = parse_door(parser, argv, config="configs/texture_vae.py", pending=found)
    config, data = args.config, args.config.data

    from sfd_jax.data.images import open_images
    from sfd_jax.data.pipeline import pixel_transform
    from sfd_jax.experiment.build import from_group, train_config
    from sfd_jax.experiment.run import check_run, run
    from sfd_jax.models import Network
    from sfd_jax.training.texture_vae import TextureVAELoss, measure_texture_vae, texture_vae_task

    perceptual = frozen = held_out = None
    with found:
        network = Network("texture_vae", config.model.to_dict())
    with found:
        loss = from_group(TextureVAELoss, "loss", config.loss)
    with found:
        train = train_config(config)
    with found:
        if config.lpips and not config.loss.perceptual_weight:
            raise SfdError("lpips has no effect with loss.perceptual_weight=0: leave one of them out")
        if config.lpips:
            from sfd_jax.experiment.targets import open_frozen

            lpips, frozen = open_frozen(config.lpips, "lpips", config.model.compute_dtype)
            perceptual = lambda ours, theirs, params: lpips.apply(params, ours, theirs)
    with found:
        if not data.path and data.kind != "digits":
            raise SfdError("say where the images are: --config.data.path=IMAGES")
        source = open_images(data.kind, data.path, data.split, data.image_size)
    with found:
        if data.held_out_split and not found:
            measure = functools.partial(measure_texture_vae, network)
            held_out = measure, open_images(data.kind, data.path, data.held_out_split, data.image_size)
    found.stop()
    task = texture_vae_task(network, loss, perceptual, frozen)
    metadata = {"class_names": source.class_names}
    parts = {"source": source, "transform": pixel_transform, "metadata": metadata, "held_out": held_out}
    if args.check:
        return check_run(task, train, config, args.workdir, **parts, found=found)
    run(task, train, config, args.workdir, **parts)
    return 0


if __name__ == "__main__":
    import sys

    from sfd_jax.cli.main import open_door

    sys.exit(open_door(main, "train_texture_vae", sys.argv[1:]))
