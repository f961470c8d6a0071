"""Layers shared by the networks: dense and normalisation layers, patch embedding, MLPs.

Parameters are float32. `dtype` is the dtype of the matmul only; normalisation is always computed
and returned in float32. Products of float32 arrays are float32 on every backend, in networks that
otherwise compute in bfloat16 too: see `kernels.precision_of`. Axis letters: B batch, H W grid, C channels, N tokens,
D width, P patch.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from sfd_jax.errors import SfdError
from sfd_jax.models.execution import PLAIN
from sfd_jax.models.kernels import precision_of

XAVIER = jax.nn.initializers.xavier_uniform()
ZEROS = jax.nn.initializers.zeros
# U(-1/sqrt(fan_in), 1/sqrt(fan_in)): PyTorch's default for Linear and Conv2d.
# Biases, which PyTorch draws from the same range, start at zero here.
FAN_IN = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def normal(stddev: float) -> jax.nn.initializers.Initializer:
    """Return the initialiser of a normal distribution with this standard deviation."""
    return jax.nn.initializers.normal(stddev)


class Linear(nnx.Linear):
    """An nnx.Linear that multiplies by the `execution`'s product."""

    execution = PLAIN

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (..., I) to (..., O) in `dtype`."""
        x, kernel, bias = self._in_dtype(x)
        return self.execution.product(x, kernel) + bias

    def halves(self, x: jax.Array) -> list[jax.Array]:
        """Return both halves of the output, each computed by its own product.

        If one product were split, the two gradients would have to be concatenated again in the backward pass: 4 % of
        XL's step on a GPU.
        """
        x, kernel, bias = self._in_dtype(x)
        parts = zip(jnp.split(kernel, 2, axis=-1), jnp.split(bias, 2, axis=-1), strict=True)
        return [self.execution.product(x, kernel) + bias for kernel, bias in parts]

    def _in_dtype(self, x):
        x, kernel, bias = (a.astype(self.dtype) for a in (x, self.kernel[...], self.bias[...]))
        return x, kernel, bias.reshape(*(1,) * (x.ndim - 1), -1)


def dense(
    features_in: int,
    features_out: int,
    *,
    rngs: nnx.Rngs,
    init: jax.nn.initializers.Initializer = XAVIER,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> Linear:
    """Build a Linear with zero bias: (..., features_in) -> (..., features_out) in `dtype`."""
    return Linear(features_in, features_out, kernel_init=init, dtype=dtype, rngs=rngs)


def rms_norm(width: int, *, rngs: nnx.Rngs, epsilon: float = 1e-6) -> nnx.RMSNorm:
    """Build an RMSNorm over the last axis with a learned scale, float32."""
    return nnx.RMSNorm(width, epsilon=epsilon, dtype=jnp.float32, rngs=rngs)


def layer_norm(width: int, *, rngs: nnx.Rngs, epsilon: float = 1e-6, affine: bool = True) -> nnx.LayerNorm:
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


def group_norm(channels: int, groups: int, *, rngs: nnx.Rngs) -> nnx.GroupNorm:
    """Build a GroupNorm (epsilon 1e-6) over (B, H, W, C), float32."""
    return nnx.GroupNorm(
        channels,
        num_groups=groups,
        epsilon=1e-6,
        dtype=jnp.float32,
        use_fast_variance=False,
        rngs=rngs,
    )


def conv(
    channels_in: int,
    channels_out: int,
    kernel_size: int,
    *,
    rngs: nnx.Rngs,
    dtype: jax.typing.DTypeLike = jnp.float32,
    **options,
) -> nnx.Conv:
    """Build a square 2D convolution that keeps the grid, unless `options` (of nnx.Conv) change that."""
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
    """Cut an image into patches and project each: a strided convolution, as one matmul.

    Parameters: kernel (P, P, C, D), bias (D,) unless there is none.
    """

    execution = PLAIN

    def __init__(
        self,
        patch_size: int,
        channels: int,
        width: int,
        *,
        rngs: nnx.Rngs,
        init: jax.nn.initializers.Initializer = XAVIER,
        bias: bool = True,
    ):
        flat = init(rngs.params(), (patch_size * patch_size * channels, width), jnp.float32)
        self.kernel = nnx.Param(flat.reshape(patch_size, patch_size, channels, width))
        self.bias = nnx.Param(jnp.zeros((width,), jnp.float32)) if bias else None

    def __call__(self, images: jax.Array) -> jax.Array:
        """Map (B, H, W, C) to tokens (B, N, D) in row order."""
        p, _, c, d = self.kernel.shape
        b, h, w, _ = images.shape
        patches = images.reshape(b, h // p, p, w // p, p, c).transpose(0, 1, 3, 2, 4, 5)
        patches = patches.reshape(b, (h // p) * (w // p), p * p * c)
        tokens = self.execution.product(patches, self.kernel[...].reshape(p * p * c, d))
        return tokens if self.bias is None else tokens + self.bias[...][None, None]


def unpatchify(tokens: jax.Array, grid_size: int, patch_size: int) -> jax.Array:
    """Put tokens (B, N, P*P*C), in row order, back to an image (B, H, W, C)."""
    b, _, features = tokens.shape
    g, p = grid_size, patch_size
    c = features // (p * p)
    images = tokens.reshape(b, g, g, p, p, c).transpose(0, 1, 3, 2, 4, 5)
    return images.reshape(b, g * p, g * p, c)


class Mlp(nnx.Module):
    """Linear, activation, Linear."""

    def __init__(
        self,
        width: int,
        hidden: int,
        activation: Callable[[jax.Array], jax.Array],
        *,
        rngs: nnx.Rngs,
        init: jax.nn.initializers.Initializer = XAVIER,
        dtype: jax.typing.DTypeLike = jnp.float32,
    ):
        self.fc1 = dense(width, hidden, rngs=rngs, init=init, dtype=dtype)
        self.fc2 = dense(hidden, width, rngs=rngs, init=init, dtype=dtype)
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(self.activation(self.fc1(x)))


class SwiGlu(nnx.Module):
    """silu(x W1) * (x W2), then W3; W1 and W2 are one fused matrix, W1's columns first."""

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        rngs: nnx.Rngs,
        init: jax.nn.initializers.Initializer = XAVIER,
        dtype: jax.typing.DTypeLike = jnp.float32,
    ):
        self.w12 = dense(width, 2 * hidden, rngs=rngs, init=init, dtype=dtype)
        self.w3 = dense(hidden, width, rngs=rngs, init=init, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        gate, value = self.w12.halves(x)
        return self.w3(jax.nn.silu(gate) * value)


def gelu_exact(x: jax.Array) -> jax.Array:
    """The Gaussian error linear unit by erf."""
    return jax.nn.gelu(x, approximate=False)


def gelu_tanh(x: jax.Array) -> jax.Array:
    """The tanh approximation of the Gaussian error linear unit."""
    return jax.nn.gelu(x, approximate=True)


def check_dtype(compute_dtype: str) -> None:
    """Raise SfdError unless this is the name of a supported compute dtype."""
    check(
        compute_dtype in ("float32", "bfloat16"),
        f"compute_dtype is '{compute_dtype}': choose float32 or bfloat16",
    )


def check(condition: bool, message: str) -> None:
    """Raise SfdError(message) unless `condition`; for configs that cannot be built."""
    if not condition:
        raise SfdError(message)


def check_divides(size: int, part: int, what: str) -> None:
    """Raise SfdError unless a side of `size` divides by `part`; the message has the nearest sides that do."""
    low = size // part * part
    near = f"{low} or {low + part}" if low else str(part)
    check(size % part == 0, f"images of {size} px do not divide by {part}, {what}: use {near} px")
