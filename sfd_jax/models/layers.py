"""Leaves shared by the networks: dense and normalisation layers, patch embedding, MLPs.

Parameters are float32. `dtype` is the dtype of the matmul alone; normalisation is always computed
and returned in float32. Products of float32 arrays are float32 on every backend, in networks that
otherwise compute in bfloat16 too: see `precision_of`. Axis letters: B batch, H W grid, C channels, N tokens, D width, P patch.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from sfd_jax.errors import SfdError

XAVIER = jax.nn.initializers.xavier_uniform()
ZEROS = jax.nn.initializers.zeros
# U(-1/sqrt(fan_in), 1/sqrt(fan_in)): what PyTorch gives Linear and Conv2d that nobody initialises.
# Biases, which PyTorch draws from the same range, start at zero here.
FAN_IN = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def normal(stddev: float):
    """Return the initialiser of a normal distribution with this standard deviation."""
    return jax.nn.initializers.normal(stddev)


def dense(features_in, features_out, *, rngs, init=XAVIER, dtype=jnp.float32) -> nnx.Linear:
    """Build a Linear with zero bias: (..., features_in) -> (..., features_out) in `dtype`."""
    return nnx.Linear(features_in, features_out, kernel_init=init, dtype=dtype, dot_general=_dot_general, rngs=rngs)


def precision_of(dtype) -> jax.lax.Precision | None:
    """Return the precision at which arrays of a dtype are multiplied: float32 means float32.

    By default a TPU multiplies float32 arrays in bfloat16 and a GPU in TF32, and results would not be those of the
    published networks. An argument of each product, since a context (`jax.default_matmul_precision`) is left before
    a gradient of our own is traced.
    """
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def _dot_general(x, kernel, dimension_numbers, **options):
    """Stand in for `jax.lax.dot_general` in nnx.Linear."""
    assert dimension_numbers == (((x.ndim - 1,), (0,)), ((), ())), dimension_numbers
    assert not any(options.values()), options
    return product(x, kernel)


@jax.custom_vjp
def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Multiply (..., I) with (I, O) to (..., O); on CPUs with a faster gradient of the kernel.

    That gradient contracts both of its factors over their rows. XLA's library of CPU matmuls takes no such
    product, and a slower one is taken that copies first; with `x` transposed in memory beforehand it does. The
    training step of B/1 takes a sixth less (docs/performance.md). Other platforms, and bfloat16, get JAX's gradient.
    """
    return _plain_product(x, kernel)


def _plain_product(x, kernel):
    return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())), precision=precision_of(x.dtype))


def _product_forward(x, kernel):
    # Not `product`: inside of it, remat policies would not see the matmul that they are to keep.
    return _plain_product(x, kernel), (x, kernel)


def _product_backward(kept, gradient):
    def as_jax_does(x, kernel, gradient):
        return jax.vjp(_plain_product, x, kernel)[1](gradient)

    def for_cpu(x, kernel, gradient):
        matmul = functools.partial(jnp.matmul, precision=precision_of(gradient.dtype))
        # The barrier keeps XLA from folding the transposition back into the product.
        columns = jax.lax.optimization_barrier(x.reshape(-1, x.shape[-1]).T)
        return matmul(gradient, kernel.T), matmul(columns, gradient.reshape(-1, gradient.shape[-1]))

    if gradient.dtype != jnp.float32:
        return as_jax_does(*kept, gradient)
    # Chosen where the program is lowered: a CPU also compiles for TPUs that it does not have.
    return jax.lax.platform_dependent(*kept, gradient, cpu=for_cpu, default=as_jax_does)


product.defvjp(_product_forward, _product_backward)


def rms_norm(width, *, rngs, epsilon=1e-6) -> nnx.RMSNorm:
    """Build an RMSNorm over the last axis with a learned scale, float32."""
    return nnx.RMSNorm(width, epsilon=epsilon, dtype=jnp.float32, rngs=rngs)


def layer_norm(width, *, rngs, epsilon=1e-6, affine=True) -> nnx.LayerNorm:
    """Build a LayerNorm over the last axis, float32; without `affine` it has no parameters."""
    return nnx.LayerNorm(
        width,
        epsilon=epsilon,
        use_scale=affine,
        use_bias=affine,
        dtype=jnp.float32,
        # E[x^2] - E[x]^2 loses digits where the mean is large; parity wants the two-pass variance.
        use_fast_variance=False,
        rngs=rngs,
    )


def group_norm(channels, groups, *, rngs) -> nnx.GroupNorm:
    """Build a GroupNorm (epsilon 1e-6) over (B, H, W, C), float32."""
    return nnx.GroupNorm(
        channels,
        num_groups=groups,
        epsilon=1e-6,
        dtype=jnp.float32,
        use_fast_variance=False,
        rngs=rngs,
    )


def conv(channels_in, channels_out, kernel_size, *, rngs, dtype=jnp.float32, **options) -> nnx.Conv:
    """Build a square 2D convolution that keeps the grid, unless `options` (of nnx.Conv) say more."""
    return nnx.Conv(
        channels_in,
        channels_out,
        (kernel_size, kernel_size),
        kernel_init=FAN_IN,
        dtype=dtype,
        precision=precision_of(dtype),
        rngs=rngs,
        **options,
    )


class PatchEmbed(nnx.Module):
    """Cut an image into patches and project each: the strided convolution, as one matmul.

    Parameters: kernel (P, P, C, D), bias (D,).
    """

    def __init__(self, patch_size, channels, width, *, rngs, init=XAVIER):
        flat = init(rngs.params(), (patch_size * patch_size * channels, width), jnp.float32)
        self.kernel = nnx.Param(flat.reshape(patch_size, patch_size, channels, width))
        self.bias = nnx.Param(jnp.zeros((width,), jnp.float32))

    def __call__(self, images):
        """Map (B, H, W, C) to tokens (B, N, D) in row order."""
        p, _, c, d = self.kernel.shape
        b, h, w, _ = images.shape
        patches = images.reshape(b, h // p, p, w // p, p, c).transpose(0, 1, 3, 2, 4, 5)
        patches = patches.reshape(b, (h // p) * (w // p), p * p * c)
        return product(patches, self.kernel[...].reshape(p * p * c, d)) + self.bias[...][None, None]


def unpatchify(tokens, grid_size, patch_size):
    """Put tokens (B, N, P*P*C), in row order, back to an image (B, H, W, C)."""
    b, _, features = tokens.shape
    g, p = grid_size, patch_size
    c = features // (p * p)
    images = tokens.reshape(b, g, g, p, p, c).transpose(0, 1, 3, 2, 4, 5)
    return images.reshape(b, g * p, g * p, c)


class Mlp(nnx.Module):
    """Linear, activation, Linear."""

    def __init__(self, width, hidden, activation, *, rngs, init=XAVIER, dtype=jnp.float32):
        self.fc1 = dense(width, hidden, rngs=rngs, init=init, dtype=dtype)
        self.fc2 = dense(hidden, width, rngs=rngs, init=init, dtype=dtype)
        self.activation = activation

    def __call__(self, x):
        return self.fc2(self.activation(self.fc1(x)))


class SwiGlu(nnx.Module):
    """silu(x W1) * (x W2), then W3; W1 and W2 are one fused matrix, W1's columns first."""

    def __init__(self, width, hidden, *, rngs, init=XAVIER, dtype=jnp.float32):
        self.w12 = dense(width, 2 * hidden, rngs=rngs, init=init, dtype=dtype)
        self.w3 = dense(hidden, width, rngs=rngs, init=init, dtype=dtype)

    def __call__(self, x):
        gate, value = _halves(self.w12, x)
        return self.w3(jax.nn.silu(gate) * value)


def _halves(layer: nnx.Linear, x: jax.Array) -> list[jax.Array]:
    """Return both halves of what a Linear gives, each by a product of its own.

    Cut out of one product, their gradients would have to be written side by side again before the backward pass can
    multiply them: 4 % of XL's step on a GPU.
    """
    x, kernel, bias = (a.astype(layer.dtype) for a in (x, layer.kernel[...], layer.bias[...]))
    bias = bias.reshape(*(1,) * (x.ndim - 1), -1)
    parts = zip(jnp.split(kernel, 2, axis=-1), jnp.split(bias, 2, axis=-1), strict=True)
    return [product(x, kernel) + bias for kernel, bias in parts]


def gelu_exact(x):
    """The Gaussian error linear unit by erf."""
    return jax.nn.gelu(x, approximate=False)


def gelu_tanh(x):
    """The tanh approximation of the Gaussian error linear unit."""
    return jax.nn.gelu(x, approximate=True)


def check_dtype(compute_dtype: str):
    """Raise SfdError unless the name is that of a dtype to compute in."""
    check(
        compute_dtype in ("float32", "bfloat16"),
        f"compute_dtype is '{compute_dtype}': choose float32 or bfloat16",
    )


def check(condition: bool, message: str):
    """Raise SfdError(message) unless `condition`; for configs that cannot be built."""
    if not condition:
        raise SfdError(message)


def check_divides(size: int, part: int, what: str):
    """Raise SfdError unless a side of `size` divides by `part`, with the nearest sides that do."""
    low = size // part * part
    near = f"{low} or {low + part}" if low else str(part)
    check(size % part == 0, f"images of {size} px do not divide by {part}, {what}: {near} px would do")
