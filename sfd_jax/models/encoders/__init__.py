"""Visual encoders: networks that turn an image into one feature vector per patch, behind one interface.

The module class `Cls(config, *, rngs)` of an encoder owns its preprocessing:

  patch_features(pixels, grid)  pixels (B,S,S,3) float32 in [-1,1], any size S -> (B, grid*grid, F) by rows
  class_token(images, size)     images (B,H,W,3) float32, 0..255 -> (B,F) float32, the feature of metrics; images are
                                resized to size x size pixels as in the released metrics. Optional

Its config has `patch_size`, `feature_width` (F) and, with `class_token`, `metric_size` and
`metric_name(trained_here)`. `tiles.py` computes the grid and tiles of an image. docs/extend.md adds an encoder.
"""

from collections.abc import Mapping
from typing import Any

from flax import nnx

from sfd_jax.models.encoders.dinov2 import DINOV2_SIZES, DinoV2, DinoV2Config, dinov2_config
from sfd_jax.models.encoders.tiles import Tiling, VisualEncoder, to_float
from sfd_jax.models.encoders.variants import ClipConfig, DinoV3Config, MaeConfig, Siglip2Config
from sfd_jax.models.encoders.vit import ViT
from sfd_jax.models.network import NETWORKS, Network
from sfd_jax.registry import FORMATS, Registry

# Module classes by name; `network_of(metadata, ENCODERS)` reads a checkpoint of any of them.
ENCODERS: Registry[type[nnx.Module]] = Registry("visual encoder")


def register_encoder(name: str, config: type, network: type[nnx.Module], formats: Mapping[str, Any] = {}) -> None:
    """Register a visual encoder for checkpoints, `sfd convert`, extraction, REPA and metrics.

    Args:
      name: its name in checkpoints.
      config: its config, a frozen dataclass of JSON-able fields.
      network: its module class; see this package's docstring.
      formats: released files that `sfd convert` reads and writes, by name; each as in `sfd_jax.convert`.

    Raises:
      SfdError: a name is taken.
    """
    module = network.__module__
    ENCODERS.register(name, network, module)
    NETWORKS.register(name, (config, network), module)
    for format_name, form in formats.items():
        FORMATS.register(format_name, form, module)


register_encoder("dinov2", DinoV2Config, DinoV2)
register_encoder("dinov3", DinoV3Config, ViT)
register_encoder("siglip2", Siglip2Config, ViT)
register_encoder("clip", ClipConfig, ViT)
register_encoder("mae", MaeConfig, ViT)

# Name in `sfd fetch` and the configs -> network and size.
RELEASED = {
    "dinov2_vitb14_reg": ("dinov2", "B"),
    "dinov3_s": ("dinov3", "S"),
    "dinov3": ("dinov3", "B"),
    "dinov3_l": ("dinov3", "L"),
    "siglip2": ("siglip2", "B"),
    "clip": ("clip", "B"),
    "mae": ("mae", "B"),
}


def released_encoder(name: str = "dinov2_vitb14_reg", **changes: Any) -> Network:
    """Return the network of a released encoder, with changed fields.

    Args:
      name: a key of RELEASED; by default the encoder that the released latents were made with.
      changes: config fields with other values.
    """
    network, size = RELEASED[name]
    return Network(network, DINOV2_SIZES[size] | changes)


__all__ = [
    "DINOV2_SIZES",
    "ENCODERS",
    "RELEASED",
    "ClipConfig",
    "DinoV2",
    "DinoV2Config",
    "DinoV3Config",
    "MaeConfig",
    "Siglip2Config",
    "Tiling",
    "ViT",
    "VisualEncoder",
    "dinov2_config",
    "released_encoder",
    "register_encoder",
    "to_float",
]
