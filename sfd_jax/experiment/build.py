"""From a config's groups to the objects they name; nothing here touches a device but `mesh_from_config`.

A config is any mapping with the groups of configs/sfd.py, or one stage of configs/digits.py, which has the
same shape.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from sfd_jax.diffusion.clocks import make_clocks
from sfd_jax.diffusion.losses import LossConfig
from sfd_jax.errors import Faults, SfdError, nearest
from sfd_jax.latents import LatentLayout
from sfd_jax.models import Network, dit_config
from sfd_jax.training import OptimizerConfig, Task, TrainConfig
from sfd_jax.training.diffusion import diffusion_task
from sfd_jax.training.frozen_features import FrozenFeatures

# Settings of `config.model` that say how the network is computed in training, and are no part of it.
EXECUTION = ("scan_blocks", "remat")


def task_from_config(config: Any, targets: FrozenFeatures | None = None) -> Task:
    """Return the diffusion task of a config; `targets` as `diffusion_task` has them.

    Raises:
      SfdError: a value is unknown, or two values contradict each other; both are named.
    """
    settings = diffusion_settings(config)
    return diffusion_task(network_from_config(config), layout_from_config(config), targets=targets, **settings)


def network_from_config(config: Any) -> Network:
    """Return the LightningDiT of `config.model`, its channels from `latents`, its null label from `loss`."""
    fields = {name: value for name, value in config.model.items() if name not in ("size", *EXECUTION)}
    derived = {
        "in_channels": layout_from_config(config).channels,
        "null_label": config.loss.label_dropout > 0,
    }
    return Network("lightning_dit", dit_config(config.model.size, **{**derived, **fields}))


def layout_from_config(config: Any) -> LatentLayout:
    """Return the channel layout of `config.latents`."""
    return LatentLayout(config.latents.texture_channels, config.latents.semantic_channels)


def diffusion_settings(config: Any) -> dict[str, Any]:
    """Return the clocks and the LossConfig, as keyword arguments of `diffusion_task`."""
    found, settings = Faults(), {}
    with found:
        settings["clocks"] = make_clocks(**config.clocks)
    with found:
        settings["config"] = from_group(LossConfig, "loss", config.loss)
    found.stop()
    return settings


def train_config(config: Any) -> TrainConfig:
    """Return how a run proceeds, from the groups `train` and `optimizer`, and EXECUTION of `model`."""
    found, optimizer = Faults(), OptimizerConfig()
    execution = {name: value for name, value in config.model.items() if name in EXECUTION}
    with found:
        optimizer = from_group(OptimizerConfig, "optimizer", config.optimizer)
    with found:
        train = from_group(TrainConfig, "train", {**config.train, **execution, "optimizer": optimizer})
    found.stop()
    return train


def mesh_from_config(config: Any):
    """Return the mesh of `config.mesh` over all devices."""
    from sfd_jax.distributed import make_mesh

    return make_mesh(**config.mesh)


def from_group(cls: type, name: str, group: Mapping[str, Any]):
    """Make a config dataclass from a group.

    Raises:
      SfdError: the group has a key that the class lacks, or lacks one that it needs.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in group:
        if key not in fields:
            raise SfdError(f"config group '{name}' has no key '{key}'; {nearest(key, fields)}")
    needed = [key for key, field in fields.items() if key not in group and _is_required(field)]
    if needed:
        raise SfdError(f"config group '{name}' lacks {', '.join(needed)}")
    return cls(**group)


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
