"""Terms that several losses share; each keeps the batch axis, and the caller takes the mean."""

import jax
import jax.numpy as jnp

from sfd_jax.models.kernels import product


def gaussian_kl(mean: jax.Array, logvar: jax.Array) -> jax.Array:
    """Return KL(N(mean, exp(logvar)) || N(0, 1)), summed over all but the first axis: (B,)."""
    each = 0.5 * (jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar)
    return each.reshape(each.shape[0], -1).sum(axis=-1)


def cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """Return the cross-entropy of logits (B, K) with int labels (B,), smoothed: (B,)."""
    log_p = jax.nn.log_softmax(logits)
    of_label = jnp.take_along_axis(log_p, labels[:, None], axis=-1)[:, 0]
    return -((1.0 - smoothing) * of_label + smoothing * log_p.mean(axis=-1))


def hits(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return (correct, total) of logits (B, K): an accuracy as a (sum, count) metric."""
    return jnp.sum(jnp.argmax(logits, axis=-1) == labels), jnp.asarray(labels.shape[0])


def linear_head(key: jax.Array, features: int, classes: int) -> dict[str, jax.Array]:
    """Return the parameters of a linear classifier."""
    return {"kernel": 0.02 * jax.random.normal(key, (features, classes)), "bias": jnp.zeros(classes)}


def apply_head(head: dict[str, jax.Array], features: jax.Array) -> jax.Array:
    """Return logits (B, K) of features (B, F)."""
    return product(features, head["kernel"]) + head["bias"][None]
