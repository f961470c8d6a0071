"""Training: the task (parameters and loss), the step, the loop, and checkpoints.

To train something new, write a function that returns a Task; `fit` does the rest.
"""

from sfd_jax.training.checkpoint import Checkpointer, load_metadata, load_params, save_params
from sfd_jax.training.loop import EXIT_PREEMPTED, Preempted, fit
from sfd_jax.training.optimizer import OptimizerConfig, make_optimizer, make_schedule
from sfd_jax.training.state import TrainState, abstract_state, init_state
from sfd_jax.training.step import TrainConfig, make_train_step
from sfd_jax.training.task import Task

__all__ = [
    "EXIT_PREEMPTED",
    "Checkpointer",
    "OptimizerConfig",
    "Preempted",
    "Task",
    "TrainConfig",
    "TrainState",
    "abstract_state",
    "fit",
    "init_state",
    "load_metadata",
    "load_params",
    "make_optimizer",
    "make_schedule",
    "make_train_step",
    "save_params",
]
