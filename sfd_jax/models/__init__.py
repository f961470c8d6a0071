"""Networks in Flax NNX: arrays in, arrays out, channels last.

A network knows no loss, guidance, solver, random state or hardware (how it is computed is handed in: execution.py), and
can be differentiated forwards and backwards. Each has a frozen config dataclass of
JSON-able fields and a module class `Cls(config, *, rngs)`, listed here by name; `Network` turns the
pair into `init` and `apply` on plain dict trees. To add one: write its file, list it below.
"""

from sfd_jax.models.dinov2 import DINOV2_SIZES, DinoV2, DinoV2Config, dinov2_config, preprocess
from sfd_jax.models.inception import Inception, InceptionConfig
from sfd_jax.models.lightning_dit import SIZES, DiTConfig, LightningDiT, dit_config
from sfd_jax.models.lpips import Lpips, LpipsConfig
from sfd_jax.models.network import Network, network_of
from sfd_jax.models.semantic_vae import SemanticVAE, SemanticVAEConfig
from sfd_jax.models.texture_vae import TextureVAE, TextureVAEConfig, to_bytes

NETWORKS = {
    "lightning_dit": (DiTConfig, LightningDiT),
    "semantic_vae": (SemanticVAEConfig, SemanticVAE),
    "texture_vae": (TextureVAEConfig, TextureVAE),
    "dinov2": (DinoV2Config, DinoV2),
    "inception": (InceptionConfig, Inception),
    "lpips": (LpipsConfig, Lpips),
}

__all__ = [
    "DINOV2_SIZES",
    "NETWORKS",
    "SIZES",
    "DiTConfig",
    "DinoV2",
    "DinoV2Config",
    "Inception",
    "InceptionConfig",
    "LightningDiT",
    "Lpips",
    "LpipsConfig",
    "Network",
    "SemanticVAE",
    "SemanticVAEConfig",
    "TextureVAE",
    "TextureVAEConfig",
    "dinov2_config",
    "dit_config",
    "network_of",
    "preprocess",
    "to_bytes",
]
