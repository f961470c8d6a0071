"""Multi-head self-attention. Axis letters: B batch, N tokens, K heads, E head width, D width."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from sfd_jax.models.execution import PLAIN
from sfd_jax.models.layers import XAVIER, Linear, dense
from sfd_jax.models.positions import Rotary, rotate


class SelfAttention(nnx.Module):
    """Multi-head self-attention with biases, optionally with normalised and rotated queries and keys.

    Parameters: qkv (D, 3D: queries, keys, values), proj (D, D), and q_norm, k_norm over E where
    `make_norm` is given.

    Args:
      width, num_heads: D and K.
      make_norm: builds a norm from (E, rngs), applied per head before the rotation.
      key_bias: whether keys have a bias; without, the bias of qkv is (2D: queries, values).
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
        key_bias: bool = True,
        init: jax.nn.initializers.Initializer = XAVIER,
        dtype: jax.typing.DTypeLike = jnp.float32,
    ):
        self.num_heads = num_heads
        self.dtype = dtype
        self.normalise = make_norm is not None
        linear = Linear if key_bias else _NoKeyBias
        self.qkv = linear(width, 3 * width, kernel_init=init, dtype=dtype, rngs=rngs)
        if make_norm is not None:
            self.q_norm = make_norm(width // num_heads, rngs)
            self.k_norm = make_norm(width // num_heads, rngs)
        self.proj = dense(width, width, rngs=rngs, init=init, dtype=dtype)

    def __call__(self, x: jax.Array, rotary: Rotary | None = None) -> jax.Array:
        """Map tokens (B, N, D) to (B, N, D) in `dtype`; `rotary` is of `positions`."""
        b, n, d = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, d // self.num_heads)
        query, key, value = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]  # (B, N, K, E)
        if self.normalise:
            query, key = self.q_norm(query), self.k_norm(key)
        if rotary is not None:
            query, key = rotate(query, rotary), rotate(key, rotary)
        out = self.execution.attention(query.astype(self.dtype), key.astype(self.dtype), value)
        return self.proj(out.reshape(b, n, d))


class _NoKeyBias(Linear):
    """The Linear of queries, keys and values, (D, 3D), whose bias (2D,) leaves the keys out."""

    def __init__(self, width: int, out: int, **options):
        super().__init__(width, out, **options)
        self.bias = nnx.Param(jnp.zeros((2 * width,), jnp.float32))

    def _in_dtype(self, x):
        x, kernel, bias = super()._in_dtype(x)
        query, value = jnp.split(bias, 2, axis=-1)
        return x, kernel, jnp.concatenate([query, jnp.zeros_like(query), value], axis=-1)
