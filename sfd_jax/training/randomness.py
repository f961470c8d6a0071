"""Randomness of training: a function of (seed, stream name, step, row index), never stored.

So a run resumes exactly. `sfd_jax.randomness` draws by row.
"""

import zlib

import jax
import numpy as np
from jax.sharding import Mesh

from sfd_jax.distributed import replicated
from sfd_jax.ranges import check


def stream_key(seed: int, stream: str, mesh: Mesh) -> jax.Array:
    """Return the key of a stream, on every device of the mesh; fold in the step for that step's draws."""
    check(seed=seed)
    # Under jit, since a key cannot be put on other hosts' devices by hand.
    make = lambda seed: jax.random.fold_in(jax.random.key(seed), zlib.crc32(stream.encode()))
    return jax.jit(make, out_shardings=replicated(mesh))(np.uint32(seed))
