"""Networks under test: random parameters, and calls under jit (eager calls compile op by op)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np


@functools.partial(jax.jit, static_argnums=0, static_argnames=("method", "return_repa"))
def call(network, params, *args, method="__call__", **options):
    """Apply the network under jit."""
    return network.apply(params, *args, method=method, **options)


def random_params(network, seed=0):
    """Draw every leaf: matrices normal by fan-in, scales near one, the rest small.

    Zero-initialised leaves too: a freshly initialised transformer returns zero, whatever is wrong inside.
    """
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name, noise = path[-1].key, rng.standard_normal(leaf.shape).astype(np.float32)
        if name == "kernel":
            layers = leaf.shape[0] if path[0].key == "blocks" else 1
            fan_in = leaf.size // leaf.shape[-1] // layers
            return jnp.asarray(noise / np.float32(np.sqrt(fan_in)))
        if name in ("scale", "gamma", "weight"):
            return jnp.asarray(1 + 0.1 * noise)
        if name == "running_var":
            return jnp.asarray(1 + 0.1 * np.abs(noise))
        return jnp.asarray(0.1 * noise)

    return jax.tree_util.tree_map_with_path(draw, network.abstract_params())
