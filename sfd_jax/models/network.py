"""A network as a pure function of plain arrays: the door between NNX and the rest of the house.

NNX builds the module once; outside of this file parameters are nested dicts with string keys, which
is what checkpoints hold, what shardings are derived from and what the optimizer updates. Nothing
else of NNX (graph definitions, variables, random state) leaves the room.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from sfd_jax.errors import SfdError, nearest
from sfd_jax.models.execution import current

# Fields of configs written before an `Execution` took their place: read and passed over.
FORMER_FIELDS = {"scan_blocks", "remat"}

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Network:
    """One architecture at one size: `init` makes parameters, `apply` computes with them.

    Hashable, so it may be a static argument of a jitted function.

    Args:
      name: a key of `sfd_jax.models.NETWORKS`.
      config: that network's config, as its dataclass or as a dict of its fields (lists are taken
        for tuples, so a dict read from JSON will do).

    Raises:
      SfdError: unknown name, unknown or missing field, or a config that cannot be built.
    """

    name: str
    config: Any

    def __post_init__(self):
        from sfd_jax.models import NETWORKS

        if self.name not in NETWORKS:
            raise SfdError(f"no network named '{self.name}': {nearest(self.name, NETWORKS)}")
        config_cls, _ = NETWORKS[self.name]
        if not isinstance(self.config, config_cls):
            object.__setattr__(self, "config", _read_config(config_cls, self.config))

    def init(self, key: jax.Array) -> Params:
        """Return freshly initialised parameters, float32; a function of `key` alone, jit-able."""
        return _string_keys(nnx.to_pure_dict(nnx.state(self._build(key))))

    def abstract_params(self) -> Params:
        """Return the tree of `init` with a ShapeDtypeStruct at each leaf; allocates nothing."""
        return self._blueprint[1]

    def apply(self, params: Params, *args, method: str = "__call__", **kwargs):
        """Call the network (or another of its methods) with `params`; pure and jit-able.

        How it is computed is what the surrounding `execution.executing` says.

        Raises:
          SfdError: `params` is not the tree of `abstract_params` (each differing path is named).
        """
        graphdef, abstract = self._blueprint
        _check_same_tree(self.name, params, abstract)
        module = nnx.merge(graphdef, nnx.restore_int_paths(params))
        module.set_attributes(execution=current(), raise_if_not_found=False)
        return getattr(module, method)(*args, **kwargs)

    def num_params(self) -> int:
        """Return the number of parameters; allocates nothing."""
        return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(self.abstract_params()))

    def config_dict(self) -> dict[str, Any]:
        """Return the config as JSON-able values; `Network(name, config_dict)` builds it again."""
        fields = dataclasses.asdict(self.config)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}

    def _build(self, key):
        from sfd_jax.models import NETWORKS

        return NETWORKS[self.name][1](self.config, rngs=nnx.Rngs(params=key))

    @functools.cached_property
    def _blueprint(self):
        # The key is made inside the traced function: even a scalar key would be an allocation.
        graphdef, state = nnx.split(nnx.eval_shape(lambda: self._build(jax.random.key(0))))
        return graphdef, _string_keys(nnx.to_pure_dict(state))


def network_of(metadata: Mapping[str, Any], kind: str, **changes) -> Network:
    """Build the network that a checkpoint's metadata tell of.

    Args:
      metadata: see `training.checkpoint`; "given_as" (a command's flag) names the checkpoint in messages.
      kind: the key of `NETWORKS` that is needed.
      **changes: fields of the config to set otherwise, where that network's config has them.

    Raises:
      SfdError: the checkpoint is of another network; both are named.
    """
    if (found := metadata.get("network")) != kind:
        raise SfdError(f"{checkpoint_name(metadata)} holds '{found}', expected '{kind}': give a checkpoint of that one")
    network = Network(kind, metadata["network_config"])
    changes = {name: value for name, value in changes.items() if value and hasattr(network.config, name)}
    return Network(kind, {**network.config_dict(), **changes})


def checkpoint_name(metadata: Mapping[str, Any]) -> str:
    """Return what messages call a checkpoint."""
    return metadata.get("given_as") or f"checkpoint {metadata.get('source') or ''}".strip()


def _read_config(config_cls, values):
    names = {field.name for field in dataclasses.fields(config_cls)}
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in dict(values).items()}
    values = {k: v for k, v in values.items() if k in names or k not in FORMER_FIELDS}
    for key in values:
        if key not in names:
            raise SfdError(f"{config_cls.__name__} has no field '{key}': {nearest(key, names)}")
    required = {field.name for field in dataclasses.fields(config_cls) if field.default is dataclasses.MISSING}
    if missing := required - values.keys():
        raise SfdError(f"{config_cls.__name__} needs a value for: " + ", ".join(sorted(missing)))
    return config_cls(**values)


def _string_keys(tree):
    """Turn the integer keys that NNX gives to list entries into strings, as checkpoints need."""
    if not isinstance(tree, dict):
        return tree
    return {str(key): _string_keys(value) for key, value in tree.items()}


def _check_same_tree(name, params, abstract):
    found, wanted = _shapes(params), _shapes(abstract)
    if found == wanted:
        return
    lines = []
    for path in sorted(found.keys() | wanted.keys()):
        if path not in found:
            lines.append(f"  missing {path} {wanted[path]}")
        elif path not in wanted:
            lines.append(f"  extra {path} {found[path]}")
        elif found[path] != wanted[path]:
            lines.append(f"  {path} is {found[path]}, the network needs {wanted[path]}")
    raise SfdError(
        f"these parameters are not of this {name} config (was it saved with another one?):\n" + "\n".join(lines)
    )


def _shapes(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
