"""DINOv2: the vision transformer whose patch features the semantic latents come from.

Maps images to one feature vector a patch, a class token and register tokens, all after the final
LayerNorm. Works at any image size that divides by the patch size: the position table is resized.
The released one is ViT-B/14 with 4 registers, 224 px: N = 256 patches, D = 768.

`convert/dinov2.py` lists the parameters beside their PyTorch keys; `blocks/` leaves are stacked along L.
register_tokens is absent where num_registers is 0. mask_token is only read in DINOv2's own
pre-training; it is kept so that the files round-trip.

Source: DINOv2 (arXiv 2304.07193) with registers (arXiv 2309.16588); released code
dinov2/models/vision_transformer.py.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sfd_jax.errors import SfdError, nearest
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
    layer_norm,
)
from sfd_jax.models.resize import resize_bicubic
from sfd_jax.models.stack import run_stack, stack
from sfd_jax.ranges import check_fields

DINOV2_SIZES = {
    "S": dict(width=384, depth=12, num_heads=6),
    "B": dict(width=768, depth=12, num_heads=12),
    "L": dict(width=1024, depth=24, num_heads=16),
    "g": dict(width=1536, depth=40, num_heads=24, ffn="swiglu"),
}

IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
IMAGENET_STD = np.array([0.229, 0.224, 0.225], np.float32)

INIT = jax.nn.initializers.truncated_normal(0.02)


@dataclasses.dataclass(frozen=True)
class DinoV2Config:
    """Say which DINOv2; the defaults but for the size are those of the released models.

    Attributes:
      width, depth, num_heads: D, L, K.
      image_size: size that the position table is made for (518 px released: a 37 x 37 table).
      patch_size: P.
      num_registers: R.
      ffn: "mlp" (hidden width 4D), or "swiglu" (8/3 D, rounded up to a multiple of 8).
      layer_scale_init: LayerScale's start. 1 suits short training from scratch; DINOv2's own
        pre-training started at 1e-5.
      compute_dtype: "float32" or "bfloat16", dtype of the matmuls in the blocks.
    """

    width: int
    depth: int
    num_heads: int
    image_size: int = 518
    patch_size: int = 14
    num_registers: int = 4
    ffn: str = "mlp"
    layer_scale_init: float = 1.0
    compute_dtype: str = "float32"

    def __post_init__(self):
        check_fields("model", self)
        check(
            self.width % self.num_heads == 0,
            f"width {self.width} does not divide by num_heads {self.num_heads}",
        )
        check(
            self.image_size % self.patch_size == 0,
            f"image_size {self.image_size} does not divide by patch_size {self.patch_size}",
        )
        check(self.ffn in ("mlp", "swiglu"), f"no DINOv2 ffn '{self.ffn}': choose mlp or swiglu")
        check_dtype(self.compute_dtype)

    @property
    def feature_width(self) -> int:
        """Return F of the patch features."""
        return self.width

    @property
    def metric_size(self) -> int:
        """Return the size in pixels at which FD-DINOv2 sees images; a small encoder's is the one it was trained at."""
        return min(self.image_size, 224)

    def metric_name(self, trained_here: bool) -> str:
        """Return "dinov2" for the encoder of the released FD-DINOv2, else a name that says which encoder it is."""
        registers = f"_reg{self.num_registers}" if self.num_registers else ""
        same = ("width", "depth", "num_heads", "ffn")
        released = {name: dinov2_config(name) for name in DINOV2_SIZES}
        sizes = [name for name, known in released.items() if all(getattr(known, f) == getattr(self, f) for f in same)]
        if not sizes or self.patch_size != 14 or trained_here:  # DINOv2's shape and no DINOv2
            return f"encoder_w{self.width}_d{self.depth}_p{self.patch_size}{registers}"
        return "dinov2" if sizes == ["L"] and not registers else f"dinov2_vit{sizes[0].lower()}14{registers}"


def dinov2_config(size: str, **overrides) -> DinoV2Config:
    """Return the config of a released size ("S", "B", "L", "g").

    Raises:
      SfdError: no such size.
    """
    if size not in DINOV2_SIZES:
        raise SfdError(f"no DINOv2 size '{size}': {nearest(size, DINOV2_SIZES)}")
    return DinoV2Config(**{**DINOV2_SIZES[size], **overrides})


def preprocess(pixels: jax.Array, size: int) -> jax.Array:
    """Turn pixels into what DINOv2 reads: ImageNet statistics, then bicubic without antialias.

    Args:
      pixels: (B, H, W, 3) in [-1, 1].
      size: height and width of the result (the released pipeline: 256 px -> 224).

    Returns:
      (B, size, size, 3) float32.

    Source: REPA, train.py, preprocess_raw_image, which the SFD release follows.
    """
    return resize_bicubic(_standardise((pixels.astype(jnp.float32) + 1.0) / 2.0), size, size)


def _standardise(pixels: jax.Array) -> jax.Array:
    """Take ImageNet's mean and standard deviation from pixels (B, H, W, 3) in [0, 1]."""
    return (pixels - IMAGENET_MEAN[None, None, None]) / IMAGENET_STD[None, None, None]


class DinoV2(nnx.Module):
    """Encode images into patch, class and register tokens."""

    execution = PLAIN

    def __init__(self, config: DinoV2Config, *, rngs: nnx.Rngs):
        c = self.config = config
        d = c.width
        grid = c.image_size // c.patch_size
        tiny = jax.nn.initializers.normal(1e-6)
        self.patch_embed = PatchEmbed(c.patch_size, 3, d, rngs=rngs, init=INIT)
        self.cls_token = nnx.Param(tiny(rngs.params(), (1, 1, d), jnp.float32))
        self.pos_embed = nnx.Param(INIT(rngs.params(), (1, 1 + grid * grid, d), jnp.float32))
        if c.num_registers:
            shape = (1, c.num_registers, d)
            self.register_tokens = nnx.Param(tiny(rngs.params(), shape, jnp.float32))
        self.mask_token = nnx.Param(jnp.zeros((1, d), jnp.float32))
        self.blocks = stack(lambda rngs: Block(c, rngs=rngs), c.depth, rngs)
        self.norm = layer_norm(d, rngs=rngs)

    def __call__(self, pixels: jax.Array) -> dict[str, jax.Array]:
        """Encode images.

        Args:
          pixels: (B, H, W, 3), normalised with the ImageNet statistics (see `preprocess`).

        Returns:
          dict of float32 arrays: patch_tokens (B, N, D) in row order, cls_token (B, D),
          register_tokens (B, R, D).

        Raises:
          SfdError: H or W does not divide by the patch size.
        """
        c = self.config
        b, h, w, _ = pixels.shape
        for side in (h, w):
            check_divides(side, c.patch_size, "the encoder's patch_size")
        positions = self.positions(h // c.patch_size, w // c.patch_size)
        patches = self.patch_embed(pixels.astype(jnp.float32)) + positions
        # The class token has a position of its own; registers have none.
        cls_token = self.cls_token[...] + self.pos_embed[...][:, :1]
        tokens = [jnp.broadcast_to(cls_token, (b, 1, c.width))]
        if c.num_registers:
            shape = (b, c.num_registers, c.width)
            tokens.append(jnp.broadcast_to(self.register_tokens[...], shape))
        tokens = jnp.concatenate([*tokens, patches], axis=1)
        tokens = run_stack(self.blocks, self.execution, tokens)
        tokens = self.norm(tokens)
        first_patch = 1 + c.num_registers
        return {
            "patch_tokens": tokens[:, first_patch:],
            "cls_token": tokens[:, 0],
            "register_tokens": tokens[:, 1:first_patch],
        }

    def tokens(self, pixels: jax.Array, grid: int) -> dict[str, jax.Array]:
        """Encode images (B, S, S, 3) in [-1, 1], seen as grid x grid patches; returns as `__call__`."""
        return self(preprocess(pixels, grid * self.config.patch_size))

    def patch_features(self, pixels: jax.Array, grid: int) -> jax.Array:
        """Return the patch tokens (B, grid * grid, D) of images (B, S, S, 3) in [-1, 1]."""
        return self.tokens(pixels, grid)["patch_tokens"]

    def class_token(self, images: jax.Array, size: int) -> jax.Array:
        """Return the class token (B, D) of images (B, H, W, 3), 0..255, resized to `size` as FD-DINOv2 does.

        Source: Stein et al. 2023 (arXiv 2306.04675), `dgm-eval`: antialiased bicubic resize in bytes, then
          ImageNet's mean and std.
        """
        batch, height, width, _ = images.shape
        if (height, width) != (size, size):
            images = jax.image.resize(images, (batch, size, size, 3), "cubic", antialias=True)
            images = jnp.round(jnp.clip(images, 0.0, 255.0))
        return self(_standardise(images / 255.0))["cls_token"]

    def positions(self, rows: int, columns: int) -> jax.Array:
        """Return the position table of the patches, (1, rows * columns, D), resized where needed.

        Bicubic: with antialias in models with registers; in those without, no antialias and the
        scale computed for 0.1 patches more, as each kind was released.
        """
        c = self.config
        grid = c.image_size // c.patch_size
        table = self.pos_embed[...][:, 1:].reshape(1, grid, grid, c.width)
        if (rows, columns) != (grid, grid):
            if c.num_registers:
                shape = (1, rows, columns, c.width)
                table = jax.image.resize(table, shape, "cubic", antialias=True)
            else:
                table = resize_bicubic(table, rows, columns, offset=0.1)
        return table.reshape(1, rows * columns, c.width)


class Block(nnx.Module):
    """Pre-LayerNorm attention and MLP, each scaled per channel before it is added."""

    def __init__(self, config: DinoV2Config, *, rngs: nnx.Rngs):
        c, d, dtype = config, config.width, jnp.dtype(config.compute_dtype)
        self.norm1 = layer_norm(d, rngs=rngs)
        self.attention = SelfAttention(d, c.num_heads, rngs=rngs, init=INIT, dtype=dtype)
        self.scale1 = LayerScale(d, c.layer_scale_init)
        self.norm2 = layer_norm(d, rngs=rngs)
        if c.ffn == "swiglu":
            # Two thirds of 4D, rounded up to a multiple of 8.
            hidden = (int(4 * d * 2 / 3) + 7) // 8 * 8
            self.mlp = SwiGlu(d, hidden, rngs=rngs, init=INIT, dtype=dtype)
        else:
            self.mlp = Mlp(d, 4 * d, gelu_exact, rngs=rngs, init=INIT, dtype=dtype)
        self.scale2 = LayerScale(d, c.layer_scale_init)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.scale1(self.attention(self.norm1(x)))
        return x + self.scale2(self.mlp(self.norm2(x)))


class LayerScale(nnx.Module):
    """A learned factor a channel, float32."""

    def __init__(self, width: int, init: float):
        self.gamma = nnx.Param(jnp.full((width,), init, jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x * self.gamma[...][None, None]
