"""One rule from shapes to shardings, for parameters, optimizer moments and EMA alike."""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sfd_jax.distributed.mesh import AXES
from sfd_jax.errors import SfdError

# Below this many elements (32 KiB in float32) an array costs less replicated than gathered.
MIN_ELEMENTS = 8192


def shard_rule(shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Split the largest dimension that `fsdp` divides; leave small or indivisible arrays whole.

    Args:
      shape: the array's shape.
      mesh: a mesh with an axis "fsdp".

    Returns:
      A PartitionSpec naming "fsdp" at most once; the earlier of two equal dimensions is split, since TPU
      tiles are widest along the last.
    """
    parts = mesh.shape["fsdp"]
    dims = [axis for axis, size in enumerate(shape) if size % parts == 0]
    if parts == 1 or not dims or math.prod(shape) < MIN_ELEMENTS:
        return PartitionSpec()
    largest = max(dims, key=lambda axis: shape[axis])
    return PartitionSpec(*(None,) * largest, "fsdp")


def param_shardings(abstract_tree: Any, mesh: Mesh) -> Any:
    """Return the tree of NamedShardings that `shard_rule` gives for a tree of arrays or their shapes."""
    return jax.tree.map(lambda x: NamedSharding(mesh, shard_rule(x.shape, mesh)), abstract_tree)


def with_shardings(abstract_tree: Any, shardings: Any) -> Any:
    """Return the tree of ShapeDtypeStructs with their shardings attached, e.g. as a restore target."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), abstract_tree, shardings
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of a batch: its first axis over both mesh axes, the others whole."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of a value that is replicated on every device."""
    return NamedSharding(mesh, PartitionSpec())


def host_rows(mesh: Mesh, global_batch_size: int) -> np.ndarray:
    """Return which rows of a global batch this host's devices hold.

    On a TPU slice they are not contiguous: the mesh follows the links between chips, not the hosts.

    Args:
      mesh: the mesh.
      global_batch_size: rows of the batch over all hosts.

    Returns:
      int64 (per-host B,), ascending; over all hosts each of 0..global_batch_size-1 once.

    Raises:
      SfdError: the batch does not divide over the mesh.
    """
    if global_batch_size % mesh.size:
        raise SfdError(f"a batch of {global_batch_size} rows does not divide over {mesh.size} devices")
    blocks = batch_sharding(mesh).addressable_devices_indices_map((global_batch_size,)).values()
    return np.sort(np.concatenate([np.arange(global_batch_size)[block] for block in blocks]))


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Make global arrays from this host's rows of a batch.

    Args:
      batch: name to (per-host B, ...) array; every host passes the rows of `host_rows`, in that order.
      mesh: the mesh; its size divides the global batch.

    Returns:
      name to (global B, ...) array, first axis split over the mesh: the same rows in the same places on any number
      of hosts and in any order of devices.

    Raises:
      SfdError: the rows do not divide over this host's devices.
    """
    sharding = batch_sharding(mesh)
    devices = len(sharding.addressable_devices)

    def put(array):
        if len(array) % devices:
            raise SfdError(f"{len(array)} rows of a batch do not divide over {devices} devices of this host")
        size = len(array) // devices * mesh.size
        rows = host_rows(mesh, size)

        def block(index):
            first = np.searchsorted(rows, index[0].start or 0)
            return array[first : first + size // mesh.size]

        return jax.make_array_from_callback((size, *array.shape[1:]), sharding, block)

    return {name: put(np.asarray(array)) for name, array in batch.items()}


def put_same(tree: Any, shardings: Any) -> Any:
    """Make global arrays from arrays that are the same on every host, e.g. parameters read from disk.

    `jax.device_put` would first send everything between the hosts to check that they agree. Shapes
    (jax.ShapeDtypeStruct) stay shapes and get their shardings: a program can be lowered from them.

    Args:
      tree: arrays, or shapes.
      shardings: a sharding for each of them, or one for all.

    Returns:
      The tree of global arrays.
    """

    def put(array, sharding):
        if isinstance(array, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    if isinstance(shardings, NamedSharding):
        return jax.tree.map(lambda array: put(array, shardings), tree)
    return jax.tree.map(put, tree, shardings)
