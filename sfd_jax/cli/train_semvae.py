"""Train the Semantic VAE on a visual encoder's features.

  sfd train_semvae --config=configs/semantic_vae.py --workdir=runs/semvae --config.data.path=latents/train
  sfd train_semvae ... --config.data.held_out_path=latents/val
      log MSE, L1, cosine similarity and KL of held-out features at each checkpoint

The features are those that `sfd extract --repa` stored, or those of released shards. The checkpoint goes
into `sfd extract --semantic-vae=runs/semvae`. Work folder, resuming and SIGTERM are as with `sfd train`.
"""

import functools

from sfd_jax.cli.flags import door_parser, parse_door
from sfd_jax.errors import SfdError


def main(argv: list[str]) -> int:
    """Open the door: read the flags, then train."""
    parser = door_parser("train_semvae", __doc__)
    parser.add_argument("--workdir", required=True, help="folder of the run")
    args = parse_door(parser, argv, config="configs/semantic_vae.py")
    config = args.config

    from sfd_jax.cli.build import from_group, train_config
    from sfd_jax.cli.train import run
    from sfd_jax.data.pipeline import feature_transform
    from sfd_jax.data.published import open_latents
    from sfd_jax.models import Network
    from sfd_jax.training.semantic_vae import SemanticVAELoss, measure_semantic_vae, semantic_vae_task

    network = Network("semantic_vae", config.model.to_dict())
    task = semantic_vae_task(network, from_group(SemanticVAELoss, "loss", config.loss))
    if not config.data.path:
        raise SfdError("say where the features are: --config.data.path=FOLDER, made by `sfd extract --repa`")
    held_out = None
    if config.data.held_out_path:
        measure = functools.partial(measure_semantic_vae, network)
        held_out = measure, open_latents(config.data.held_out_path, repa=True)
    run(
        task,
        train_config(config),
        config,
        args.workdir,
        source=open_latents(config.data.path, repa=True),
        transform=feature_transform,
        metadata={},
        held_out=held_out,
    )
    return 0


if __name__ == "__main__":
    import sys

    from sfd_jax.cli.main import open_door

    sys.exit(open_door(main, "train_semvae", sys.argv[1:]))
