"""The training state: everything that a step changes, created sharded."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from sfd_jax.distributed import param_shardings, put_same, with_shardings
from sfd_jax.distributed.sharding import MIN_ELEMENTS
from sfd_jax.training.randomness import stream_key
from sfd_jax.training.task import Task

HOST = "pinned_host"  # JAX's name of a host's memory from which its devices read directly


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Input and output of a training step.

    Attributes:
      step: int32, batches seen; also the position in the data and in every stream of randomness.
      params: nested dict of float32 arrays.
      ema_params: the same tree, averaged over the steps; used by sampling.
      opt_state: the optimizer's state; its own count is of updates, so `step - skipped`.
      bad_steps: int32, steps in a row up to now whose loss or gradient was not finite.
      skipped: int32, total number of such steps.
    """

    step: jax.Array
    params: dict
    ema_params: dict
    opt_state: optax.OptState
    bad_steps: jax.Array
    skipped: jax.Array

    def average(self) -> dict:
        """Return `ema_params` in the devices' memory, wherever the state keeps them."""
        kept_there = lambda x: x.sharding.memory_kind == HOST
        put = lambda x: jax.device_put(x, x.sharding.with_memory_kind("device")) if kept_there(x) else x
        return jax.tree.map(put, self.ema_params)


def state_shardings(state: TrainState, mesh: Mesh, average_on_host: bool = False) -> TrainState:
    """Return where a state, given by its arrays or their shapes, is kept.

    Args:
      state: the arrays or shapes.
      mesh: the mesh that holds the state.
      average_on_host: keep the arrays of `ema_params` in the memory of the hosts, each part at the host of its device;
        those below MIN_ELEMENTS elements stay on the devices.
    """
    shardings = param_shardings(state, mesh)
    if not average_on_host:
        return shardings
    # Small arrays stay: they save nothing, and libtpu cannot write parts of a vector into a host's memory.
    there = lambda x, own: own.with_memory_kind(HOST) if x.size >= MIN_ELEMENTS else own
    return dataclasses.replace(shardings, ema_params=jax.tree.map(there, state.ema_params, shardings.ema_params))


def abstract_state(
    task: Task, optimizer: optax.GradientTransformation, mesh: Mesh, average_on_host: bool = False
) -> TrainState:
    """Return the state's shapes, dtypes and shardings; allocates nothing.

    Args:
      task: the Task whose `init` makes the parameters.
      optimizer: from `make_optimizer`.
      mesh: the mesh that will hold the state.
      average_on_host: as for `state_shardings`.

    Returns:
      A TrainState of ShapeDtypeStructs with shardings: the target of a restore.
    """
    shapes = jax.eval_shape(lambda params: _first_state(params, optimizer), task.abstract_params)
    return with_shardings(shapes, state_shardings(shapes, mesh, average_on_host))


def init_state(
    task: Task, optimizer: optax.GradientTransformation, mesh: Mesh, seed: int, average_on_host: bool = False
) -> TrainState:
    """Make the state of step 0, each part directly on the chips that keep it.

    Args:
      task: the Task whose `init` makes the parameters.
      optimizer: from `make_optimizer`.
      mesh: the mesh that holds the state.
      seed: seed of the run; parameters are drawn from its stream "init".
      average_on_host: as for `state_shardings`.

    Returns:
      A TrainState with the shardings of `abstract_state` and the same values on every mesh.
    """
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(task, optimizer, mesh, average_on_host))
    # It runs once, and LLVM's optimisation took six times as long as the rest of the compilation.
    quick = {"xla_backend_optimization_level": 0} if mesh.devices.flat[0].platform == "cpu" else None
    make = lambda key: _first_state(task.init(key), optimizer)
    init = jax.jit(make, out_shardings=shardings, compiler_options=quick)
    return init(stream_key(seed, "init", mesh))


def state_from_params(
    params: dict, optimizer: optax.GradientTransformation, mesh: Mesh, average_on_host: bool = False
) -> TrainState:
    """Make the state of step 0 around given parameters, e.g. converted ones to train further."""
    shapes = jax.eval_shape(lambda p: _first_state(p, optimizer), params)
    shardings = state_shardings(shapes, mesh, average_on_host)
    params = put_same(params, shardings.params)
    return jax.jit(lambda p: _first_state(p, optimizer), out_shardings=shardings)(params)


def _first_state(params, optimizer) -> TrainState:
    zero = jnp.zeros((), jnp.int32)
    # The copy keeps EMA and parameters apart when the step donates both.
    ema_params = jax.tree.map(jnp.copy, params)
    return TrainState(zero, params, ema_params, optimizer.init(params), zero, zero)
