"""A training run as one value, to train it or to check it for faults without training.

The functions of experiment/training.py make a `Run` from a config, one for each kind of training.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sfd_jax.data.checks import check_writable
from sfd_jax.data.fingerprint import data_hash
from sfd_jax.data.pipeline import Batch, TrainBatches, Transform, make_batches, make_eval_batches
from sfd_jax.distributed import host_rows, say, start
from sfd_jax.distributed.preflight import Job
from sfd_jax.errors import Faults, SfdError
from sfd_jax.experiment.build import mesh_from_config
from sfd_jax.experiment.previews import PreviewConfig, Previews
from sfd_jax.models.execution import PLAIN
from sfd_jax.models.fingerprint import params_hash
from sfd_jax.training import Task, TrainConfig, TrainState, fit, make_optimizer, make_train_step
from sfd_jax.training.held_out import Measure, check_held_out, held_out_metrics
from sfd_jax.training.loop import check_workdir
from sfd_jax.training.optimizer import check_average
from sfd_jax.training.step import put_frozen, trace_train_step


@dataclasses.dataclass(frozen=True)
class Run:
    """A training run, independent of its folder and devices.

    Attributes:
      task: network and loss.
      train: steps, optimizer and batch size.
      config: `seed`, `mesh`, `data.workers` and `data.flips` are read; checkpoints store all of it.
      source: random access to records.
      transform: from stacked records to batches.
      metadata: stored in the checkpoints beside the config.
      params: weights to start from; None for random ones.
      held_out: (measure, source), evaluated and logged at each checkpoint.
      notes: sentences to print at the start.
      checks: slow search for faults of the data; `check_run` calls it, `train` does not.
      cache: hold all records in memory, for small data sets.
      preview: makes samples of the averaged weights, and scores.
    """

    task: Task
    train: TrainConfig
    config: ConfigDict
    source: Any
    transform: Transform
    metadata: dict[str, Any]
    params: dict | None = None
    held_out: tuple[Measure, Any] | None = None
    notes: tuple[str, ...] = ()
    checks: Callable[[], list[str]] = list
    cache: bool = False
    preview: PreviewConfig = PreviewConfig()

    def batches(self, rows: np.ndarray | None = None) -> TrainBatches:
        """Return the training batches, or only the given rows of each."""
        return make_batches(
            self.source,
            seed=self.config.seed,
            global_batch_size=self.train.global_batch_size,
            rows=rows,
            transform=self.transform,
            workers=self.config.data.workers,
            flips=self.config.data.flips,
            cache=self.cache,
        )

    def record(self) -> dict[str, Any]:
        """Return what checkpoints store: config, hashes of data and initial weights, and `metadata`."""
        hashes = {
            "data_hash": data_hash(self.source),
            "held_out_hash": data_hash(self.held_out[1]) if self.held_out else None,
            "init": None if self.params is None else params_hash(self.params),
        }
        return {"config": self.config.to_dict(), **hashes, **self.metadata}


def train_or_check(
    open_run: Callable[[], Run],
    workdir: str,
    found: Faults,
    *,
    check: bool,
    profile: tuple[int, int] | None = None,
) -> None:
    """Open a run and train, or with `check` only look for faults; used by the training commands.

    Args:
      open_run: opens the run, after the processes of the job are connected, since it may need devices.
      workdir: folder of the run.
      found: faults found so far.
      check: do not train.
      profile: see `fit`.

    Raises:
      SfdError: as `open_run`, `train` or `check_run`.
    """
    if check:
        check_run(open_run(), workdir, found)
        return
    start(Job(folder=workdir, saves=True))
    run = open_run()
    found.stop()
    train(run, workdir, profile=profile)


def train(run: Run, workdir: str, *, table: bool = True, profile: tuple[int, int] | None = None) -> TrainState:
    """Train on all devices of all hosts, from the newest checkpoint if there is one.

    Args:
      run: the run.
      workdir: its folder, local or gs://.
      table: print the table of parameters.
      profile: see `fit`.

    Returns:
      The final state.

    Raises:
      SfdError: hosts have different configs or data, the data do not fit the network, or as `fit`.
    """
    config, record = run.config, run.record()
    known = {name: record[name] for name in ("data_hash", "held_out_hash", "init")}
    start(Job({"config": config.to_dict(), "images": len(run.source), **known}, folder=workdir, saves=True))
    for note in getattr(run.source, "notes", ()):
        say(f"note: {note}")
    mesh = mesh_from_config(config)
    rows = host_rows(mesh, run.train.global_batch_size)
    batches = run.batches(rows)
    check_batch(run.task, batches.at(0))
    evaluate, best = None, ""
    if run.held_out:
        measure, source = run.held_out
        check_held_out(run.source, source)
        host = {"host_index": jax.process_index(), "host_count": jax.process_count(), "workers": config.data.workers}
        held_out = lambda: make_eval_batches(source, batch_size=len(rows), transform=run.transform, **host)
        evaluate = held_out_metrics(measure, held_out, mesh, put_frozen(run.task, mesh))
    if run.preview.every:
        evaluate = Previews(run.preview, run.task.network, record, workdir, mesh, run.train.global_batch_size)
        best = evaluate.best
    say("\n".join([describe(run, mesh, workdir, table), *(f"note: {note}" for note in run.notes)]))
    state = fit(
        run.task,
        batches,
        run.train,
        workdir,
        mesh=mesh,
        seed=config.seed,
        metadata=record,
        params=run.params,
        evaluate=evaluate,
        best=best,
        ideal_seconds=ideal_seconds(run, batches.at(0), mesh),
        profile=profile,
    )
    say(f"{workdir}: {int(state.step):,} steps done")
    return state


def ideal_seconds(run: Run, batch: Batch, mesh: Mesh) -> float | None:
    """Return the time of a training step at the peak rate of the mesh's devices; None where that is unknown."""
    from sfd_jax.pod.chips import peak_rate
    from sfd_jax.pod.flops import program_flops

    if not (rate := peak_rate(mesh.devices.flat[0].device_kind)):
        return None
    rows = run.train.global_batch_size
    shapes = {n: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype) for n, x in batch.items() if n != "index"}
    optimizer = make_optimizer(run.train.optimizer, run.train.steps)
    task = dataclasses.replace(run.task, frozen=jax.eval_shape(lambda: run.task.frozen))
    # The plain forms compute nothing twice and hide no products in kernels.
    step = trace_train_step(task, optimizer, run.train, mesh, shapes, PLAIN)
    return program_flops(step.jaxpr) / (rate * mesh.size)


def check_run(run: Run, workdir: str, found: Faults) -> None:
    """Look for faults that would stop `train`, and print a summary; does not train.

    Args:
      run: the run.
      workdir: its folder.
      found: faults found so far.

    Raises:
      SfdError: there are faults; all are named.
    """
    average = check_average(run.train.ema_decay, run.train.steps) if run.params is None else []  # as `fit` prints
    for note in (*run.notes, *average):
        print(f"note: {note}")
    found += run.checks()
    # Parameters, EMA and two moments in float32, times the number of checkpoints kept.
    how, task = run.train, run.task
    kept = how.keep_last + 1 + (how.steps // how.keep_every if how.keep_every else 0)
    needed = 16 * task.network.num_params() * kept
    found += check_bucket(workdir) if "://" in workdir else check_writable(workdir, needed)
    with found:
        check_batch(task, run.batches(np.arange(8)).at(0))
    with found:
        if run.held_out:
            check_held_out(run.source, run.held_out[1])
    with found:
        known = {"seed": run.config.seed, "metadata": run.record(), "params": run.params}
        for note in check_workdir(task, how, workdir, **known):
            print(f"note: {note}")
    images, parameters = len(run.source), task.network.num_params()
    print(f"{images:,} images; {parameters:,} parameters; checkpoints take {needed / 1e9:.1f} GB")
    unchecked = Faults()
    with unchecked:
        mesh = mesh_from_config(run.config)
        with found:
            make_train_step(task, make_optimizer(how.optimizer, how.steps), how, mesh)
    for reason in unchecked:  # this machine has other devices than the job
        print(f"note: it was not checked whether the batch divides over the devices: {reason}")
    found.stop()
    print("no faults found")


def check_batch(task: Task, batch: Batch) -> None:
    """Trace the loss on the shapes of a batch, to find a mismatch of data and network before compiling.

    Raises:
      SfdError: the batch does not fit the network.
    """
    shapes = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in batch.items() if name != "index"}
    shapes["row_indices"] = jax.ShapeDtypeStruct((len(batch["labels"]),), np.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    try:
        frozen = () if task.frozen is None else (task.frozen,)
        jax.eval_shape(task.loss, task.abstract_params, shapes, key, *frozen)
    except (TypeError, ValueError) as error:
        listed = ", ".join(f"{name} {array.shape}" for name, array in shapes.items())
        raise SfdError(f"the data do not fit the network: {str(error).splitlines()[0]} (batch: {listed})") from error


def describe(run: Run, mesh: Mesh, workdir: str, table: bool = True) -> str:
    """Return a summary of the run: parameters, data, devices, steps and epochs."""
    from clu import parameter_overview

    task, train, images = run.task, run.train, len(run.source)
    params = task.network.abstract_params()
    overview = parameter_overview.get_parameter_overview(params, include_stats=False) + "\n" if table else ""
    shape = " x ".join(f"{size} {axis}" for axis, size in mesh.shape.items())
    parts = f" in {train.accumulation} parts" if train.accumulation > 1 else ""
    epochs = train.steps * train.global_batch_size / images
    return (
        f"{overview}{task.name}: {task.network.num_params():,} parameters on {mesh.size} devices ({shape})\n"
        f"{images:,} images, {train.global_batch_size} per step{parts}, {train.steps:,} steps = {epochs:,.1f} epochs\n"
        f"work folder {workdir}: a checkpoint every {train.checkpoint_every:,} steps"
    )


def check_bucket(folder: str) -> list[str]:
    """Check that a folder of a bucket is writable; leaves no file."""
    probe = epath.Path(folder) / ".check"
    try:
        probe.write_text("sfd")
        probe.unlink()
    except Exception as error:  # the client has its own exception types, and may be missing
        return [f"cannot write to {folder}: {error}"]
    return []
