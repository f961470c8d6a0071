"""The diagonal Gaussian posterior of both autoencoders' encoders."""

import jax
import jax.numpy as jnp


def split_moments(moments: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Split (..., 2Z) into mean and log-variance (..., Z), the latter clamped to [-30, 20]."""
    mean, logvar = jnp.split(moments, 2, axis=-1)
    return mean, jnp.clip(logvar, -30.0, 20.0)


def sample_posterior(mean: jax.Array, logvar: jax.Array | None, noise: jax.Array | None) -> jax.Array:
    """Return mean + exp(logvar / 2) * noise; the mean where logvar or noise is None."""
    if logvar is None or noise is None:
        return mean
    return mean + jnp.exp(0.5 * logvar) * noise
