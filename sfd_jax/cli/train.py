"""Train the two-clock diffusion transformer on latent shards.

  sfd train --config=configs/sfd.py:xl --workdir=runs/xl --config.data.path=latents/train
  sfd train --config=configs/sfd.py:b,weak --workdir=runs/b --config.data.path=latents/train
      the weaker model for AutoGuidance
  sfd train --config=configs/sfd.py:small --workdir=runs/small --config.data.path=latents
      a small model for images of 32 or 64 px: docs/your_own_images.md
  sfd train ... --config.data.repa_source=semvae --config.data.semantic_vae=CKPT
      REPA without stored features; or `online` from the images: see docs/repa.md
  sfd train --config=configs/sfd.py:xl,learned_clocks --workdir=runs/learned --config.data.path=latents/train
      learn the two clocks with a small network first, then train with them: docs/learned_clocks.md
  sfd train --config=configs/sfd.py:xl,few_step --config.teacher=CKPT [--config.weak=CKPT] ...
      a model that samples in 1 to 4 network evaluations, from a trained one: docs/few_step.md
  sfd train ... --init=CKPT
      start from the weights of another run, or from converted ones
  sfd train ... --check
      look for faults before a long job, without training

The latents are those of `sfd extract`, or a folder of released shards. The work folder gets checkpoints/
(weights, EMA, optimizer and all that sampling needs), metrics.jsonl, tensorboard/ and run.json. The same command
resumes from the newest checkpoint, bit for bit as if it had not stopped; the folder of another run, or one in
use, is refused. Settings that save memory (model.remat, model.scan_blocks, train.accumulation, mesh) and the path
of the data may change when a run is resumed. On preemption (SIGTERM) it saves and exits with status 75: start it
again later. On several hosts, start the same command on all of them with one work folder: on a shared disk, or
gs://.
"""

from sfd_jax.cli.flags import parse_training


def main(argv: list[str]) -> int:
    """Read the flags, then train or only look for faults."""
    args, found = parse_training("train", __doc__, argv, config="configs/sfd.py:xl")

    from sfd_jax.experiment.few_step import open_few_step
    from sfd_jax.experiment.learned_clocks import with_learned_clocks
    from sfd_jax.experiment.run import train_or_check
    from sfd_jax.experiment.training import open_diffusion

    def open_run():
        if "few_step" in args.config:
            return open_few_step(args.config, found, init=args.init)
        config = with_learned_clocks(args.config, args.workdir, found, check=args.check)
        return open_diffusion(config, found, init=args.init)

    train_or_check(open_run, args.workdir, found, check=args.check, profile=args.profile)
    return 0
