"""A name for a set of parameters, so that a number can say which weights it came from."""

import hashlib

import jax
import numpy as np


def params_hash(params) -> str:
    """Return a hex digest of all paths, shapes, dtypes and values of a tree of arrays.

    The same for numpy and jax arrays, and for whatever order the dicts were filled in.

    Args:
      params: nested dicts of arrays that this host can read whole.
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.ascontiguousarray(leaf)
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        digest.update(f"{name} {array.shape} {array.dtype}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8))
    return digest.hexdigest()
