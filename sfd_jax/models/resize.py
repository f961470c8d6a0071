"""Image resizing as two small matrices, for the kinds of resize that JAX does not have.

A separable resize is rows @ image @ columns^T; the matrices depend only on the sizes and are
computed by NumPy when a network is traced. Positions are taken in float32, as the originals do: in
float64 they would differ by up to 1e-5 of a pixel, more than everything after them. Evaluation and feature
extraction need the exact resize of the released pipelines: another antialias or pixel centre moves FID by tenths.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np


def resize_bicubic(images: jax.Array, height: int, width: int, offset: float = 0.0) -> jax.Array:
    """Resize (B, H, W, C) bicubic WITHOUT antialias: half-pixel centres, edges clamped, a = -0.75.

    This is PyTorch's interpolate(mode="bicubic", align_corners=False). (With antialias PyTorch uses
    a = -0.5, which `jax.image.resize` has.)

    Args:
      images: (B, H, W, C).
      height, width: of the result.
      offset: added to the output size only where the scale is computed; DINOv2 without
        registers resizes its positions with 0.1.
    """
    rows = bicubic_matrix(images.shape[1], height, offset)
    columns = bicubic_matrix(images.shape[2], width, offset)
    return _resize(images, rows, columns)


def resize_bilinear_tf1(images: jax.Array, height: int, width: int) -> jax.Array:
    """Resize (B, H, W, C) as TensorFlow 1 did: bilinear, corners of pixels aligned, no antialias.

    Output pixel i reads position i * in / out: no half-pixel centres.
    """
    rows, columns = tf1_matrix(images.shape[1], height), tf1_matrix(images.shape[2], width)
    return _resize(images, rows, columns)


@functools.cache
def bicubic_matrix(size_in: int, size_out: int, offset: float = 0.0) -> np.ndarray:
    """Return the (size_out, size_in) float32 weights of a bicubic resize without antialias.

    Source: Keys, "Cubic convolution interpolation for digital image processing", 1981.
    """
    a = -0.75
    scale = np.float32(size_in / (size_out + offset))
    position = scale * (np.arange(size_out, dtype=np.float32) + np.float32(0.5)) - np.float32(0.5)
    first = np.floor(position).astype(int)
    matrix = np.zeros((size_out, size_in))
    for tap in range(-1, 3):
        distance = np.abs(position - (first + tap))
        near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
        far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
        weight = np.where(distance <= 1, near, far)
        # Taps beyond the edge fall on the edge pixel, so its weights add up.
        np.add.at(matrix, (np.arange(size_out), np.clip(first + tap, 0, size_in - 1)), weight)
    return matrix.astype(np.float32)


@functools.cache
def tf1_matrix(size_in: int, size_out: int) -> np.ndarray:
    """Return the (size_out, size_in) float32 weights of TensorFlow 1's bilinear resize."""
    position = np.arange(size_out, dtype=np.float32) * np.float32(size_in / size_out)
    lower = np.minimum(np.floor(position).astype(int), size_in - 1)
    upper = np.minimum(lower + 1, size_in - 1)
    fraction = position - lower
    matrix = np.zeros((size_out, size_in))
    rows = np.arange(size_out)
    np.add.at(matrix, (rows, lower), 1 - fraction)
    np.add.at(matrix, (rows, upper), fraction)
    return matrix.astype(np.float32)


def _resize(images, rows, columns):
    # Bytes have more digits than bfloat16, so float32 at highest precision.
    images = images.astype(jnp.float32)
    images = jnp.einsum("oh,bhwc->bowc", rows, images, precision="highest")
    return jnp.einsum("ow,bhwc->bhoc", columns, images, precision="highest")
