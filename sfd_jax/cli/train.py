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

import contextlib

from sfd_jax.cli.flags import door_parser, parse_door, path
from sfd_jax.errors import Faults, SfdError
from sfd_jax.files import must_be_local


def main(argv: list[str]) -> int:
    """Open the door: check everything that can be checked without a device, then train."""
    parser = door_parser("train", __doc__)
    parser.add_argument("--workdir", type=path, required=True, help="folder of the run")
    parser.add_argument("--init", type=path, metavar="CKPT", help="checkpoint whose weights to start from")
    parser.add_argument("--check", action="store_true", help="only look for faults")
    found = Faults()
    args = parse_door(parser, argv, config="configs/sfd.py:xl", pending=found)
    config = args.config

    from sfd_jax.cli import build
    from sfd_jax.cli.repa import check_repa_source, open_targets
    from sfd_jax.data.checks import check_labels
    from sfd_jax.data.pipeline import latent_transform
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
    if any(flag.lstrip("-").startswith("config.sample.") for flag in argv):
        notes.append("config.sample is only stored with the checkpoints; `sfd sample` takes flags of its own")
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
    task = build.task_from_config(config, targets)
    transform = latent_transform(layout, source.statistics, repa=repa)
    if args.init:
        notes += check_init(args.init, task.network, source)
    elif args.check:
        notes += check_average(train.ema_decay, train.steps)  # `fit` says it too
    statistics = source.statistics.to_dict()
    told = {"latent_statistics": statistics, "class_names": source.class_names, "latents": source.origin}
    if args.check:
        for note in notes:
            print(f"note: {note}")
        return _check(args, config, source, task, train, transform, told, repa)

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
        transform=transform,
        metadata=told,
        params=load_params(args.init, abstract=task.network.abstract_params())[0] if args.init else None,
        notes=notes,
    )
    return 0


def run(task, train, config, workdir, *, source, transform, metadata, params=None, held_out=None, notes=()) -> None:
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
      notes: sentences to say at the start.

    Raises:
      SfdError: the hosts of the job do not go together; data and network do not fit; and whatever
        `fit` says.
    """
    import jax

    from sfd_jax.cli.build import mesh_from_config
    from sfd_jax.data.pipeline import make_batches, make_eval_batches
    from sfd_jax.distributed import host_rows, say, start
    from sfd_jax.distributed.preflight import Job
    from sfd_jax.training import fit
    from sfd_jax.training.held_out import check_held_out, held_out_metrics
    from sfd_jax.training.step import put_frozen

    known = _hashes(source, held_out, params)
    start(Job({"config": config.to_dict(), "images": len(source), **known}, folder=workdir))
    for note in getattr(source, "notes", ()):
        say(f"note: {note}")
    mesh = mesh_from_config(config)
    rows, workers = host_rows(mesh, train.global_batch_size), config.data.workers
    batches = make_batches(
        source,
        seed=config.seed,
        global_batch_size=train.global_batch_size,
        rows=rows,
        transform=transform,
        workers=workers,
        flips=config.data.flips,
    )
    check_batch(task, batches.at(0))
    evaluate = None
    if held_out:
        measure, held_out_source = held_out
        host = {"host_index": jax.process_index(), "host_count": jax.process_count(), "workers": workers}
        check_held_out(source, held_out_source)
        evaluate = held_out_metrics(
            measure,
            lambda: make_eval_batches(held_out_source, batch_size=len(rows), transform=transform, **host),
            mesh,
            put_frozen(task, mesh),
        )
    say("\n".join([describe(task, train, source, mesh, workdir), *(f"note: {note}" for note in notes)]))
    fit(
        task,
        batches,
        train,
        workdir,
        mesh=mesh,
        seed=config.seed,
        metadata={"config": config.to_dict(), **known, **metadata},
        params=params,
        evaluate=evaluate,
    )
    say(f"{workdir}: {train.steps:,} steps done")


def _hashes(source, held_out, params) -> dict:
    """Return the hashes of what a run is of, for its record."""
    from sfd_jax.data.fingerprint import data_hash
    from sfd_jax.models.fingerprint import params_hash

    return {
        "data_hash": data_hash(source),
        "held_out_hash": data_hash(held_out[1]) if held_out else None,
        "init": None if params is None else params_hash(params),
    }


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


def check_data(config, source, found: Faults, *, repa: bool) -> None:
    """Add to `found` where the latents are not those that the config says, with the flags that make them fit.

    Args:
      config: of the run.
      source: the latents.
      found: gets the faults.
      repa: stored features are wanted.

    Raises:
      SfdError: a record cannot be read.
    """
    statistics, latents = source.statistics, config.latents
    texture, semantic = statistics.texture_mean.size, statistics.semantic_mean.size
    if (texture, semantic) != (latents.texture_channels, latents.semantic_channels):
        found.append(
            f"the latents have {texture} texture and {semantic} semantic channels, but latents.texture_channels="
            f"{latents.texture_channels} and latents.semantic_channels={latents.semantic_channels}: "
            f"--config.latents.texture_channels={texture} --config.latents.semantic_channels={semantic}"
        )
    if config.data.flips and not (source.flips if hasattr(source, "flips") else source.orientations == 2):
        found.append("the latents hold no mirrored images, which data.flips=True needs: --config.data.flips=False")
    record, size = source[0], config.model.input_size
    grid, features = record["texture"].shape[0], record.get("repa_features")
    if grid != size:
        found.append(f"the latents are {grid} x {grid}, but model.input_size={size}: --config.model.input_size={grid}")
    if repa and features is None:
        with contextlib.suppress(SfdError):  # released shards read them where they are asked for
            features = open_source(config.data.path, repa=True)[0].get("repa_features")
    if repa and features is None:
        found.append(
            f"the latents hold no visual features, which loss.repa_weight={config.loss.repa_weight:g} with "
            "data.repa_source=stored needs: extract them with `sfd extract --repa`, make them while training (docs/repa.md), "
            "or train without REPA: --config.model.repa_features=0 --config.loss.repa_weight=0"
        )
    elif repa and features.shape[-1] != config.model.repa_features > 0:
        found.append(
            f"the latents' visual features are {features.shape[-1]} wide, but model.repa_features="
            f"{config.model.repa_features}: --config.model.repa_features={features.shape[-1]}"
        )


def unused_classes(num_classes: int, source) -> list[str]:
    """Return a sentence where some of the network's classes have no data."""
    known = source.label_counts() or source.class_names or ()
    if missing := num_classes - len(known):
        return [
            f"model.num_classes={num_classes}, but the data have images of {len(known)} classes: the embeddings of the "
            f"other {missing} are never trained, and sampling refuses those labels"
        ]
    return []


def check_init(path: str, network, source) -> list[str]:
    """Return sentences on what sets the checkpoint of --init apart from this run; the latents it was trained on.

    Raises:
      SfdError: it is of another network.
    """
    from sfd_jax.distributed import start
    from sfd_jax.latents import LatentStatistics, other_makers
    from sfd_jax.models import network_of
    from sfd_jax.training import load_metadata
    from sfd_jax.training.optimizer import average_notes

    start()  # Orbax asks JAX for its devices
    metadata = {**load_metadata(path), "given_as": f"--init={path}"}
    network_of(metadata, network.name)
    notes = [
        f"--init={path} was trained on latents of another {line}"
        for line in other_makers(metadata.get("latents"), source.origin)
    ] + average_notes(metadata)
    told = metadata.get("latent_statistics")
    if told and not LatentStatistics.from_dict(told).same_scale(source.statistics):
        notes.append(f"--init={path} was trained with other latent statistics than these latents have")
    names = metadata.get("class_names"), source.class_names
    if None not in names and names[0] != names[1]:
        notes.append(f"--init={path} was trained with other class names: its labels begin as those of other classes")
    return notes


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


def _check(args, config, source, task, train, transform, metadata, repa: bool) -> int:
    from sfd_jax.data.checks import check_published, check_store
    from sfd_jax.data.latent_store import LatentStore
    from sfd_jax.training import load_params

    latents, classes, flips = getattr(source, "latents", source), config.model.num_classes, config.data.flips
    if isinstance(latents, LatentStore):
        found = Faults(check_store(config.data.path, num_classes=classes, flips=flips, repa=repa))
    else:
        found = Faults(check_published(latents, num_classes=classes, flips=flips))
    params = None
    with found:
        if args.init:
            params, _ = load_params(args.init, abstract=task.network.abstract_params())
    parts = {"source": source, "transform": transform, "metadata": metadata, "params": params}
    return check_run(task, train, config, args.workdir, **parts, found=found)


def check_run(
    task, train, config, workdir, *, source, transform, metadata, params=None, held_out=None, found: Faults
) -> int:
    """Look for what would stop `run`, and train nothing: what `--check` of all training commands does at last.

    Args:
      task, train, config, workdir, source, transform, metadata, params, held_out: as `run` takes them.
      found: the faults known so far.

    Raises:
      SfdError: there are faults; all are named.
    """
    from sfd_jax.cli.build import mesh_from_config
    from sfd_jax.data.checks import check_writable
    from sfd_jax.data.pipeline import make_batches
    from sfd_jax.training.held_out import check_held_out
    from sfd_jax.training.loop import check_workdir
    from sfd_jax.training.optimizer import make_optimizer
    from sfd_jax.training.step import make_train_step

    # Parameters, EMA and two moments in float32, for each checkpoint kept at the same time.
    kept = train.keep_last + 1 + (train.steps // train.keep_every if train.keep_every else 0)
    needed = 16 * task.network.num_params() * kept
    found += check_bucket(workdir) if "://" in workdir else check_writable(workdir, needed)
    with found:
        flips = config.data.flips
        batches = make_batches(source, seed=config.seed, global_batch_size=8, transform=transform, flips=flips)
        check_batch(task, batches.at(0))
    with found:
        if held_out:
            check_held_out(source, held_out[1])
    with found:
        told = {"config": config.to_dict(), **_hashes(source, held_out, params), **metadata}
        check_workdir(task, train, workdir, seed=config.seed, metadata=told, params=params)
    print(f"{len(source):,} images; {task.network.num_params():,} parameters; checkpoints take {needed / 1e9:.1f} GB")
    here = Faults()
    with here:
        mesh = mesh_from_config(config)
        with found:
            make_train_step(task, make_optimizer(train.optimizer, train.steps), train, mesh)
    for reason in here:  # the job's devices are not those of the machine that checks
        print(f"note: whether the batch divides over the devices was not checked: {reason}")
    found.stop()
    print("no faults found")
    return 0


if __name__ == "__main__":
    import sys

    from sfd_jax.cli.main import open_door

    sys.exit(open_door(main, "train", sys.argv[1:]))
