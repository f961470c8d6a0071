"""One training step: a pure function from (state, batch, key) to (state, metrics), compiled once.

The step does not touch the host: metrics are (sum, count) pairs that stay on the device until a log
line needs them. The state is donated, so that old and new parameters do not both take memory.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sfd_jax.distributed import batch_sharding, param_shardings, put_same, replicated
from sfd_jax.distributed.mesh import AXES
from sfd_jax.errors import SfdError, nearest
from sfd_jax.execution import choose_execution
from sfd_jax.models.execution import Execution, executing
from sfd_jax.models.stack import REMAT
from sfd_jax.ranges import check_fields
from sfd_jax.training.optimizer import OptimizerConfig, make_schedule
from sfd_jax.training.state import TrainState, abstract_state
from sfd_jax.training.task import Task


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How a run proceeds. Counts are training steps, each of one global batch.

    Attributes:
      optimizer: AdamW and its schedule.
      steps: length of the run.
      global_batch_size: rows a step, over all hosts.
      accumulation: number of parts in which a step processes its batch one after the other, to save memory.
      ema_decay: d in ema = d * ema + (1 - d) * params.
      average_on_host: keep the averaged weights in the hosts' memory, four bytes a parameter; each step takes them to
        the devices and back.
      log_every, checkpoint_every: steps between log lines and between checkpoints.
      keep_last: newest checkpoints kept.
      keep_every: checkpoints at multiples of it are kept forever; 0 for none.
      max_bad_steps: non-finite steps in a row before the run stops.
      wandb: project of Weights & Biases that metrics are sent to; "" for none.
      scan_blocks: run a network's blocks as one compiled loop; False: unrolled (slower to compile); None: the best for
        the devices. This, `remat` and `fused_attention` come from config.model.
      remat: what blocks recompute in the backward pass: "none" nothing, "full" everything, "dots" everything but the
        matmuls with weights, "auto" as much as the devices' memory requires.
      fused_attention: attend by a fused kernel where the devices have one that is faster; False: never.
    """

    optimizer: OptimizerConfig = OptimizerConfig()
    steps: int = 1000
    global_batch_size: int = 64
    accumulation: int = 1
    ema_decay: float = 0.9999
    average_on_host: bool = False
    log_every: int = 100
    checkpoint_every: int = 1000
    keep_last: int = 2
    keep_every: int = 0
    max_bad_steps: int = 20
    wandb: str = ""
    scan_blocks: bool | None = None
    remat: str = "none"
    fused_attention: bool = True

    def __post_init__(self):
        check_fields("train", self)
        if self.remat not in (policies := (*REMAT, "auto")):
            raise SfdError(f"no remat policy '{self.remat}': {nearest(self.remat, policies)}")
        if self.global_batch_size % self.accumulation:
            raise SfdError(
                f"train.global_batch_size={self.global_batch_size} does not divide by "
                f"train.accumulation={self.accumulation}"
            )
        make_schedule(self.optimizer, self.steps)


def make_train_step(
    task: Task,
    optimizer: optax.GradientTransformation,
    config: TrainConfig,
    mesh: Mesh,
    execution: Execution | None = None,
) -> Callable[[TrainState, dict, jax.Array], tuple[TrainState, dict]]:
    """Make the training step for a mesh; its first call compiles it.

    Args:
      task: Task with `init` and `loss`.
      optimizer: from `make_optimizer`.
      config: `accumulation`, `ema_decay`, `average_on_host`, `max_bad_steps`, `scan_blocks`, `remat`, `fused_attention`
        and the schedule are used here.
      mesh: the mesh that holds the state.
      execution: how the task's networks are computed; None chooses it for the mesh.

    Returns:
      step(state, batch, key) -> (state, metrics): `batch` from `put_batch`, `key` the run's stream key (the
      step is folded in here), `metrics` name -> (sum, count) of float32 scalars. `state` is donated. A step
      whose loss or gradient is not finite changes only the counters; so does every step after
      `max_bad_steps` of them in a row, so that the loop may notice later.

    Raises:
      SfdError: the batch does not divide over the mesh and the accumulation.
    """
    step, frozen = _jit_step(task, optimizer, config, mesh, execution), put_frozen(task, mesh)
    return lambda state, batch, key: step(state, batch, key, frozen)


def trace_train_step(
    task: Task,
    optimizer: optax.GradientTransformation,
    config: TrainConfig,
    mesh: Mesh,
    batch: dict,
    execution: Execution | None = None,
) -> jax.stages.Traced:
    """Trace the step of `make_train_step` from shapes, to compile it ahead of time for devices that need not exist.

    Args:
      task, optimizer, config, mesh, execution: as for `make_train_step`; `task.frozen` may hold shapes instead of
        arrays.
      batch: name -> shape and dtype of a global batch's array.

    Raises:
      SfdError: the batch does not divide over the mesh and the accumulation.
    """
    step, frozen = _jit_step(task, optimizer, config, mesh, execution), put_frozen(task, mesh)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return step.trace(abstract_state(task, optimizer, mesh, config.average_on_host), batch, key, frozen)


def _jit_step(task: Task, optimizer, config: TrainConfig, mesh: Mesh, execution: Execution | None = None):
    parts, size = config.accumulation, config.global_batch_size
    if size % (parts * mesh.size):
        raise SfdError(
            f"train.global_batch_size={size} does not divide over {mesh.size} devices times train.accumulation={parts}"
        )
    schedule = make_schedule(config.optimizer, config.steps)
    if execution is None:
        kept = getattr(task.network and task.network.config, "kept_by_dots", 0)
        execution = choose_execution(
            mesh,
            scan=config.scan_blocks,
            remat=config.remat,
            fused_attention=config.fused_attention,
            rows=size // parts,
            kept_by_dots=kept,
        )

    def step(state: TrainState, batch: dict, key: jax.Array, frozen: tuple) -> tuple[TrainState, dict]:
        key = jax.random.fold_in(key, state.step)
        batch = {**batch, "row_indices": jnp.arange(size, dtype=jnp.int32)}

        def loss_fn(params, rows, key):
            with executing(execution):
                return task.loss(params, rows, key, *frozen)

        loss, metrics, grads = _loss_and_grads(loss_fn, state.params, batch, key, parts, mesh)

        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        go = finite & (state.bad_steps < config.max_bad_steps)

        old_average = state.ema_params
        if config.average_on_host:  # fetched after the backward pass, when the devices have room
            old_average, grads = jax.lax.optimization_barrier((old_average, grads))
            old_average = jax.device_put(old_average, shardings.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema_params = jax.tree.map(
            lambda ema, p: config.ema_decay * ema + (1 - config.ema_decay) * p, old_average, params
        )
        keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(go, a, b), new, old)
        new_state = TrainState(
            step=state.step + 1,
            params=keep(params, state.params),
            ema_params=keep(ema_params, old_average),
            opt_state=keep(opt_state, state.opt_state),
            bad_steps=jnp.where(go, 0, state.bad_steps + 1),
            skipped=state.skipped + jnp.where(go, 0, 1),
        )

        metrics["loss"] = loss
        metrics["grad_norm"] = grad_norm
        metrics["update_norm"] = optax.tree.norm(updates)
        metrics["param_norm"] = optax.tree.norm(new_state.params)
        metrics["learning_rate"] = schedule(state.step - state.skipped)
        metrics = {name: _pair(value) for name, value in metrics.items()}
        # A skipped step is left out, or one NaN would spoil the interval's averages.
        metrics = jax.tree.map(lambda x: jnp.where(go, x, 0.0), metrics)
        metrics["skipped"] = (jnp.where(go, 0.0, 1.0), jnp.ones(()))
        return new_state, metrics

    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(task, optimizer, mesh, config.average_on_host))
    frozen_shardings = () if task.frozen is None else (param_shardings(task.frozen, mesh),)
    return jax.jit(
        step,
        in_shardings=(shardings, batch_sharding(mesh), replicated(mesh), frozen_shardings),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )


def put_frozen(task: Task, mesh: Mesh) -> tuple:
    """Put a task's frozen parameters on the mesh, sharded like trained ones: the loss's arguments after the key."""
    return () if task.frozen is None else (put_same(task.frozen, param_shardings(task.frozen, mesh)),)


def add_metrics(total: dict | None, metrics: dict) -> dict:
    """Add a step's (sum, count) pairs to a running total, on the device."""
    return metrics if total is None else _add(total, metrics)


def mean_metrics(total: dict) -> dict[str, float]:
    """Fetch a total and divide each sum by its count; names that were never counted are left out."""
    fetched = jax.device_get(total)
    return {name: float(value / count) for name, (value, count) in fetched.items() if count > 0}


@jax.jit
def _add(total, metrics):
    return jax.tree.map(jnp.add, total, metrics)


def _loss_and_grads(loss_fn, params, batch, key, parts: int, mesh: Mesh):
    """Return (loss, metrics as pairs, gradients), averaged over `parts` slices of the batch."""
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
    if parts == 1:
        (loss, metrics), grads = value_and_grad(params, batch, key)
        return loss, dict(metrics), grads

    # Part p takes rows p, p + parts, ...: each device splits its own rows, and none are moved.
    sharding = NamedSharding(mesh, PartitionSpec(None, AXES))
    cut = lambda x: jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)
    batches = jax.tree.map(lambda x: jax.lax.with_sharding_constraint(cut(x), sharding), batch)

    def add_part(total, rows):
        (loss, metrics), grads = value_and_grad(params, rows, key)
        pairs = {name: _pair(value) for name, value in metrics.items()}
        return jax.tree.map(jnp.add, total, (loss, pairs, grads)), None

    first = jax.tree.map(lambda x: x[0], batches)
    (loss, metrics), grads = jax.eval_shape(value_and_grad, params, first, key)
    pairs = {name: (jnp.zeros(()), jnp.zeros(())) for name in metrics}
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (loss, grads))
    total, _ = jax.lax.scan(add_part, (zeros[0], pairs, zeros[1]), batches)
    loss, metrics, grads = total
    mean = lambda tree: jax.tree.map(lambda x: x / parts, tree)
    return mean(loss), metrics, mean(grads)


def _pair(value) -> tuple[jax.Array, jax.Array]:
    value, count = value if isinstance(value, tuple) else (value, 1.0)
    return jnp.asarray(value, jnp.float32), jnp.asarray(count, jnp.float32)
