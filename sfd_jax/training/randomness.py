"""Randomness of training: a function of (seed, stream name, step, place of the row), never stored.

So a run resumes exactly, and neither the number of chips nor the way a batch is cut changes what is drawn.
"""

import zlib

import jax
import numpy as np
from jax.sharding import Mesh

from sfd_jax.distributed import replicated
from sfd_jax.ranges import check


def stream_key(seed: int, stream: str, mesh: Mesh) -> jax.Array:
    """Return the key of a stream, on every device of the mesh; fold the step in for that step's draws."""
    check(seed=seed)
    # Under jit, since a key cannot be put by hand on devices that belong to other hosts.
    make = lambda seed: jax.random.fold_in(jax.random.key(seed), zlib.crc32(stream.encode()))
    return jax.jit(make, out_shardings=replicated(mesh))(np.uint32(seed))


def row_keys(key: jax.Array, positions: jax.Array) -> jax.Array:
    """Return one key a row, (B,), from the step's key and the rows' places in the global batch, (B,) int32."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, positions)


def row_normal(key: jax.Array, positions: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Draw standard normals row by row: (B, *shape) float32."""
    return jax.vmap(lambda row_key: jax.random.normal(row_key, shape))(row_keys(key, positions))
