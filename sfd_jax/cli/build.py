"""The former place of `experiment/build.py`, kept for older scripts."""

from sfd_jax.experiment.build import layout_from_config, network_from_config, task_from_config, train_config

__all__ = ["layout_from_config", "network_from_config", "task_from_config", "train_config"]
