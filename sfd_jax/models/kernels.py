"""Operations that are tuned for some hardware, each beside its plain form, which is the default.

An `Execution` (execution.py) chooses which of them networks use; this file never looks at the hardware. A tuned form
gives the same numbers up to rounding. Plain forms have all derivatives. Tuned ones support `jax.jvp`, `jax.linearize`,
`jax.vjp` and the gradient of a `jax.jvp`; for derivatives of a gradient, or `jax.vmap` of one, use plain ones.
`cudnn_attention` and `splash_attention` support the gradient only.

Axis letters: B batch, N tokens, K heads, E head width, I and O features in and out.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.custom_derivatives import linear_call
from jax.sharding import Sharding

_SPLASH_BLOCK = 512  # queries, and keys, that are in a TPU's fast memory at once


def precision_of(dtype: jax.typing.DTypeLike) -> jax.lax.Precision | None:
    """Return the precision at which arrays of a dtype are multiplied: float32 means float32.

    By default a TPU multiplies float32 arrays in bfloat16 and a GPU in TF32, and results would differ from those of
    the released networks.
    """
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def with_transpose(push: Callable, pull: Callable) -> Callable:
    """Return `push`, (kept, x) -> y and linear in x, with the transpose `pull`, (kept, gradient by y) -> by x."""

    @jax.custom_jvp
    def call(kept, x):
        return linear_call(push, pull, kept, x)

    # `linear_call` has no derivative by `kept`.
    call.defjvp(lambda primals, tangents: (call(*primals), jax.jvp(push, primals, tangents)[1]))
    return call


def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Multiply (..., I) with (I, O) to (..., O)."""
    return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())), precision=precision_of(x.dtype))


@jax.custom_jvp
def cpu_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Multiply as `product` does, with a faster gradient of the kernel in float32 on CPUs.

    That gradient contracts both of its factors over their rows. XLA's library of CPU matmuls does not support this, and
    XLA falls back to a slower product that copies first. With `x` transposed in memory first, the library is used,
    and the training step of B/1 takes a sixth less time (docs/performance.md).
    """
    return product(x, kernel)


@cpu_product.defjvp
def _(primals, tangents):
    (x, kernel), (d_x, d_kernel) = primals, tangents
    by_kernel = _by_kernel if x.dtype == jnp.float32 else product
    # Not `cpu_product`: remat policies would not see the matmul inside it, which they should keep.
    return product(x, kernel), product(d_x, kernel) + by_kernel(x, d_kernel)


def _pull_kernel(x, gradient):
    # The barrier keeps XLA from folding the transposition back into the product.
    columns = jax.lax.optimization_barrier(x.reshape(-1, x.shape[-1]).T)
    return product(columns, gradient.reshape(-1, gradient.shape[-1]))


_by_kernel = with_transpose(product, _pull_kernel)


def attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Attend from every token to every token.

    Args:
      query, key, value: (B, N, K, E) of one dtype; matmuls run in it.

    Returns:
      (B, N, K, E) in the same dtype; logits and softmax are float32, scale 1/sqrt(E).
    """
    return _heads_first(lambda *qkv: _attend(*qkv)[0], query, key, value)


def tuned_attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Attend as `attention` does, with the gradient written out.

    It needs the sum over a row of weights x their gradients, which is the sum over E of out x its gradient, a pass over
    (N, E) instead of two over (N, N). JAX's own gradient takes twice the time on a CPU, and keeps the weights in
    float32 where this one keeps them in the dtype of the matmuls.
    """
    return _heads_first(_tuned, query, key, value)


def cudnn_attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Attend by cuDNN's fused kernel, which never writes the (B, K, N, N) weights.

    It supports only half precision, and head widths that are multiples of 8 up to 128; others get `tuned_attention`.
    """
    if query.dtype not in (jnp.bfloat16, jnp.float16) or query.shape[-1] % 8 or query.shape[-1] > 128:
        return tuned_attention(query, key, value)
    return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")


def splash_attention(query: jax.Array, key: jax.Array, value: jax.Array, *, interpret: bool = False) -> jax.Array:
    """Attend by JAX's fused TPU kernel, which never writes the (B, K, N, N) weights.

    It supports only half precision and N divisible by 128; others get `tuned_attention`. It takes heads of any width: a
    TPU's memory pads the last axis to 128 lanes in any case, so padding them first would only add copies. XLA cannot
    split it over devices: over a mesh, call it inside `jax.shard_map`.

    Args:
      query, key, value: as in `attention`.
      interpret: run the kernel without a TPU, slowly, for tests.
    """
    n, heads = query.shape[1:3]
    if query.dtype not in (jnp.bfloat16, jnp.float16) or n % 128:
        return tuned_attention(query, key, value)
    # Imported here, since it takes half a second that no other backend needs to spend.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask import FullMask, MultiHeadMask

    names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
    sizes = splash.BlockSizes(**dict.fromkeys(names, math.gcd(n, _SPLASH_BLOCK)), use_fused_bwd_kernel=True)
    mask = MultiHeadMask([FullMask((n, n))] * heads)
    attend = splash.make_splash_mha_single_device(mask, block_sizes=sizes, interpret=interpret)
    return _heads_first(jax.vmap(attend), query * query.shape[-1] ** -0.5, key, value)


def _heads_first(attend, *qkv):
    # With heads before tokens every product is a batched matmul without strides.
    return jnp.swapaxes(attend(*(jnp.swapaxes(x, 1, 2) for x in qkv)), 1, 2)


def _attend(query, key, value):
    """Return softmax(query key^T / sqrt(E)) value and the weights, for (B, K, N, E)."""
    logits = _einsum("bkne,bkme->bknm", query, key) * query.shape[-1] ** -0.5
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    return _einsum("bknm,bkme->bkne", weights, value).astype(value.dtype), weights


@jax.custom_jvp
def _tuned(query, key, value):
    return _attend(query, key, value)[0]


@_tuned.defjvp
def _(qkv, tangents):
    out, weights = _attend(*qkv)
    return out, _tangent((*qkv, weights, out), tangents)


def _push_attention(kept, tangents):
    (query, key, value, weights, out), (d_query, d_key, d_value) = kept, tangents
    d_logits = _einsum("bkne,bkme->bknm", d_query, key) + _einsum("bkne,bkme->bknm", query, d_key)
    d_weights = weights * d_logits * query.shape[-1] ** -0.5  # without the term that keeps the sum of a row at 1
    values = _einsum("bknm,bkme->bkne", d_weights.astype(out.dtype), value)
    values += _einsum("bknm,bkme->bkne", weights, d_value)
    return (values - jnp.sum(d_weights, axis=-1, keepdims=True) * out).astype(out.dtype)


def _pull_attention(kept, d_out):
    query, key, value, weights, out = kept
    row_sums = jnp.sum(d_out.astype(jnp.float32) * out, axis=-1, keepdims=True)
    d_weights = _einsum("bkne,bkme->bknm", d_out, value)
    d_logits = (weights * (d_weights - row_sums) * query.shape[-1] ** -0.5).astype(out.dtype)
    d_query = _einsum("bknm,bkme->bkne", d_logits, key)
    d_key = _einsum("bknm,bkne->bkme", d_logits, query)
    d_value = _einsum("bknm,bkne->bkme", weights, d_out)
    return tuple(x.astype(out.dtype) for x in (d_query, d_key, d_value))


_tangent = with_transpose(_push_attention, _pull_attention)


def _einsum(axes, x, y):
    return jnp.einsum(axes, x, y, precision=precision_of(x.dtype), preferred_element_type=jnp.float32)


def gather(x: jax.Array, whole: Sharding, pieces: Sharding) -> jax.Array:
    """Gather an array on every device; its gradient is scattered to the devices' shards.

    JAX's own gradient would first be whole on every device, and be split only then. The plain form is x.
    """
    constrain = jax.lax.with_sharding_constraint
    return linear_call(lambda _, x: constrain(x, whole), lambda _, gradient: constrain(gradient, pieces), (), x)
