"""Convert PyTorch checkpoints in both directions, without running any code from them.

A format is a module with a `TABLE` of keys (their key, our path, the change of layout) and three functions:

- `recognises(state) -> bool` identifies a state dict by its keys;
- `read_config(state, given, stored) -> (fields, notes)` reads the fields of the network's config from keys and shapes,
  with a note for each field that these do not determine. `given` holds the user's values, which win; `stored` is the
  file's own config by the released names. SfdError says what the user must give;
- `wrap(state, metadata)` puts an export into the tree that the original code saves around it.

`table.py` is the one engine for import and export; only `torch_files.py` knows PyTorch's container (and, for writing,
torch). To add a network, write its module and list it below.
"""

from sfd_jax.convert import dinov2, encoders, inception, lightning_dit, lpips, semantic_vae, texture_vae
from sfd_jax.registry import FORMATS

# In the order in which they are tried on a state dict.
for _name, _format in (
    ("lightning_dit", lightning_dit),
    ("semantic_vae", semantic_vae),
    ("texture_vae", texture_vae.LDM),
    ("texture_vae_diffusers", texture_vae.DIFFUSERS),
    ("texture_vae_diffusers_old", texture_vae.DIFFUSERS_OLD),
    ("dinov2", dinov2.ORIGINAL),
    ("dinov2_hf", dinov2.HUGGING_FACE),
    ("dinov3", encoders.DINOV3),
    ("siglip2", encoders.SIGLIP2),
    ("clip", encoders.CLIP),
    ("mae", encoders.MAE),
    ("inception", inception),
    ("lpips", lpips),
):
    FORMATS.register(_name, _format, __name__)

__all__ = ["FORMATS"]
