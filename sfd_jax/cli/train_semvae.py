"""Train the Semantic VAE on a visual encoder's features.

  sfd train_semvae --config=configs/semantic_vae.py --workdir=runs/semvae --config.data.path=latents/train
  sfd train_semvae ... --config.data.held_out_path=latents/val
      log MSE, L1, cosine similarity and KL of held-out features at each checkpoint
  sfd train_semvae ... --check
      look for faults before a long job, and train nothing
  sfd train_semvae ... --config.data.visual_encoder=CKPT --config.data.images.path=IMAGENET
      make the features from images inside the step, so that none need be stored

The features are those that `sfd extract --repa` stored, or those of released shards. The checkpoint goes
into `sfd extract --semantic_vae=runs/semvae`. Work folder, resuming and SIGTERM are as with `sfd train`.
"""

import functools

from sfd_jax.cli.flags import door_parser, parse_door, path
from sfd_jax.errors import Faults, SfdError


def main(argv: list[str]) -> int:
    """Open the door: read the flags, then train."""
    parser = door_parser("train_semvae", __doc__)
    parser.add_argument("--workdir", type=path, required=True, help="folder of the run")
    parser.add_argument("--check", action="store_true", help="only look for faults")
    found = Faults()
    args = parse_door(parser, argv, config="configs/semantic_vae.py", pending=found)
    config = args.config

    from sfd_jax.data.checks import check_labels
    from sfd_jax.data.pipeline import feature_transform, pixel_transform
    from sfd_jax.data.published import open_latents
    from sfd_jax.experiment.build import from_group, train_config
    from sfd_jax.experiment.run import check_run, run
    from sfd_jax.latents import other_makers
    from sfd_jax.models import Network
    from sfd_jax.models.fingerprint import params_hash
    from sfd_jax.training.semantic_vae import SemanticVAELoss, measure_semantic_vae, semantic_vae_task

    data = config.data
    with found:
        network = Network("semantic_vae", config.model.to_dict())
    with found:
        loss = from_group(SemanticVAELoss, "loss", config.loss)
    with found:
        train = train_config(config)
    maker, transform = None, feature_transform
    with found:
        if data.visual_encoder and (data.path or data.held_out_path):
            raise SfdError(
                "data.visual_encoder makes features from data.images, so data.path and data.held_out_path "
                "have no effect: give either"
            )
        elif data.visual_encoder:
            source, held_out_source, maker, tokens = _open_images(config)
            transform, weights = pixel_transform, {"visual": params_hash(maker.params)}
        elif data.path:
            source = open_latents(data.path, repa=True)
            held_out_source = open_latents(data.held_out_path, repa=True) if data.held_out_path else None
            weights = _visual(source)
            tokens, width = source[0]["repa_features"].shape
            if width != config.model.input_dim:
                found.append(
                    f"the features are {width} wide, but model.input_dim={config.model.input_dim}: "
                    f"--config.model.input_dim={width}"
                )
            others = {"weights": _visual(held_out_source)} if held_out_source else None
            if differing := other_makers(others, {"weights": weights}):
                raise SfdError(f"the held-out features are of another encoder than those to train on: {differing[0]}")
        else:
            raise SfdError(
                "say where the features are: --config.data.path=FOLDER, made by `sfd extract --repa`; or what to make "
                "them from: --config.data.visual_encoder=CKPT --config.data.images.path=IMAGES"
            )
    if not found and loss.classification_weight > 0:
        found += check_labels(source, loss.num_classes, "loss.num_classes")
    found.stop()
    task = semantic_vae_task(network, loss, maker)
    measure = functools.partial(measure_semantic_vae, network, source=maker)
    parts = {
        "source": source,
        "transform": transform,
        # Of what it compresses: whose features, how many.
        "metadata": {"latents": {"weights": weights, "tokens": tokens}},
        "held_out": (measure, held_out_source) if held_out_source else None,
    }
    if args.check:
        return check_run(task, train, config, args.workdir, **parts, found=found)
    run(task, train, config, args.workdir, **parts)
    return 0


def _visual(latents) -> dict[str, str]:
    """Return the hash of the encoder that made a source's features, where that is known."""
    return {name: digest for name, digest in latents.origin["weights"].items() if name == "visual"}


def _open_images(config):
    """Return images to train on, held-out ones or None, what makes features of them, and how many of an image."""
    from sfd_jax.data.images import open_images
    from sfd_jax.experiment.targets import open_frozen
    from sfd_jax.models.encoders import ENCODERS, Tiling, VisualEncoder
    from sfd_jax.training.frozen_features import online_features

    images = config.data.images
    network, params = open_frozen(config.data.visual_encoder, ENCODERS, config.model.compute_dtype)
    if network.config.feature_width != config.model.input_dim:
        raise SfdError(
            f"model.input_dim={config.model.input_dim}, but data.visual_encoder={config.data.visual_encoder} "
            f"makes features of {network.config.feature_width}"
        )
    encoder = VisualEncoder(network, Tiling.whole(images.image_size, config.data.view_size, network))
    split = lambda name: open_images(images.kind, images.path, name, images.image_size)
    held_out = split(images.held_out_split) if images.held_out_split else None
    return split(images.split), held_out, online_features(encoder, params), encoder.tiling.grid**2


if __name__ == "__main__":
    import sys

    from sfd_jax.cli.main import open_door

    sys.exit(open_door(main, "train_semvae", sys.argv[1:]))
