"""The training loop: one function, every side effect in order.

A run's folder holds `run.json` (the run's settings), `checkpoints/`, `metrics.jsonl`, `tensorboard/` and `heartbeats/`.
Started again with the same folder, a run resumes from its newest complete checkpoint and ends with the numbers of
an uninterrupted one, since batches, noise and dropout are functions of (seed, step).
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from sfd_jax.distributed import barrier, host_rows, is_host0, put_batch, say
from sfd_jax.distributed.heartbeat import Heartbeat
from sfd_jax.distributed.hosts import preemption_watch
from sfd_jax.distributed.lock import FolderLock
from sfd_jax.errors import SfdError, TryAgain
from sfd_jax.models.fingerprint import params_hash
from sfd_jax.progress import ProgressBar
from sfd_jax.training.checkpoint import Checkpointer, load_metadata
from sfd_jax.training.logging import MetricsLog, check_wandb, read_metrics
from sfd_jax.training.monitor import Profiler, device_memory, speed
from sfd_jax.training.optimizer import check_average, make_optimizer
from sfd_jax.training.randomness import stream_key
from sfd_jax.training.record import claim_workdir
from sfd_jax.training.state import TrainState, abstract_state, init_state, state_from_params
from sfd_jax.training.step import TrainConfig, add_metrics, make_train_step, mean_metrics
from sfd_jax.training.task import Task

EXIT_PREEMPTED = TryAgain.status


class Preempted(SystemExit):
    """End the process with status 75 after a SIGTERM, with everything saved; the same command resumes."""

    def __init__(self):
        super().__init__(EXIT_PREEMPTED)


def fit(
    task: Task,
    batches: Callable[[int], Iterator[dict[str, np.ndarray]]],
    config: TrainConfig,
    workdir: epath.PathLike,
    *,
    mesh: Mesh,
    seed: int = 0,
    metadata: dict | None = None,
    params: dict | None = None,
    evaluate: Callable[[TrainState, int], dict[str, float | np.ndarray]] | None = None,
    best: str = "",
    ideal_seconds: float | None = None,
    profile: tuple[int, int] | None = None,
    progress: bool = True,
) -> TrainState:
    """Train until `config.steps`, resuming from the folder's newest checkpoint.

    Args:
      task: what is trained.
      batches: start_step -> iterator over this host's rows of each batch (`distributed.host_rows`), name to
        (per-host B, ...) array.
      config: length, batch, EMA, optimizer and intervals.
      workdir: folder of the run, local or gs://.
      mesh: from `make_mesh`.
      seed: seed of initial parameters and of the loss's randomness.
      metadata: JSON-able dict saved with each checkpoint (see checkpoint.py); its "config" and
        "latent_statistics" are part of the run's identity.
      params: parameters to start from instead of random ones, where there is no checkpoint; their hash becomes part
        of the run's identity, and to resume it they may be given again or be None.
      evaluate: (state, step) -> numbers and pictures for the log, called before each checkpoint.
      best: name of one of its numbers; the checkpoint with the smallest is kept.
      ideal_seconds: time of a step at the devices' peak rate, for the log's `mfu`; None leaves that out.
      profile: first and last step of which JAX's profiler records a trace, into the folder's `profile/`.
      progress: show a progress bar on host 0.

    Returns:
      The final TrainState.

    Raises:
      SfdError: the folder is another run's, is in use or cannot be written, a batch has the wrong size, or
        `config.max_bad_steps` steps in a row were not finite.
      Preempted: SIGTERM on any host; the state is saved after the step that is running or compiling.
    """
    check_wandb(config.wandb)
    with FolderLock(workdir) as lock:
        workdir, metadata = epath.Path(workdir), metadata or {}
        watch = evaluate, best, ideal_seconds, Profiler(workdir, profile), progress
        return _fit(lock, task, batches, config, workdir, mesh, seed, metadata, params, *watch)


def _fit(
    lock,
    task,
    batches,
    config,
    workdir,
    mesh,
    seed,
    metadata,
    params,
    evaluate,
    best,
    ideal_seconds,
    profiler,
    progress,
) -> TrainState:
    # --- Work folder: one folder, one run -----------------------------------------------------------------
    metadata = _complete(metadata, task, seed, params)
    claimed = _claim(workdir, metadata, config)

    # --- State: the newest checkpoint, else the given parameters, else random ones; created sharded ---------
    optimizer = make_optimizer(config.optimizer, config.steps)
    train_step = make_train_step(task, optimizer, config, mesh)
    checkpointer = Checkpointer(workdir / "checkpoints", config.keep_last, config.keep_every)
    first = checkpointer.latest_step() or 0
    if not first and claimed.get("init") and params is None:
        raise SfdError(f"{workdir} was started with --init and has no checkpoint yet: give the same --init again")
    metadata["init"] = claimed.get("init")
    metadata["average"] = {"decay": config.ema_decay, "from": "given weights" if metadata["init"] else "drawn weights"}
    if first:
        state = checkpointer.restore(abstract_state(task, optimizer, mesh, config.average_on_host))
        say(f"{task.name}: " + (_nothing_left(first, config) or f"resuming from step {first} of {config.steps}"))
    elif params is not None:
        state = state_from_params(params, optimizer, mesh, config.average_on_host)
    else:
        for note in check_average(config.ema_decay, config.steps):
            say(f"note: {note}")
        state = init_state(task, optimizer, mesh, seed, config.average_on_host)
    key = stream_key(seed, "loss", mesh)
    scored = {row["step"]: row.get(best) for row in read_metrics(workdir) if best and row["step"] <= first}

    # --- Loop: step, log, evaluate, save, and only then draw the next batch ---------------------------------
    try:
        with (
            Heartbeat(workdir, "train") as heartbeat,
            MetricsLog(workdir, first, config.wandb, metadata.get("config")) as log,
            profiler,
            preemption_watch() as preempted,
            _bar(task.name, first, config.steps, progress) as bar,
        ):
            iterator, total, metrics = batches(first), None, None
            for step in range(first + 1, config.steps + 1):
                try:
                    rows = next(iterator)
                except Exception:
                    # A machine that shuts down stops the loader's processes too: start new ones for the last steps.
                    # Any other fault is raised again.
                    iterator = batches(step - 1)
                    rows = next(iterator)
                batch = put_batch(_checked(rows, config, mesh), mesh)
                before = metrics
                profiler.before(step, metrics)
                with jax.transfer_guard("disallow"):  # an accidental copy to the host would stall every step
                    state, metrics = train_step(state, batch, key)
                    total = add_metrics(total, metrics)
                # At most one step ahead of the devices: after a SIGTERM, dozens of queued steps would have to finish.
                jax.block_until_ready(before)
                profiler.after(step, metrics)
                heartbeat.at(step - 1)
                bar.update()
                if step == first + 1:  # which was compiled: no rate counts it
                    logged, clock = step, time.monotonic()

                leave = preempted(step)
                save_now = leave or step == config.steps or step % config.checkpoint_every == 0
                if not (save_now or step % config.log_every == 0):
                    continue

                lock.check()
                values = mean_metrics(total)
                _stop_if_bad(state, step, config, checkpointer.latest_step())
                seconds, clock = time.monotonic() - clock, time.monotonic()
                if step > logged:
                    values |= speed((step - logged) / seconds, config.global_batch_size, ideal_seconds)
                values |= device_memory()
                total, logged = None, step
                bar.set_postfix_str(" ".join(f"{k} {values[k]:.4g}" for k in ("loss", "grad_norm") if k in values))
                # Not before an extra checkpoint: that is urgent, and an uninterrupted run would not evaluate here.
                if evaluate and (step == config.steps or step % config.checkpoint_every == 0):
                    heartbeat.phase = "evaluate"
                    values |= evaluate(state, step)
                    scored[step] = values.get(best)
                    checkpointer.best = _smallest(scored)
                    heartbeat.phase = "train"
                log.write(step, values, safely=save_now)
                if save_now:  # after the row: a run that resumes from here does not write it again
                    checkpointer.save(step, state, metadata)
                if leave:
                    checkpointer.wait()
                    say(f"{task.name}: preempted; step {step} is saved, the same command resumes from it")
                    raise Preempted()
            heartbeat.at(config.steps)
            checkpointer.wait()  # while SIGTERM is still caught
            barrier(f"{task.name}: all is saved", timeout=3600.0)
    finally:
        checkpointer.close()
    return state


def check_workdir(
    task: Task,
    config: TrainConfig,
    workdir: epath.PathLike,
    *,
    seed: int = 0,
    metadata: dict | None = None,
    params: dict | None = None,
) -> list[str]:
    """Return a note if `fit` would have nothing left to do; write nothing.

    Raises:
      SfdError: `fit` would refuse the folder, since it holds another run.
    """
    _claim(workdir, _complete(metadata or {}, task, seed, params), config, write=False)
    done = 0
    with contextlib.suppress(SfdError):  # no checkpoint yet
        done = load_metadata(epath.Path(workdir) / "checkpoints")["step"]
    left = _nothing_left(done, config)
    return [f"{workdir} {left}"] if left else []


def _nothing_left(done: int, config: TrainConfig) -> str:
    """Return the end of a sentence, "" if steps are left."""
    left = f"has done {done} steps, so train.steps={config.steps} is already reached"
    return left if done >= config.steps else ""


def _claim(workdir, metadata: dict, config: TrainConfig, write: bool = True) -> dict:
    names = (
        "task",
        "seed",
        "network_config",
        "config",
        "latent_statistics",
        "frozen",
        "init",
        "data_hash",
        "held_out_hash",
    )
    record = {name: metadata[name] for name in names if name in metadata}
    record["fit"] = dataclasses.asdict(config)
    return claim_workdir(workdir, record, may_extend=config.optimizer.may_extend, write=write)


def _complete(metadata: dict, task: Task, seed: int, params: dict | None) -> dict:
    network = task.network
    known = network.metadata() if network is not None else {}
    if task.frozen is not None:
        known["frozen"] = params_hash(task.frozen)
    if "init" not in metadata:
        known["init"] = None if params is None else params_hash(params)
    return {"source": "trained by sfd_jax", **known, **metadata, "task": task.name, "seed": seed}


def _smallest(scored: dict[int, float | None]) -> int | None:
    """Return the step with the smallest score; None if none has one."""
    known = {step: score for step, score in scored.items() if score is not None and np.isfinite(score)}
    return min(known, key=known.get) if known else None


def _bar(name: str, first: int, steps: int, progress: bool) -> ProgressBar:
    hidden = not (progress and is_host0() and first < steps)
    return ProgressBar(desc=name, initial=first, total=steps, unit="step", disable=hidden)


def _checked(batch: dict[str, np.ndarray], config: TrainConfig, mesh: Mesh) -> dict[str, np.ndarray]:
    """Return the arrays that the loss reads, after a check of their size; `index` stays on the host."""
    rows = len(host_rows(mesh, config.global_batch_size))
    for name, array in batch.items():
        if len(array) != rows:
            raise SfdError(
                f"batch['{name}'] has {len(array)} rows; train.global_batch_size={config.global_batch_size} on "
                f"{jax.process_count()} hosts makes {rows}"
            )
    return {name: array for name, array in batch.items() if name != "index"}


def _stop_if_bad(state: TrainState, step: int, config: TrainConfig, saved: int | None) -> None:
    bad = int(state.bad_steps)
    if bad >= config.max_bad_steps:
        raise SfdError(
            f"loss or gradient was not finite in {config.max_bad_steps} steps in a row, from step {step - bad + 1} "
            f"on (train.max_bad_steps); the newest checkpoint is of step {saved or 0}. Look at the rows before it in "
            "metrics.jsonl and at the data; a lower optimizer.learning_rate, optimizer.clip_norm=1 or "
            "model.compute_dtype=float32 usually help"
        )
