"""Multi-head self-attention. Axis letters: B batch, N tokens, K heads, E head width, D width."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from sfd_jax.models.execution import PLAIN
from sfd_jax.models.layers import XAVIER, dense
from sfd_jax.models.positions import Rotary, rotate


class SelfAttention(nnx.Module):
    """Multi-head self-attention with biases, optionally with normalised and rotated queries and keys.

    Parameters: qkv (D, 3D: queries, keys, values), proj (D, D), and q_norm, k_norm over E where
    `make_norm` is given.

    Args:
      width, num_heads: D and K.
      make_norm: builds a norm from (E, rngs), applied per head before the rotation.
      init: initialiser of both matrices.
      dtype: dtype of the matmuls.
    """

    execution = PLAIN

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        rngs: nnx.Rngs,
        make_norm: Callable[[int, nnx.Rngs], nnx.Module] | None = None,
        init: jax.nn.initializers.Initializer = XAVIER,
        dtype: jax.typing.DTypeLike = jnp.float32,
    ):
        self.num_heads = num_heads
        self.dtype = dtype
        self.normalise = make_norm is not None
        self.qkv = dense(width, 3 * width, rngs=rngs, init=init, dtype=dtype)
        if make_norm is not None:
            self.q_norm = make_norm(width // num_heads, rngs)
            self.k_norm = make_norm(width // num_heads, rngs)
        self.proj = dense(width, width, rngs=rngs, init=init, dtype=dtype)

    def __call__(self, x: jax.Array, rotary: Rotary | None = None) -> jax.Array:
        """Map tokens (B, N, D) to (B, N, D) in `dtype`; `rotary` is of `positions.rotary_2d`."""
        b, n, d = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, d // self.num_heads)
        query, key, value = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]  # (B, N, K, E)
        if self.normalise:
            query, key = self.q_norm(query), self.k_norm(key)
        if rotary is not None:
            query, key = rotate(query, rotary), rotate(key, rotary)
        out = self.execution.attention(query.astype(self.dtype), key.astype(self.dtype), value)
        return self.proj(out.reshape(b, n, d))
