"""Position tables, rotary embedding and time features; nothing here is learned.

Tables are computed by NumPy in float64 when a network is traced, so they are constants of the
compiled program and not parameters.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

Rotary = tuple[np.ndarray, ...]  # what `rotary_2d` and `rotary_of_patches` return


@functools.cache
def sincos_2d(width: int, grid_size: int) -> np.ndarray:
    """Return the fixed 2D sin-cos position table.

    Args:
      width: D, divisible by 4.
      grid_size: tokens along a side.

    Returns:
      (N, D) float32, tokens in row order. The first half of the width encodes the COLUMN, the second
      the row (the original's meshgrid puts w first); each half is sines, then cosines.

    Source: LightningDiT, models/lightningdit.py, get_2d_sincos_pos_embed (from MAE).
    """
    quarter = width // 4
    omega = 10000.0 ** -(np.arange(quarter, dtype=np.float64) / quarter)
    angles = np.arange(grid_size, dtype=np.float64)[:, None] * omega[None, :]
    line = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)  # (grid, D/2)
    shape = (grid_size, grid_size, width // 2)
    columns = np.broadcast_to(line[None, :, :], shape)
    rows = np.broadcast_to(line[:, None, :], shape)
    return np.concatenate([columns, rows], axis=-1).reshape(-1, width).astype(np.float32)


@functools.cache
def rotary_2d(head_width: int, grid_size: int) -> Rotary:
    """Return the tables of the 2D rotary embedding for `rotate`.

    The head width is split in two halves, rows first and columns second; in each, neighbouring
    features (2i, 2i+1) turn by position * 10000^(-2i / (E/2)).

    Args:
      head_width: E, divisible by 4.
      grid_size: tokens along a side.

    Returns:
      (cos, sin_next, sin_previous), each (N, E) float32. The signs of the rotation and the zeros
      that pick one neighbour are already in the two sine tables.

    Source: LightningDiT, models/pos_embed.py, VisionRotaryEmbeddingFast (from EVA-02).
    """
    half = head_width // 2
    omega = 10000.0 ** -(np.arange(0, half, 2, dtype=np.float64) / half)
    line = np.repeat(np.arange(grid_size, dtype=np.float64)[:, None] * omega[None, :], 2, axis=1)
    shape = (grid_size, grid_size, half)
    rows = np.broadcast_to(line[:, None, :], shape)
    columns = np.broadcast_to(line[None, :, :], shape)
    angles = np.concatenate([rows, columns], axis=-1).reshape(-1, head_width)
    even = (np.arange(head_width) % 2 == 0)[None, :]
    sin = np.sin(angles)
    tables = np.cos(angles), np.where(even, -sin, 0.0), np.where(even, 0.0, sin)
    return tuple(table.astype(np.float32) for table in tables)


@functools.cache
def rotary_of_patches(head_width: int, rows: int, columns: int, leading: int, theta: float) -> Rotary:
    """Return the tables of DINOv3's rotary embedding for `rotate`.

    The centre of a patch has coordinates in [-1, 1], whatever the size of the image. Features i and i + E/2
    are a pair, turned by 2 pi * coordinate * theta^(-4i / E); in each half rows come first, then columns.

    Args:
      head_width: E, divisible by 4.
      rows, columns: patches along the sides.
      leading: number of tokens before the patches; they are not turned.
      theta: base of the frequencies.

    Returns:
      (cos, sin), each (leading + rows * columns, E) float32, the signs of the rotation in the sines.

    Source: transformers, modeling_dinov3_vit.py, DINOv3ViTRopePositionEmbedding.
    """
    omega = 2 * np.pi * float(theta) ** -(np.arange(head_width // 4) * 4 / head_width)
    lines = [(2 * np.arange(side) + 1) / side - 1 for side in (rows, columns)]
    places = np.stack(np.meshgrid(*lines, indexing="ij"), axis=-1).reshape(-1, 2)
    angles = (places[:, :, None] * omega[None, None]).reshape(len(places), -1)
    angles = np.concatenate([np.zeros((leading, head_width // 2)), angles])
    cos, sin = np.cos(angles), np.sin(angles)
    return tuple(np.concatenate(halves, axis=-1).astype(np.float32) for halves in ((cos, cos), (-sin, sin)))


def rotate(x: jax.Array, tables: Rotary) -> jax.Array:
    """Turn queries or keys (B, N, K, E) by their positions, in float32.

    The other feature of a pair is fetched by rolling the last axis: a reshape to (..., E/2, 2) would be equivalent
    but gives a TPU rows of width 2.
    """
    cos, *sines = (jnp.asarray(table)[None, :, None, :] for table in tables)
    # A pair is two neighbours (one sine table for each side) or two features half the width apart.
    shifts = (-1, 1) if len(sines) == 2 else (x.shape[-1] // 2,)
    x = x.astype(jnp.float32)
    return sum((jnp.roll(x, shift, -1) * sin for shift, sin in zip(shifts, sines, strict=True)), x * cos)


def time_features(t: jax.Array, features: int = 256) -> jax.Array:
    """Return sinusoidal features (B, features) float32 of times (B,) in [0, 1], cosines first.

    Times are NOT scaled by 1000, and the longest period is 10000: most features stay nearly
    constant, as in the released weights.
    """
    half = features // 2
    omega = np.exp(-np.log(10000.0) * np.arange(half) / half).astype(np.float32)
    angles = t.astype(jnp.float32)[:, None] * omega[None, :]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
