"""Checksums of arrays that do not depend on how the arrays are split over devices or hosts.

Orbax 0.12 writes Zarr chunks without a checksum (its Zarr 3 codecs cannot be chosen either), so a flipped bit of
uncompressible weights is read without an error. The checksum is taken of the global array: a sum, modulo 2^32, of
one word for each element, mixed with the element's position. Since the mixing is a bijection, a change of one
element always changes the sum; other changes go unnoticed with a probability of 2^-32. Integer sums are exact in
any order, so every mesh gives the same checksum.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sfd_jax.trees import named_leaves

_CHUNK = 2**18  # elements mixed at once on the host, so that the intermediate values stay in its cache


def checksums(tree: Any) -> dict[str, str]:
    """Return the checksum of each array of a tree.

    Args:
      tree: nested dicts of numpy or jax arrays; with several hosts all of them pass the same global arrays.

    Returns:
      Path, its parts joined by dots, to eight hexadecimal digits.
    """
    named = named_leaves(tree, ".")
    far = [leaf for leaf in named.values() if not _near(leaf)]
    of_devices = iter(np.asarray(_on_device(far)) if far else ())  # one program, so that hosts synchronise once
    sums = {name: _on_host(leaf) if _near(leaf) else next(of_devices) for name, leaf in named.items()}
    return {name: f"{int(value):08x}" for name, value in sums.items()}


def _mixed(words, index):
    """Mix words with their positions, uint32 of numpy or jax (the finalizer of MurmurHash3)."""
    x = words ^ (index * np.uint32(0x9E3779B1))
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


def _near(leaf) -> bool:
    """Return whether the host can read an array directly, which saves a compilation for each shape."""
    if not isinstance(leaf, jax.Array):
        return True
    return leaf.is_fully_addressable and next(iter(leaf.devices())).platform == "cpu"


@jax.jit
def _on_device(arrays: list[jax.Array]) -> jax.Array:
    return jnp.stack([_sum(array) for array in arrays])


def _sum(array: jax.Array) -> jax.Array:
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    words = jax.lax.bitcast_convert_type(array, f"uint{8 * array.dtype.itemsize}").astype(jnp.uint32)
    index, stride = jnp.zeros(array.shape, jnp.uint32), 1
    for axis in reversed(range(array.ndim)):
        index += jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis) * np.uint32(stride % 2**32)
        stride *= array.shape[axis]
    return jnp.sum(_mixed(words, index), dtype=jnp.uint32)


def _on_host(array) -> int:
    flat = np.ascontiguousarray(array).reshape(-1)
    flat = flat.view(f"uint{8 * min(4, flat.dtype.itemsize)}")  # two words for 64 bits
    total = 0
    for first in range(0, len(flat), _CHUNK):
        words = flat[first : first + _CHUNK].astype(np.uint32)
        index = np.arange(first, first + len(words), dtype=np.uint64).astype(np.uint32)
        total += int(_mixed(words, index).sum(dtype=np.uint64))
    return total % 2**32
