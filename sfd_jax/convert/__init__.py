"""Released PyTorch checkpoints in and out, without running anything of theirs.

One module a format holds its table (their key, our path, the change of layout), knows its state
dicts by their keys, reads the architecture off the shapes, and wraps an export as the original code
expects it. `table.py` is the one engine for import and export, `torch_files.py` the only place that
knows PyTorch's container (and, for writing, torch). To add a network: write its module, list it.
"""

from sfd_jax.convert import lightning_dit, semantic_vae, texture_vae

# In the order in which `identify` asks them.
FORMATS = {
    "lightning_dit": lightning_dit,
    "semantic_vae": semantic_vae,
    "texture_vae": texture_vae,
}

__all__ = ["FORMATS"]
