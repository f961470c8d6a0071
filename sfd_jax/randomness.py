"""Randomness by row: what a row draws depends only on a key and on the row's place in the global batch.

Neither the number of devices nor the way a batch is split changes it.
"""

import jax


def keys_by_row(key: jax.Array, row_indices: jax.Array) -> jax.Array:
    """Return one key a row.

    Args:
      key: of a seed, or of a stream and step.
      row_indices: (B,) int32 or uint32 places in the global batch.

    Returns:
      (B,) keys.
    """
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, row_indices)


def normal_by_row(key: jax.Array, row_indices: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Draw standard normals row by row.

    Args:
      key, row_indices: as in `keys_by_row`.
      shape: of a row.

    Returns:
      (B, *shape) float32.
    """
    return jax.vmap(lambda row_key: jax.random.normal(row_key, shape))(keys_by_row(key, row_indices))
