"""Semantic-First Diffusion in JAX: networks, method, data, training, sampling and evaluation.

Source: "Semantic-First Diffusion", arXiv 2512.04926.
"""

__version__ = "0.1.0"
