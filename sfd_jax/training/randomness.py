"""Randomness of training: a function of (seed, stream name, step, place of the row), never stored.

So a run resumes exactly. `sfd_jax.randomness` has the part that goes by rows.
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
