"""DINOv3, SigLIP 2, CLIP and MAE: how each differs from the shared vision transformer.

At patch size 16, 256 px are 16 x 16 patches, as many as DINOv2 has at 224 px, so images are not resized.

Source: transformers, modeling_dinov3_vit.py, modeling_siglip.py, modeling_clip.py, modeling_vit_mae.py.
"""

import dataclasses
from typing import ClassVar

from sfd_jax.models.encoders.vit import ViTConfig


@dataclasses.dataclass(frozen=True)
class DinoV3Config(ViTConfig):
    """DINOv3 ViT (arXiv 2508.10104): rotary positions of base `rope_theta`; other fields as in `ViTConfig`."""

    num_registers: int = 4
    epsilon: float = 1e-5
    layer_scale_init: float = 1.0
    rope_theta: float = 100.0

    mask_token: ClassVar[bool] = True
    key_bias: ClassVar[bool] = False
    position_table: ClassVar[bool] = False


@dataclasses.dataclass(frozen=True)
class Siglip2Config(ViTConfig):
    """The image tower of SigLIP, and of SigLIP 2 (arXiv 2502.14786) of fixed size, without the pooling head."""

    image_size: int = 256
    activation: str = "gelu_pytorch_tanh"

    class_token: ClassVar[bool] = False
    pixel_statistics: ClassVar[tuple] = ((0.5,) * 3, (0.5,) * 3)


@dataclasses.dataclass(frozen=True)
class ClipConfig(ViTConfig):
    """The image tower of CLIP (arXiv 2103.00020); features are its last hidden state, before the output norm."""

    activation: str = "quick_gelu"
    epsilon: float = 1e-5

    pre_norm: ClassVar[bool] = True
    final_norm: ClassVar[bool] = False
    patch_bias: ClassVar[bool] = False
    pixel_statistics: ClassVar[tuple] = (
        (0.48145466, 0.4578275, 0.40821073),
        (0.26862954, 0.26130258, 0.27577711),
    )


@dataclasses.dataclass(frozen=True)
class MaeConfig(ViTConfig):
    """The encoder of a masked autoencoder (arXiv 2111.06377), without masking; its sin-cos positions are stored."""

    epsilon: float = 1e-12
