"""Train the two-clock diffusion transformer on latent shards.

  sfd train --config=configs/sfd.py:xl --workdir=runs/xl --config.data.path=latents/train
  sfd train --config=configs/sfd.py:b,weak --workdir=runs/b --config.data.path=latents/train
      the weaker model for AutoGuidance
  sfd train ... --config.data.repa_source=semvae --config.data.semantic_vae=CKPT
      REPA without stored features; or `online` from the images: see docs/repa.md
  sfd train ... --init=CKPT
      start from the weights of another run, or from converted ones; they become part of the run
  sfd train ... --check
      look for faults before a long job, and train nothing

The latents are those of `sfd extract`, or a folder of released shards. The work folder gets checkpoints/
(weights, EMA, optimizer and all that sampling needs), metrics.jsonl, tensorboard/ and run.json. Started again
with the same flags the run goes on from its newest checkpoint, bit for bit as if it had not stopped; a folder
of another run, or one in which a run is at work, is refused. What saves memory (model.remat, model.scan_blocks,
train.accumulation, mesh) and the place of the data may change on a begun run. After SIGTERM it saves and exits
with status 75: start it again later. On several hosts, start the same command on all of them, with one work
folder for all: a disk they share, or gs://.
"""

from sfd_jax.cli.flags import door_parser, parse_door, path
from sfd_jax.errors import Faults


def main(argv: list[str]) -> int:
    """Open the door: check everything that can be checked without a device, then train."""
    parser = door_parser("train", __doc__)
    parser.add_argument("--workdir", type=path, required=True, help="folder of the run")
    parser.add_argument("--init", type=path, metavar="CKPT", help="checkpoint whose weights to start from")
    parser.add_argument("--check", action="store_true", help="only look for faults")
    found = Faults()
    args = parse_door(parser, argv, config="configs/sfd.py:xl", pending=found)
    config = args.config

    from sfd_jax.data.checks import check_labels
    from sfd_jax.data.pipeline import latent_transform
    from sfd_jax.experiment import build
    from sfd_jax.experiment.run import run
    from sfd_jax.experiment.targets import check_repa_source, open_targets
    from sfd_jax.experiment.training_data import check_data, check_init, load_init, open_source, unused_classes
    from sfd_jax.training.checkpoint import find_checkpoint
    from sfd_jax.training.optimizer import check_average

    # --- What the config says and what the data hold, all faults together, before any device is touched -------
    for part in (build.layout_from_config, build.network_from_config, build.diffusion_settings, build.task_from_config):
        with found:
            part(config)
    with found:
        train = build.train_config(config)
    with found:
        repa = config.loss.repa_weight > 0 and config.data.repa_source == "stored"
        check_repa_source(config)
    needed = {"semvae": config.data.semantic_vae, "online": config.data.visual_encoder}.get(config.data.repa_source)
    for checkpoint in filter(None, (args.init, needed)):
        with found:
            find_checkpoint(checkpoint)
    notes = []
    if config.model.repa_features and not config.loss.repa_weight:
        notes.append(
            "loss.repa_weight=0 leaves REPA's projector untrained; --config.model.repa_features=0 leaves it out"
        )
    with found:
        source = open_source(config.data.path, repa=False)
        check_data(config, source, found, repa=repa)
        found += check_labels(source, config.model.num_classes)
        notes += unused_classes(config.model.num_classes, source)
    found.stop()
    layout, source = build.layout_from_config(config), open_source(config.data.path, repa=repa)
    source, targets = open_targets(config, layout, source)
    task, clocks = build.task_from_config(config, targets), build.diffusion_settings(config)["clocks"]
    transform = latent_transform(layout, source.statistics, repa=repa)
    if args.init:
        notes += check_init(args.init, task.network, clocks, source)
    elif args.check:
        notes += check_average(train.ema_decay, train.steps)  # `fit` says it too
    statistics = source.statistics.to_dict()
    told = {"latent_statistics": statistics, "class_names": source.class_names, "latents": source.origin}
    told["registered_in"] = build.registered_in(config)
    if args.check:
        for note in notes:
            print(f"note: {note}")
        return _check(args, config, source, task, train, transform, told, repa)

    # --- Devices, data, training -----------------------------------------------------------------------------
    from sfd_jax.distributed import start

    if args.init:
        start()  # Orbax asks JAX for its devices
    run(
        task,
        train,
        config,
        args.workdir,
        source=source,
        transform=transform,
        metadata=told,
        params=load_init(args.init, task.network, clocks, config.seed) if args.init else None,
        notes=notes,
    )
    return 0


def _check(args, config, source, task, train, transform, metadata, repa: bool) -> int:
    from sfd_jax.data.checks import check_published, check_store
    from sfd_jax.data.latent_store import LatentStore
    from sfd_jax.experiment import build
    from sfd_jax.experiment.run import check_run
    from sfd_jax.experiment.training_data import load_init

    latents, classes, flips = getattr(source, "latents", source), config.model.num_classes, config.data.flips
    if isinstance(latents, LatentStore):
        found = Faults(check_store(config.data.path, num_classes=classes, flips=flips, repa=repa))
    else:
        found = Faults(check_published(latents, num_classes=classes, flips=flips))
    params = None
    with found:
        if args.init:
            params = load_init(args.init, task.network, build.diffusion_settings(config)["clocks"], config.seed)
    parts = {"source": source, "transform": transform, "metadata": metadata, "params": params}
    return check_run(task, train, config, args.workdir, **parts, found=found)


if __name__ == "__main__":
    import sys

    from sfd_jax.cli.main import open_door

    sys.exit(open_door(main, "train", sys.argv[1:]))
