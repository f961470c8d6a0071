"""A network as a pure function of plain arrays: the boundary between NNX and the rest of the code.

NNX builds the module once; outside this file parameters are nested dicts with string keys, which
checkpoints hold, shardings are derived from and the optimizer updates. Nothing else of NNX (graph
definitions, variables, random state) leaves this file.
"""

import dataclasses
import functools
from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from sfd_jax.errors import SfdError
from sfd_jax.models.execution import current
from sfd_jax.registry import Registry
from sfd_jax.settings import from_group
from sfd_jax.trees import shape_faults, shapes_by_name

# Fields of old configs, now replaced by `Execution`: read and ignored.
FORMER_FIELDS = {"scan_blocks", "remat"}

Params = dict[str, Any]

# Config and module class of each network.
NETWORKS: Registry[tuple[type, type[nnx.Module]]] = Registry("network")


@dataclasses.dataclass(frozen=True)
class Network:
    """One architecture at one size: `init` makes parameters, `apply` computes with them.

    Hashable, so it may be a static argument of a jitted function.

    Args:
      name: a key of `sfd_jax.models.NETWORKS`.
      config: that network's config, as its dataclass or as a dict of its fields (lists become
        tuples, so a dict read from JSON works).

    Raises:
      SfdError: unknown name, unknown or missing field, or a config that cannot be built.
    """

    name: str
    config: Any

    def __post_init__(self):
        config_cls, _ = NETWORKS[self.name]
        if not isinstance(self.config, config_cls):
            former = FORMER_FIELDS - {field.name for field in dataclasses.fields(config_cls)}
            fields = {name: value for name, value in dict(self.config).items() if name not in former}
            object.__setattr__(self, "config", from_group(config_cls, fields))

    def init(self, key: jax.Array) -> Params:
        """Return freshly initialised parameters, float32; a function of `key` alone, jit-able."""
        return _string_keys(nnx.to_pure_dict(nnx.state(self._build(key))))

    def abstract_params(self) -> Params:
        """Return the tree of `init` with a ShapeDtypeStruct at each leaf; allocates nothing."""
        return self._blueprint[1]

    def apply(self, params: Params, *args, method: str = "__call__", **kwargs) -> Any:
        """Call the network (or another of its methods) with `params`; pure and jit-able.

        The surrounding `execution.executing` decides how it is computed.

        Raises:
          SfdError: `params` is not the tree of `abstract_params` (each differing path is named).
        """
        graphdef, _ = self._blueprint
        self.check(params)
        module = nnx.merge(graphdef, nnx.restore_int_paths(params))
        module.set_attributes(execution=current(), raise_if_not_found=False)
        return getattr(module, method)(*args, **kwargs)

    def check(self, params: Params) -> None:
        """Raise SfdError, naming each differing path, where `params` is not the tree of `abstract_params`."""
        if lines := shape_faults(shapes_by_name(params), shapes_by_name(self.abstract_params())):
            raise SfdError(
                f"these parameters do not fit this {self.name} config (were they saved with another one?): "
                f"{self.described()}\n" + "\n".join(lines)
            )

    def num_params(self) -> int:
        """Return the number of parameters; allocates nothing."""
        return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(self.abstract_params()))

    def config_dict(self) -> dict[str, Any]:
        """Return the config as JSON-able values; `Network(name, config_dict)` builds it again."""
        fields = dataclasses.asdict(self.config)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}

    def described(self) -> str:
        """Return the config as text."""
        return ", ".join(f"{key} {value}" for key, value in self.config_dict().items())

    def metadata(self) -> dict[str, Any]:
        """Return what a checkpoint records of the network, for `network_of`."""
        known = {"network": self.name, "network_config": self.config_dict()}
        module = NETWORKS.registered_in(self.name)
        return known | {"registered_in": module} if module else known

    def _build(self, key):
        return NETWORKS[self.name][1](self.config, rngs=nnx.Rngs(params=key))

    @property
    def _blueprint(self):
        return _blueprint_of(NETWORKS[self.name][1], self.config)


@functools.lru_cache(maxsize=128)  # for all equal networks, since NNX takes a second to build one
def _blueprint_of(module: type[nnx.Module], config: Any):
    # The key is made inside the traced function: even a scalar key would be an allocation.
    graphdef, state = nnx.split(nnx.eval_shape(lambda: module(config, rngs=nnx.Rngs(params=jax.random.key(0)))))
    return graphdef, _string_keys(nnx.to_pure_dict(state))


def network_of(metadata: Mapping[str, Any], kind: str | Collection[str], **changes) -> Network:
    """Build the network that a checkpoint's metadata describes.

    Args:
      metadata: see `training.checkpoint`; "given_as" (a command's flag) names the checkpoint in messages.
      kind: the key of `NETWORKS` that is needed, or several valid ones.
      **changes: config fields to change, where that network's config has them.

    Raises:
      SfdError: the checkpoint holds another network (both are named), or one whose module is not imported.
    """
    found, kinds = metadata.get("network"), (kind,) if isinstance(kind, str) else kind
    if metadata.get("registered_in"):
        NETWORKS.find(found, metadata["registered_in"])
    if found not in kinds:
        expected = " or ".join(f"'{kind}'" for kind in kinds)
        raise SfdError(
            f"{checkpoint_name(metadata)} holds '{found}', expected {expected}: give a checkpoint of that network"
        )
    network = Network(found, metadata["network_config"])
    changes = {name: value for name, value in changes.items() if value and hasattr(network.config, name)}
    return Network(found, {**network.config_dict(), **changes})


def checkpoint_name(metadata: Mapping[str, Any]) -> str:
    """Return what messages call a checkpoint."""
    return metadata.get("given_as") or f"checkpoint {metadata.get('source') or ''}".strip()


def _string_keys(tree):
    """Turn the integer keys that NNX gives to list entries into strings, as checkpoints need."""
    if not isinstance(tree, dict):
        return tree
    return {str(key): _string_keys(value) for key, value in tree.items()}
