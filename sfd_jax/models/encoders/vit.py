"""The vision transformer shared by all visual encoders, and its config.

Maps images to one feature vector per patch, and to a class token and register tokens if the encoder has them. Works at
any image size that divides by the patch size: learned positions are resized, rotary ones computed.

`convert/encoders.py` and `convert/dinov2.py` list the parameters beside their PyTorch keys; `blocks/` leaves are
stacked along L. Outside the blocks, each encoder has only the parameters that its config asks for.

Axis letters: B batch, N patches, D width, K heads, L layers, P patch size, R registers.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sfd_jax.models.attention import SelfAttention
from sfd_jax.models.execution import PLAIN
from sfd_jax.models.layers import (
    Mlp,
    PatchEmbed,
    SwiGlu,
    check,
    check_divides,
    check_dtype,
    gelu_exact,
    gelu_tanh,
    layer_norm,
)
from sfd_jax.models.positions import Rotary, rotary_of_patches
from sfd_jax.models.resize import resize_bicubic
from sfd_jax.models.stack import run_stack, stack
from sfd_jax.ranges import check_fields

# Mean and standard deviation of the colours, in [0, 1].
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def quick_gelu(x: jax.Array) -> jax.Array:
    """Return the sigmoid approximation of the Gaussian error linear unit."""
    return x * jax.nn.sigmoid(1.702 * x)


# By the names of the released configs.
ACTIVATIONS = {"gelu": gelu_exact, "gelu_pytorch_tanh": gelu_tanh, "quick_gelu": quick_gelu}


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Describe a vision transformer; each encoder is a subclass with the defaults of its released models.

    Attributes:
      width, depth, num_heads: D, L, K.
      image_size: size in pixels that the position table is made for; rotary positions have no table.
      patch_size: P.
      num_registers: R.
      ffn: "mlp" or "swiglu".
      mlp_width: its hidden width; None is 4D for "mlp", 8/3 D rounded up to a multiple of 8 for "swiglu".
      activation: of "mlp", a key of ACTIVATIONS.
      epsilon: of every LayerNorm.
      layer_scale_init: initial LayerScale factor of both branches of a block; None for no LayerScale.
      compute_dtype: "float32" or "bfloat16", dtype of the matmuls in the blocks.
      init_std: of the initial matrices and positions. 0.02 is DINOv2's and suits large widths; small ones learn much
        faster from 1 / sqrt(width).

    Class variables hold what all models of one encoder share: whether there are a class token, a mask token (used only
    in pre-training, kept so that files round-trip), a LayerNorm before and one after the blocks, biases of the patch
    embedding and of the keys, and a position table (else rotary positions); and the mean and standard deviation that
    normalise pixels in [0, 1].
    """

    width: int
    depth: int
    num_heads: int
    image_size: int = 224
    patch_size: int = 16
    num_registers: int = 0
    ffn: str = "mlp"
    mlp_width: int | None = None
    activation: str = "gelu"
    epsilon: float = 1e-6
    layer_scale_init: float | None = None
    compute_dtype: str = "float32"
    init_std: float = 0.02

    class_token: ClassVar[bool] = True
    mask_token: ClassVar[bool] = False
    pre_norm: ClassVar[bool] = False
    final_norm: ClassVar[bool] = True
    patch_bias: ClassVar[bool] = True
    key_bias: ClassVar[bool] = True
    position_table: ClassVar[bool] = True
    pixel_statistics: ClassVar[tuple] = IMAGENET

    def __post_init__(self):
        check_fields("model", self)
        check(
            self.width % self.num_heads == 0,
            f"width {self.width} does not divide by num_heads {self.num_heads}",
        )
        check(
            self.position_table or self.width % (4 * self.num_heads) == 0,
            f"head width {self.width // self.num_heads} does not divide by 4, as rotary positions need",
        )
        check(
            not self.position_table or self.image_size % self.patch_size == 0,
            f"image_size {self.image_size} does not divide by patch_size {self.patch_size}",
        )
        check(self.ffn in ("mlp", "swiglu"), f"no ffn '{self.ffn}': choose mlp or swiglu")
        check(self.activation in ACTIVATIONS, f"no activation '{self.activation}': choose {', '.join(ACTIVATIONS)}")
        check_dtype(self.compute_dtype)

    @property
    def feature_width(self) -> int:
        """Return F of the patch features."""
        return self.width

    @property
    def hidden_width(self) -> int:
        """Return the hidden width of the MLP."""
        by_width = 4 * self.width if self.ffn == "mlp" else (int(4 * self.width * 2 / 3) + 7) // 8 * 8
        return self.mlp_width or by_width


class ViT(nnx.Module):
    """Encode images into patch, class and register tokens."""

    execution = PLAIN

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        d, tiny = c.width, jax.nn.initializers.normal(1e-6)
        init = jax.nn.initializers.truncated_normal(c.init_std)
        self.patch_embed = PatchEmbed(c.patch_size, 3, d, rngs=rngs, init=init, bias=c.patch_bias)
        if c.class_token:
            self.cls_token = nnx.Param(tiny(rngs.params(), (1, 1, d), jnp.float32))
        if c.position_table:
            places = c.class_token + (c.image_size // c.patch_size) ** 2
            self.pos_embed = nnx.Param(init(rngs.params(), (1, places, d), jnp.float32))
        if c.num_registers:
            self.register_tokens = nnx.Param(tiny(rngs.params(), (1, c.num_registers, d), jnp.float32))
        if c.mask_token:
            self.mask_token = nnx.Param(jnp.zeros((1, d), jnp.float32))
        if c.pre_norm:
            self.pre_norm = layer_norm(d, rngs=rngs, epsilon=c.epsilon)
        self.blocks = stack(lambda rngs: Block(c, rngs=rngs), c.depth, rngs)
        if c.final_norm:
            self.norm = layer_norm(d, rngs=rngs, epsilon=c.epsilon)

    def __call__(self, pixels: jax.Array) -> dict[str, jax.Array]:
        """Encode images.

        Args:
          pixels: (B, H, W, 3), normalised by `preprocess`.

        Returns:
          dict of float32 arrays: patch_tokens (B, N, D) in row order, register_tokens (B, R, D), and cls_token (B, D)
          if the encoder has one.

        Raises:
          SfdError: H or W does not divide by the patch size.
        """
        c = self.config
        b, h, w, _ = pixels.shape
        for side in (h, w):
            check_divides(side, c.patch_size, "the encoder's patch_size")
        rows, columns, first_patch = h // c.patch_size, w // c.patch_size, c.class_token + c.num_registers
        patches, leading, extras = self.patch_embed(pixels.astype(jnp.float32)), [], ()
        if c.class_token:
            leading.append(self.cls_token[...])
        if c.position_table:
            patches = patches + self.positions(rows, columns)
            # The class token has its own position; registers have none.
            leading = [token + self.pos_embed[...][:, :1] for token in leading]
        else:
            extras = (rotary_of_patches(c.width // c.num_heads, rows, columns, first_patch, c.rope_theta),)
        if c.num_registers:
            leading.append(self.register_tokens[...])
        leading = [jnp.broadcast_to(token, (b, *token.shape[1:])) for token in leading]
        tokens = jnp.concatenate([*leading, patches], axis=1)
        if c.pre_norm:
            tokens = self.pre_norm(tokens)
        tokens = run_stack(self.blocks, self.execution, tokens, extras=extras)
        if c.final_norm:
            tokens = self.norm(tokens)
        out = {"patch_tokens": tokens[:, first_patch:], "register_tokens": tokens[:, int(c.class_token) : first_patch]}
        return out | ({"cls_token": tokens[:, 0]} if c.class_token else {})

    def tokens(self, pixels: jax.Array, grid: int) -> dict[str, jax.Array]:
        """Encode images (B, S, S, 3) in [-1, 1], resized to grid x grid patches; see `__call__`."""
        return self(preprocess(pixels, grid * self.config.patch_size, self.config.pixel_statistics))

    def patch_features(self, pixels: jax.Array, grid: int) -> jax.Array:
        """Return the patch tokens (B, grid * grid, D) of images (B, S, S, 3) in [-1, 1]."""
        return self.tokens(pixels, grid)["patch_tokens"]

    def positions(self, rows: int, columns: int) -> jax.Array:
        """Return the position table of the patches, (1, rows * columns, D), resized where needed."""
        c = self.config
        grid = c.image_size // c.patch_size
        table = self.pos_embed[...][:, int(c.class_token) :].reshape(1, grid, grid, c.width)
        if (rows, columns) != (grid, grid):
            table = self.resize_table(table, rows, columns)
        return table.reshape(1, rows * columns, c.width)

    def resize_table(self, table: jax.Array, rows: int, columns: int) -> jax.Array:
        """Resize a position table (1, H, W, D) to (1, rows, columns, D): bicubic without antialias.

        Source: transformers, interpolate_pos_encoding of CLIP, SigLIP and MAE.
        """
        return resize_bicubic(table, rows, columns)


class Block(nnx.Module):
    """Apply pre-LayerNorm attention and MLP, each with optional LayerScale."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        c, d = config, config.width
        init = jax.nn.initializers.truncated_normal(c.init_std)
        options = dict(rngs=rngs, init=init, dtype=jnp.dtype(config.compute_dtype))
        self.norm1 = layer_norm(d, rngs=rngs, epsilon=c.epsilon)
        self.attention = SelfAttention(d, c.num_heads, key_bias=c.key_bias, **options)
        self.norm2 = layer_norm(d, rngs=rngs, epsilon=c.epsilon)
        if c.ffn == "swiglu":
            self.mlp = SwiGlu(d, c.hidden_width, **options)
        else:
            self.mlp = Mlp(d, c.hidden_width, ACTIVATIONS[c.activation], **options)
        scaled = c.layer_scale_init is not None
        self.scale1, self.scale2 = (LayerScale(d, c.layer_scale_init) if scaled else _unscaled for _ in range(2))

    def __call__(self, x: jax.Array, rotary: Rotary | None = None) -> jax.Array:
        x = x + self.scale1(self.attention(self.norm1(x), rotary))
        return x + self.scale2(self.mlp(self.norm2(x)))


class LayerScale(nnx.Module):
    """Multiply each channel by a learned float32 factor."""

    def __init__(self, width: int, init: float):
        self.gamma = nnx.Param(jnp.full((width,), init, jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x * self.gamma[...][None, None]


def _unscaled(x):
    return x


def preprocess(pixels: jax.Array, size: int, statistics: tuple = IMAGENET) -> jax.Array:
    """Prepare pixels for an encoder: normalise colours, then resize by bicubic without antialias.

    Args:
      pixels: (B, H, W, 3) in [-1, 1].
      size: height and width of the result; 256 px become 224 at patch size 14 and stay 256 at patch size 16.
      statistics: mean and standard deviation of the colours, in [0, 1].

    Returns:
      (B, size, size, 3) float32.

    Source: REPA, train.py, preprocess_raw_image, which the SFD release follows for DINOv2.
    """
    pixels = standardise((pixels.astype(jnp.float32) + 1.0) / 2.0, statistics)
    return pixels if pixels.shape[1:3] == (size, size) else resize_bicubic(pixels, size, size)


def standardise(pixels: jax.Array, statistics: tuple = IMAGENET) -> jax.Array:
    """Normalise the colours of pixels (B, H, W, 3) in [0, 1] by a mean and standard deviation."""
    mean, std = (np.array(values, np.float32)[None, None, None] for values in statistics)
    return (pixels - mean) / std
