"""Scaled dot-product attention, the one place where a backend's kernel would be chosen."""

import jax


def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Attend from every token to every token.

    Args:
      query, key, value: (B, N, K, E) of one dtype; matmuls run in it.

    Returns:
      (B, N, K, E) in the same dtype; logits and softmax are float32, scale 1/sqrt(E).
    """
    return jax.nn.dot_product_attention(query, key, value)
