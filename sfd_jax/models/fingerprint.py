"""A hash of a set of parameters, so that a result can name the weights it came from."""

import hashlib

import jax
import numpy as np

from sfd_jax.models.network import Params
from sfd_jax.trees import named_leaves


def params_hash(params: Params) -> str:
    """Return a hex digest of all paths, shapes and values of a tree of arrays.

    The same for numpy and jax arrays, for any order in which the dicts were filled, and for floats of any width that
    float32 holds: a checkpoint has one hash however it is stored.

    Args:
      params: nested dicts of arrays that this host can read whole.
    """
    digest = hashlib.sha256()
    for name, leaf in named_leaves(params).items():
        array = np.asarray(leaf)
        if jax.numpy.issubdtype(array.dtype, np.floating) and array.dtype.itemsize < 4:
            array = array.astype(np.float32)
        array = np.ascontiguousarray(array)
        digest.update(f"{name} {array.shape} {array.dtype}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8))
    return digest.hexdigest()
