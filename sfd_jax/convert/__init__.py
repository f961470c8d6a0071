"""Released PyTorch checkpoints in and out, without running anything of theirs.

A format knows its state dicts by their keys (`recognises`), reads the architecture off the shapes
(`read_config`), holds the table of keys (`TABLE`: their key, our path, the change of layout), and
wraps an export as the original code expects it (`wrap`). `table.py` is the one engine for import and
export; `torch_files.py` the only place that knows PyTorch's container (and, for writing, torch).
To add a network: write its module, list it below.
"""

from sfd_jax.convert import dinov2, inception, lightning_dit, lpips, semantic_vae, texture_vae
from sfd_jax.registry import FORMATS

# In the order in which they are asked whether a state dict is theirs.
for _name, _format in (
    ("lightning_dit", lightning_dit),
    ("semantic_vae", semantic_vae),
    ("texture_vae", texture_vae),
    ("dinov2", dinov2.ORIGINAL),
    ("dinov2_hf", dinov2.HUGGING_FACE),
    ("inception", inception),
    ("lpips", lpips),
):
    FORMATS.register(_name, _format, __name__)

__all__ = ["FORMATS"]
