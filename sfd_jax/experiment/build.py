"""From a config's groups to the objects they name; only `mesh_from_config` touches devices.

A config is any mapping with the groups of configs/sfd.py, such as a stage of configs/digits.py.
"""

from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from sfd_jax.diffusion.clocks import CLOCKS, make_clocks
from sfd_jax.diffusion.few_step import FewStepConfig
from sfd_jax.diffusion.losses import LossConfig, make_terms
from sfd_jax.diffusion.predictions import transport_of
from sfd_jax.distributed import make_mesh
from sfd_jax.errors import Faults
from sfd_jax.latents import LatentLayout
from sfd_jax.models import Network, dit_config
from sfd_jax.settings import from_group
from sfd_jax.training import OptimizerConfig, Task, TrainConfig
from sfd_jax.training.diffusion import check_parts, diffusion_task
from sfd_jax.training.few_step import few_step_task
from sfd_jax.training.frozen_features import FrozenFeatures

# Settings of `config.model` that change how the network is computed in training, but not the network.
EXECUTION = ("scan_blocks", "remat", "fused_attention")


def task_from_config(config: ConfigDict, targets: FrozenFeatures | None = None) -> Task:
    """Return the diffusion task of a config; `targets` as `diffusion_task` has them.

    Raises:
      SfdError: a value is unknown, or two values contradict each other; both are named.
    """
    settings = diffusion_settings(config)
    return diffusion_task(network_from_config(config), layout_from_config(config), targets=targets, **settings)


def few_step_from_config(config: ConfigDict, teachers: dict[str, tuple[Network, dict]]) -> Task:
    """Return the few-step task of a config; `teachers` as `few_step_task` has them.

    Raises:
      SfdError: a value is unknown, or two values contradict each other; both are named.
    """
    network, layout, settings = network_from_config(config), layout_from_config(config), diffusion_settings(config)
    check_parts(network, layout, **settings)
    few_step = from_group(FewStepConfig, config.few_step, "config group 'few_step'")
    return few_step_task(network, layout, settings["clocks"], settings["config"], few_step, teachers)


def network_from_config(config: ConfigDict, **changes) -> Network:
    """Return the LightningDiT of `config.model`, its channels from `latents`, its null label from `loss`."""
    fields = {name: value for name, value in config.model.items() if name not in ("size", *EXECUTION)}
    derived = {
        "in_channels": layout_from_config(config).channels,
        "null_label": config.loss.label_dropout > 0,
    }
    return Network("lightning_dit", dit_config(config.model.size, **{**derived, **fields, **changes}))


def layout_from_config(config: ConfigDict) -> LatentLayout:
    """Return the channel layout of `config.latents`."""
    return LatentLayout(config.latents.texture_channels, config.latents.semantic_channels)


def diffusion_settings(config: ConfigDict) -> dict[str, Any]:
    """Return the clocks and the LossConfig, as keyword arguments of `diffusion_task`."""
    found, settings = Faults(), {}
    with found:
        settings["clocks"] = make_clocks(config.clocks)
    with found:
        terms = make_terms(config.loss.get("terms", {}))
        group = {**config.loss, **transport_of(config), "terms": terms}
        settings["config"] = from_group(LossConfig, group, "config group 'loss'")
    found.stop()
    return settings


def registered_in(config: Mapping[str, Any]) -> dict[str, str | None]:
    """Return which module outside this package registered the clocks; checkpoints keep it for messages."""
    return {"clocks": CLOCKS.registered_in(config["clocks"]["name"])}


def train_config(config: ConfigDict) -> TrainConfig:
    """Return the TrainConfig of the groups `train` and `optimizer`, and the EXECUTION settings of `model`."""
    found, optimizer = Faults(), OptimizerConfig()
    execution = {name: value for name, value in config.model.items() if name in EXECUTION}
    with found:
        optimizer = from_group(OptimizerConfig, config.optimizer, "config group 'optimizer'")
    with found:
        group = {**config.train, **execution, "optimizer": optimizer}
        train = from_group(TrainConfig, group, "config group 'train'")
    found.stop()
    return train


def mesh_from_config(config: ConfigDict) -> Mesh:
    """Return the mesh of `config.mesh` over all devices."""
    return make_mesh(**config.mesh)
