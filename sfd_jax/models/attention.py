"""Self-attention, and the one place where a backend's attention is chosen (`implementation_for`).

Axis letters: B batch, N tokens, K heads, E head width, D width.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from sfd_jax.models.layers import XAVIER, dense, precision_of
from sfd_jax.models.positions import rotate


def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Attend from every token to every token.

    Args:
      query, key, value: (B, N, K, E) of one dtype; matmuls run in it.

    Returns:
      (B, N, K, E) in the same dtype; logits and softmax are float32, scale 1/sqrt(E).
    """
    if implementation_for(jax.default_backend(), query.dtype, query.shape[-1]) == "cudnn":
        return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")
    heads_first = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
    return jnp.swapaxes(plain_attention(*heads_first), 1, 2)


def implementation_for(backend: str, dtype, head_width: int) -> str:
    """Choose "cudnn" or "plain" for a backend ("cpu", "gpu", "tpu"); docs/performance.md has the numbers.

    On a GPU cuDNN's fused attention never writes the (B, K, N, N) weights, but takes half precision and head
    widths that are multiples of 8 up to 128 alone. CPUs and TPUs get `plain_attention`: with 256 tokens the
    weights are small, and a head width of 72 does not fill the lanes of the TPU's fused kernels.
    """
    fused = dtype in (jnp.bfloat16, jnp.float16) and head_width % 8 == 0 and head_width <= 128
    return "cudnn" if backend == "gpu" and fused else "plain"


@jax.custom_vjp
def plain_attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Compute softmax(query key^T / sqrt(E)) value, for (B, K, N, E) of one dtype.

    Heads come before tokens, so that every product is a batched matmul without strides, and the gradient is
    written out: it needs the sum over a row of weights x their gradients, which is the sum over E of out x its
    gradient, a pass over (N, E) instead of two over (N, N). Derived by JAX it takes twice the time on a CPU,
    and keeps the weights in float32 where ours are in the dtype of the matmuls.
    """
    return _forward(query, key, value)[0]


def _forward(query, key, value):
    logits = _product("bkne,bkme->bknm", query, key) * query.shape[-1] ** -0.5
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    out = _product("bknm,bkme->bkne", weights, value).astype(value.dtype)
    return out, (query, key, value, weights, out)


def _backward(kept, d_out):
    query, key, value, weights, out = kept
    dtype = value.dtype
    row_sums = jnp.sum(d_out.astype(jnp.float32) * out, axis=-1, keepdims=True)
    d_weights = _product("bkne,bkme->bknm", d_out, value)
    d_logits = (weights * (d_weights - row_sums) * query.shape[-1] ** -0.5).astype(dtype)
    d_query = _product("bknm,bkme->bkne", d_logits, key)
    d_key = _product("bknm,bkne->bkme", d_logits, query)
    d_value = _product("bknm,bkne->bkme", weights, d_out)
    return tuple(x.astype(dtype) for x in (d_query, d_key, d_value))


plain_attention.defvjp(_forward, _backward)


def _product(axes, x, y):
    return jnp.einsum(axes, x, y, precision=precision_of(x.dtype), preferred_element_type=jnp.float32)


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

    def __init__(self, width, num_heads, *, rngs, make_norm=None, init=XAVIER, dtype=jnp.float32):
        self.num_heads = num_heads
        self.dtype = dtype
        self.normalise = make_norm is not None
        self.qkv = dense(width, 3 * width, rngs=rngs, init=init, dtype=dtype)
        if make_norm is not None:
            self.q_norm = make_norm(width // num_heads, rngs)
            self.k_norm = make_norm(width // num_heads, rngs)
        self.proj = dense(width, width, rngs=rngs, init=init, dtype=dtype)

    def __call__(self, x, rotary=None):
        """Map tokens (B, N, D) to (B, N, D) in `dtype`; `rotary` is of `positions.rotary_2d`."""
        b, n, d = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, d // self.num_heads)
        query, key, value = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]  # (B, N, K, E)
        if self.normalise:
            query, key = self.q_norm(query), self.k_norm(key)
        if rotary is not None:
            query, key = rotate(query, rotary), rotate(key, rotary)
        out = attend(query.astype(self.dtype), key.astype(self.dtype), value)
        return self.proj(out.reshape(b, n, d))
