"""Released PyTorch checkpoints in and out, without running anything of theirs.

A format is a module with a `TABLE` of keys (their key, our path, the change of layout) and three functions:

- `recognises(state) -> bool` knows a state dict by its keys;
- `read_config(state, given, stored) -> (fields, notes)` reads the fields of the network's config off keys and shapes,
  with a sentence for each that they did not tell. `given` is what the user states, which wins, `stored` the file's own
  config by the released names. SfdError says what must be stated;
- `wrap(state, metadata)` puts an export into the tree that the original code's file has around it.

`table.py` is the one engine for import and export; `torch_files.py` the only place that knows PyTorch's container
(and, for writing, torch). To add a network: write its module, list it below.
"""

from sfd_jax.convert import dinov2, encoders, inception, lightning_dit, lpips, semantic_vae, texture_vae
from sfd_jax.registry import FORMATS

# In the order in which they are asked whether a state dict is theirs.
for _name, _format in (
    ("lightning_dit", lightning_dit),
    ("semantic_vae", semantic_vae),
    ("texture_vae", texture_vae),
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
