"""Visual encoders: networks that turn an image into one feature vector a patch, behind one interface.

The module class `Cls(config, *, rngs)` of an encoder owns its preprocessing:

  patch_features(pixels, grid)  pixels (B,S,S,3) float32 in [-1,1], any size S -> (B, grid*grid, F) by rows
  class_token(images, size)     images (B,H,W,3) float32, 0..255 -> (B,F) float32, as it sees them at size x size pixels
                                in released metrics; left out where there is none

Its config has `patch_size`, `feature_width` (F) and, beside a class token, `metric_size` and
`metric_name(trained_here)`.
`tiles.py` knows at which grid an image is seen, and in how many tiles. docs/extend.md tells how to add one.
"""

from collections.abc import Mapping
from typing import Any

from flax import nnx

from sfd_jax.models.encoders.dinov2 import DINOV2_SIZES, DinoV2, DinoV2Config, dinov2_config
from sfd_jax.models.encoders.tiles import Tiling, VisualEncoder, to_float
from sfd_jax.models.network import NETWORKS, Network
from sfd_jax.registry import FORMATS, Registry

# Module classes by name; `network_of(metadata, ENCODERS)` reads a checkpoint of any of them.
ENCODERS: Registry[type[nnx.Module]] = Registry("visual encoder")


def register_encoder(name: str, config: type, network: type[nnx.Module], formats: Mapping[str, Any] = {}) -> None:
    """Make a visual encoder known to checkpoints, `sfd convert`, extraction, REPA and metrics.

    Args:
      name: what checkpoints call it.
      config: its config, a frozen dataclass of JSON-able fields.
      network: its module class, as this package's docstring tells.
      formats: released files that `sfd convert` reads and writes, by name; each as in `sfd_jax.convert`.

    Raises:
      SfdError: a name is taken.
    """
    module = network.__module__
    ENCODERS.register(name, network, module)
    NETWORKS.register(name, (config, network), module)
    for format_name, form in formats.items():
        FORMATS.register(format_name, form, module)


def released_encoder(**changes: Any) -> Network:
    """Return the network of the encoder that the released latents were made with, with fields set otherwise."""
    return Network("dinov2", dinov2_config("B", **changes))


register_encoder("dinov2", DinoV2Config, DinoV2)

__all__ = [
    "DINOV2_SIZES",
    "ENCODERS",
    "DinoV2",
    "DinoV2Config",
    "Tiling",
    "VisualEncoder",
    "dinov2_config",
    "released_encoder",
    "register_encoder",
    "to_float",
]
