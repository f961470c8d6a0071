"""Semantic-First Diffusion in JAX: networks, method, data, training, sampling and evaluation.

    from sfd_jax import Pipeline
    pipeline = Pipeline.from_pretrained("sfd_xl")
    pipeline.generate("otter")[0].save("otter.png")

Source: "Semantic-First Diffusion", arXiv 2512.04926.
"""

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """Import `Pipeline` where it is asked for: it brings JAX, which most commands import late or not at all."""
    if name == "Pipeline":
        from sfd_jax import libtpu

        libtpu.hush()  # as commands do, before JAX is imported
        from sfd_jax.experiment.pipeline import Pipeline

        return Pipeline
    raise AttributeError(f"module 'sfd_jax' has no attribute '{name}'")
