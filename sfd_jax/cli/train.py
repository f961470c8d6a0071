"""Train the two-clock diffusion transformer on latent shards.

  sfd train --config=configs/sfd.py:xl --workdir=runs/xl --config.data.path=latents/train
  sfd train --config=configs/sfd.py:b,weak --workdir=runs/b --config.data.path=latents/train
      the weaker model for AutoGuidance
  sfd train ... --config.data.repa_source=semvae --config.data.semantic_vae=CKPT
      REPA without stored features; or `online` from the images: see docs/repa.md
  sfd train ... --init=CKPT
      start from the weights of another run, or from converted ones
  sfd train ... --check
      look for faults before a long job, and train nothing

The latents are those of `sfd extract`, or a folder of released shards. The work folder gets checkpoints/
(weights, EMA, optimizer and all that sampling needs), metrics.jsonl, tensorboard/ and run.json. Started again
with the same flags the run goes on from its newest checkpoint, bit for bit as if it had not stopped; a folder
of another run is refused. After SIGTERM it saves and exits with status 75: start it again later. On several
hosts, start the same command on all of them, with one work folder for all: a disk they share, or gs://.
"""

from sfd_jax.cli.flags import door_parser, parse_door
from sfd_jax.errors import SfdError
from sfd_jax.files import must_be_local


def main(argv: list[str]) -> int:
    """Open the door: check everything that can be checked without a device, then train."""
    parser = door_parser("train", __doc__)
    parser.add_argument("--workdir", required=True, help="folder of the run")
    parser.add_argument("--init", metavar="CKPT", help="checkpoint whose weights to start from")
    parser.add_argument("--check", action="store_true", help="only look for faults")
    args = parse_door(parser, argv, config="configs/sfd.py:xl")
    config = args.config

    from sfd_jax.cli.build import layout_from_config, task_from_config, train_config
    from sfd_jax.cli.repa import check_repa_source, open_targets
    from sfd_jax.data.pipeline import latent_transform

    # --- What the config says, before any device is touched --------------------------------------------------
    task, layout, train = task_from_config(config), layout_from_config(config), train_config(config)
    repa = check_repa_source(config) == "stored"
    source = open_source(config.data.path, repa=repa)
    check_channels(layout, source.statistics)
    source, targets = open_targets(config, layout, source)
    task = task_from_config(config, targets)
    if args.check:
        return _check(args, config, source, task, repa)

    # --- Devices, data, training -----------------------------------------------------------------------------
    from sfd_jax.distributed import start
    from sfd_jax.training import load_params

    if args.init:
        start()  # Orbax asks JAX for its devices
    run(
        task,
        train,
        config,
        args.workdir,
        source=source,
        transform=latent_transform(layout, source.statistics, repa=repa),
        metadata={"latent_statistics": source.statistics.to_dict(), "class_names": source.class_names},
        params=load_params(args.init, abstract=task.network.abstract_params())[0] if args.init else None,
    )
    return 0


def run(task, train, config, workdir, *, source, transform, metadata, params=None, held_out=None) -> None:
    """Train a task on a source of records: what all training doors do once they have read their flags.

    Args:
      task: what is trained.
      train: its TrainConfig.
      config: `seed`, `mesh`, `data.workers` and `data.flips` are read; all of it goes into the checkpoints.
      workdir: folder of the run.
      source: random access to records.
      transform: from stacked records to batches.
      metadata: what the checkpoints shall carry beside the config.
      params: weights to start from.
      held_out: (measure, source) to log on at each checkpoint.

    Raises:
      SfdError: the hosts of the job do not go together; data and network do not fit, in any label; and whatever
        `fit` says.
    """
    import jax

    from sfd_jax.cli.build import mesh_from_config
    from sfd_jax.data.checks import check_labels
    from sfd_jax.data.pipeline import make_batches, make_eval_batches
    from sfd_jax.distributed import say, start
    from sfd_jax.distributed.preflight import Job
    from sfd_jax.training import fit
    from sfd_jax.training.held_out import held_out_metrics
    from sfd_jax.training.step import put_frozen

    setting, classes = "model.num_classes", getattr(task.network.config, "num_classes", None)
    if config.loss.get("classification_weight"):
        setting, classes = "loss.num_classes", config.loss.num_classes
    if classes and (faults := check_labels(source, classes, setting)):
        raise SfdError(faults[0])
    start(Job({"config": config.to_dict(), "images": len(source)}, folder=workdir))
    for note in getattr(source, "notes", ()):
        say(f"note: {note}")
    mesh = mesh_from_config(config)
    host = {"host_index": jax.process_index(), "host_count": jax.process_count(), "workers": config.data.workers}
    batches = make_batches(
        source,
        seed=config.seed,
        global_batch_size=train.global_batch_size,
        transform=transform,
        flips=config.data.flips,
        **host,
    )
    check_batch(task, batches.at(0))
    evaluate = None
    if held_out:
        measure, held_out_source = held_out
        per_host = train.global_batch_size // jax.process_count()
        evaluate = held_out_metrics(
            measure,
            lambda: make_eval_batches(held_out_source, batch_size=per_host, transform=transform, **host),
            mesh,
            put_frozen(task, mesh),
        )
    say(describe(task, train, source, mesh, workdir))
    fit(
        task,
        batches,
        train,
        workdir,
        mesh=mesh,
        seed=config.seed,
        metadata={"config": config.to_dict(), **metadata},
        params=params,
        evaluate=evaluate,
    )
    say(f"{workdir}: {train.steps:,} steps done")


def open_source(path: str, *, repa: bool):
    """Open the latents to train on, with their statistics.

    Raises:
      SfdError: no path, no latents there, or released shards without their statistics.
    """
    from sfd_jax.convert.weight_files import read_statistics
    from sfd_jax.data.published import open_latents

    must_be_local("--config.data.path", path)
    if not path:
        raise SfdError("say where the latents are: --config.data.path=FOLDER, made by `sfd extract`")
    return open_latents(path, repa=repa, read_statistics=read_statistics)


def check_channels(layout, statistics) -> None:
    """Raise SfdError where the stored latents have other channels than the config says."""
    stored = (statistics.texture_mean.size, statistics.semantic_mean.size)
    if stored != (layout.texture_channels, layout.semantic_channels):
        raise SfdError(
            f"the latents have {stored[0]} texture and {stored[1]} semantic channels, but "
            f"latents.texture_channels={layout.texture_channels} and "
            f"latents.semantic_channels={layout.semantic_channels}"
        )


def check_batch(task, batch: dict) -> None:
    """Trace the loss on the shapes of a batch, so that data and network disagree now and not after a compile.

    Raises:
      SfdError: what the network says of a batch that does not fit it.
    """
    import jax
    import numpy as np

    shapes = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in batch.items() if name != "index"}
    shapes["positions"] = jax.ShapeDtypeStruct((len(batch["labels"]),), np.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    try:
        frozen = () if task.frozen is None else (task.frozen,)
        jax.eval_shape(task.loss, jax.eval_shape(task.init, key), shapes, key, *frozen)
    except (TypeError, ValueError) as error:
        listed = ", ".join(f"{name} {array.shape}" for name, array in shapes.items())
        raise SfdError(f"the data do not fit the network: {str(error).splitlines()[0]} (batch: {listed})") from error


def describe(task, train, source, mesh, workdir) -> str:
    """Return what the run is about to do: parameters, data, devices and lengths."""
    from clu import parameter_overview

    overview = parameter_overview.get_parameter_overview(task.network.abstract_params(), include_stats=False)
    epochs = train.steps * train.global_batch_size / len(source)
    shape = " x ".join(f"{size} {axis}" for axis, size in mesh.shape.items())
    parts = f" in {train.accumulation} parts" if train.accumulation > 1 else ""
    return (
        f"{overview}\n"
        f"{task.name}: {task.network.num_params():,} parameters on {mesh.size} devices ({shape})\n"
        f"{len(source):,} images, {train.global_batch_size} a step{parts}, {train.steps:,} steps = {epochs:,.1f} epochs\n"
        f"work folder {workdir}: a checkpoint every {train.checkpoint_every:,} steps"
    )


def check_bucket(folder: str) -> list[str]:
    """Check that a folder of a bucket can be written to; leaves nothing behind."""
    from etils import epath

    probe = epath.Path(folder) / ".check"
    try:
        probe.write_text("sfd")
        probe.unlink()
    except Exception as error:  # its client has types of its own, and may be missing
        return [f"cannot write to {folder}: {error}"]
    return []


def _check(args, config, source, task, repa: bool) -> int:
    from sfd_jax.cli.build import layout_from_config
    from sfd_jax.data.checks import check_published, check_store, check_writable
    from sfd_jax.data.latent_store import LatentStore
    from sfd_jax.data.pipeline import latent_transform, make_batches

    latents, classes, flips = getattr(source, "latents", source), config.model.num_classes, config.data.flips
    if isinstance(latents, LatentStore):
        faults = check_store(config.data.path, num_classes=classes, flips=flips, repa=repa)
    else:
        faults = check_published(latents, num_classes=classes, flips=flips)
    # Parameters, EMA and two moments in float32, for each checkpoint kept at the same time.
    kept = config.train.keep_last + 1
    if config.train.keep_every:
        kept += config.train.steps // config.train.keep_every
    needed = 16 * task.network.num_params() * kept
    faults += check_bucket(args.workdir) if "://" in args.workdir else check_writable(args.workdir, needed)
    transform = latent_transform(layout_from_config(config), source.statistics, repa=repa)
    try:
        batches = make_batches(source, seed=config.seed, global_batch_size=8, transform=transform, flips=config.data.flips)
        check_batch(task, batches.at(0))
    except SfdError as error:
        faults.append(str(error))
    print(f"{len(source):,} images; {task.network.num_params():,} parameters; checkpoints take {needed / 1e9:.1f} GB")
    if faults:
        raise SfdError(f"{len(faults)} faults:\n" + "\n".join(f"  {fault}" for fault in faults))
    print("no faults found")
    return 0


if __name__ == "__main__":
    import sys

    from sfd_jax.cli.main import open_door

    sys.exit(open_door(main, "train", sys.argv[1:]))
