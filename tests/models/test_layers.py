"""The matmul of Linear layers: what JAX would compute, and a gradient of its own on CPUs alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sfd_jax.models.layers import product


def draw(*shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(len(shape)), shape, dtype)


@pytest.mark.parametrize("shape", [(3, 8), (2, 5, 8), (2, 3, 4, 8)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_product_and_its_gradients_are_jaxs(shape, dtype):
    x, kernel, d_out = draw(*shape, dtype=dtype), draw(8, 6, dtype=dtype), draw(*shape[:-1], 6, dtype=dtype)
    out, pull = jax.vjp(jax.jit(product), x, kernel)
    # Compiled as ours is: outside of jit, jax 0.11 rounds partial sums of bfloat16 products otherwise.
    wanted, pull_wanted = jax.vjp(jax.jit(jnp.matmul), x, kernel)
    for a, b in zip((out, *pull(d_out)), (wanted, *pull_wanted(d_out)), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        tolerance = 1e-5 if dtype == jnp.float32 else 2**-7  # a rounding or two of sums of at most 24
        np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=tolerance, atol=tolerance)


def test_only_float32_on_a_cpu_is_transposed():
    def text(platform, dtype):
        gradient = jax.jit(jax.grad(lambda kernel: jnp.sum(product(draw(4, 8, dtype=dtype), kernel))))
        return gradient.trace(draw(8, 6, dtype=dtype)).lower(lowering_platforms=(platform,)).as_text()

    assert "optimization_barrier" in text("cpu", jnp.float32)
    assert "optimization_barrier" not in text("tpu", jnp.float32) + text("cuda", jnp.float32)
    assert "optimization_barrier" not in text("cpu", jnp.bfloat16)
