"""Networks in Flax NNX: arrays in, arrays out, channels last.

A network knows no loss, guidance, solver, random state or hardware (how it is computed is passed in: execution.py), and
can be differentiated forwards and backwards. Each has a frozen config dataclass of JSON-able fields and a module class
`Cls(config, *, rngs)`, registered here by name; `Network` turns the pair into `init` and `apply` on plain dict trees.
To add one: write its file, register it below (visual encoders: in `encoders`).
"""

from sfd_jax.models.encoders import ENCODERS, register_encoder
from sfd_jax.models.inception import Inception, InceptionConfig
from sfd_jax.models.lightning_dit import SIZES, DiTConfig, LightningDiT, dit_config
from sfd_jax.models.lpips import Lpips, LpipsConfig
from sfd_jax.models.network import NETWORKS, Network, network_of
from sfd_jax.models.semantic_vae import SemanticVAE, SemanticVAEConfig
from sfd_jax.models.texture_vae import TextureVAE, TextureVAEConfig, to_bytes

for _name, _parts in {
    "lightning_dit": (DiTConfig, LightningDiT),
    "semantic_vae": (SemanticVAEConfig, SemanticVAE),
    "texture_vae": (TextureVAEConfig, TextureVAE),
    "inception": (InceptionConfig, Inception),
    "lpips": (LpipsConfig, Lpips),
}.items():
    NETWORKS.register(_name, _parts, __name__)

__all__ = [
    "ENCODERS",
    "NETWORKS",
    "SIZES",
    "DiTConfig",
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
    "dit_config",
    "network_of",
    "register_encoder",
    "to_bytes",
]
