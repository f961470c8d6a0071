"""Networks in Flax NNX: arrays in, arrays out, channels last.

A network knows no loss, guidance, solver or random state. Each has a frozen config dataclass of
JSON-able fields and a module class `Cls(config, *, rngs)`, listed here by name; `Network` turns the
pair into `init` and `apply` on plain dict trees. To add one: write its file, list it below.
"""

from sfd_jax.models.lightning_dit import SIZES, DiTConfig, LightningDiT, dit_config
from sfd_jax.models.network import Network
from sfd_jax.models.semantic_vae import SemanticVAE, SemanticVAEConfig
from sfd_jax.models.texture_vae import TextureVAE, TextureVAEConfig, to_bytes

NETWORKS = {
    "lightning_dit": (DiTConfig, LightningDiT),
    "semantic_vae": (SemanticVAEConfig, SemanticVAE),
    "texture_vae": (TextureVAEConfig, TextureVAE),
}

__all__ = [
    "NETWORKS",
    "SIZES",
    "DiTConfig",
    "LightningDiT",
    "Network",
    "SemanticVAE",
    "SemanticVAEConfig",
    "TextureVAE",
    "TextureVAEConfig",
    "dit_config",
    "to_bytes",
]
