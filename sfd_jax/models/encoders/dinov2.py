"""DINOv2, whose patch features the Semantic VAE compresses to semantic latents.

The released one is ViT-B/14 with 4 registers, 224 px: N = 256 patches, D = 768.

Source: DINOv2 (arXiv 2304.07193) with registers (arXiv 2309.16588); released code
dinov2/models/vision_transformer.py.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from sfd_jax.errors import SfdError, nearest
from sfd_jax.models.encoders.vit import ViT, ViTConfig, standardise
from sfd_jax.models.resize import resize_bicubic

DINOV2_SIZES = {
    "S": dict(width=384, depth=12, num_heads=6),
    "B": dict(width=768, depth=12, num_heads=12),
    "L": dict(width=1024, depth=24, num_heads=16),
    "g": dict(width=1536, depth=40, num_heads=24, ffn="swiglu"),
}


@dataclasses.dataclass(frozen=True)
class DinoV2Config(ViTConfig):
    """Describe a DINOv2; `ViTConfig` explains the fields.

    LayerScale starts at 1, which suits short training from scratch; DINOv2's own pre-training started at 1e-5.
    """

    image_size: int = 518
    patch_size: int = 14
    num_registers: int = 4
    layer_scale_init: float = 1.0

    mask_token: ClassVar[bool] = True

    @property
    def metric_size(self) -> int:
        """Return the size in pixels at which FD-DINOv2 sees images."""
        return 224

    def metric_name(self, trained_here: bool) -> str:
        """Return "dinov2" for the encoder of the released FD-DINOv2, else a name that identifies the encoder."""
        registers = f"_reg{self.num_registers}" if self.num_registers else ""
        same = ("width", "depth", "num_heads", "ffn")
        released = {name: dinov2_config(name) for name in DINOV2_SIZES}
        sizes = [name for name, known in released.items() if all(getattr(known, f) == getattr(self, f) for f in same)]
        if not sizes or self.patch_size != 14 or trained_here:  # not a released DINOv2
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


class DinoV2(ViT):
    """Encode images into patch, class and register tokens."""

    def class_token(self, images: jax.Array, size: int) -> jax.Array:
        """Return the class token (B, D) of images (B, H, W, 3), 0..255, resized to `size` as FD-DINOv2 does.

        Source: Stein et al. 2023 (arXiv 2306.04675), `dgm-eval`: antialiased bicubic resize in bytes, then
          ImageNet's mean and std.
        """
        batch, height, width, _ = images.shape
        if (height, width) != (size, size):
            images = jax.image.resize(images, (batch, size, size, 3), "cubic", antialias=True)
            images = jnp.round(jnp.clip(images, 0.0, 255.0))
        return self(standardise(images / 255.0))["cls_token"]

    def resize_table(self, table: jax.Array, rows: int, columns: int) -> jax.Array:
        """Resize a position table (1, H, W, D) to (1, rows, columns, D).

        Bicubic, as released: with antialias if the model has registers; else without antialias and with the
        scale computed for 0.1 patches more.
        """
        if self.config.num_registers:
            return jax.image.resize(table, (1, rows, columns, table.shape[-1]), "cubic", antialias=True)
        return resize_bicubic(table, rows, columns, offset=0.1)
