"""Train a task on a source of records, or look for what would stop that: what all training commands do at last."""

from sfd_jax.errors import Faults, SfdError


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

    from sfd_jax.data.pipeline import make_batches, make_eval_batches
    from sfd_jax.distributed import host_rows, say, start
    from sfd_jax.distributed.preflight import Job
    from sfd_jax.experiment.build import mesh_from_config
    from sfd_jax.training import fit
    from sfd_jax.training.held_out import check_held_out, held_out_metrics
    from sfd_jax.training.step import put_frozen

    known = _hashes(source, held_out, params)
    start(Job({"config": config.to_dict(), "images": len(source), **known}, folder=workdir, saves=True))
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
    from sfd_jax.data.checks import check_writable
    from sfd_jax.data.pipeline import make_batches
    from sfd_jax.experiment.build import mesh_from_config
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


def _hashes(source, held_out, params) -> dict:
    """Return the hashes of what a run is of, for its record."""
    from sfd_jax.data.fingerprint import data_hash
    from sfd_jax.models.fingerprint import params_hash

    return {
        "data_hash": data_hash(source),
        "held_out_hash": data_hash(held_out[1]) if held_out else None,
        "init": None if params is None else params_hash(params),
    }
