"""Tuned operations: values and gradients equal those of the plain forms, and derivatives in both directions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sfd_jax.models import kernels

# bfloat16 rounds by 2^-9 of values up to about 4; float32 differs by the order of sums.
TOLERANCE = {"float32": 2e-6, "bfloat16": 3e-2}


def draw(*shapes, dtype="float32"):
    keys = jax.random.split(jax.random.key(len(shapes)), len(shapes))
    return [jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True)]


def same(found, wanted, tolerance):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        scale = max(1.0, float(np.abs(np.float32(b)).max()))
        np.testing.assert_allclose(np.float32(a), np.float32(b), atol=tolerance * scale)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("attention", [kernels.attention, kernels.tuned_attention])
def test_attention_and_its_derivatives_equal_jaxs(attention, dtype):
    *qkv, d_out = draw(*[(2, 7, 3, 5)] * 4, dtype=dtype)

    @jax.jit
    def results(qkv, d_out):
        def both(f):
            out, pull = jax.vjp(f, *qkv)
            return (out, *pull(d_out)), jax.jvp(f, qkv, qkv[::-1])

        return [both(f) for f in (attention, jax.nn.dot_product_attention)]

    (backward, forward), (wanted, wanted_forward) = results(qkv, d_out)
    same(backward, wanted, TOLERANCE[dtype])
    same(forward, wanted_forward, 4 * TOLERANCE[dtype])


@pytest.mark.parametrize("tokens", [100, 256])  # of 100 the kernel cannot make blocks
def test_splash_attention_and_its_gradient_equal_the_plain_ones(tokens, monkeypatch):
    monkeypatch.setattr(kernels, "_SPLASH_BLOCK", 128)
    *qkv, d_out = draw(*[(2, tokens, 3, 20)] * 4, dtype="bfloat16")  # heads of 20, which 128 lanes are padded from
    splash = functools.partial(kernels.splash_attention, interpret=True)

    @functools.partial(jax.jit, static_argnums=0)
    def results(attention, qkv):
        out, pull = jax.vjp(attention, *qkv)
        return out, *pull(d_out)

    same(results(splash, qkv), results(kernels.attention, qkv), TOLERANCE["bfloat16"])


@pytest.mark.parametrize("shape", [(3, 8), (2, 3, 4, 8)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_product_and_its_gradients_equal_jaxs(shape, dtype):
    x, kernel, d_out = draw(shape, (8, 6), (*shape[:-1], 6), dtype=dtype)
    out, pull = jax.vjp(jax.jit(kernels.cpu_product), x, kernel)
    # Under jit like ours: outside of jit, jax 0.11 rounds partial sums of bfloat16 products differently.
    wanted, pull_wanted = jax.vjp(jax.jit(jnp.matmul), x, kernel)
    # A rounding or two of sums of at most 24.
    same((out, *pull(d_out)), (wanted, *pull_wanted(d_out)), 1e-5 if dtype == jnp.float32 else 2**-7)


def test_only_float32_is_transposed():
    def text(product, dtype):
        x, kernel = draw((4, 8), (8, 6), dtype=dtype)
        return jax.jit(jax.grad(lambda kernel: jnp.sum(product(x, kernel)))).lower(kernel).as_text()

    assert "optimization_barrier" in text(kernels.cpu_product, "float32")
    assert "optimization_barrier" not in text(kernels.cpu_product, "bfloat16") + text(kernels.product, "float32")


@pytest.mark.parametrize("remat", [None, jax.checkpoint_policies.dots_with_no_batch_dims_saveable])
def test_tuned_operations_in_a_loop(remat):
    """A gradient, a tangent, and the gradient of a tangent, through a scan and through remat."""

    def loss(attention, product):
        def block(x, kernel):
            return attention(*(product(x, kernel).reshape(2, 5, 1, 4),) * 3).reshape(x.shape), None

        step = jax.checkpoint(block, policy=remat) if remat else block
        return lambda kernels, x: jnp.sum(jax.lax.scan(step, x, kernels)[0] ** 2)

    def results(f):
        tangent = lambda *args: jax.jvp(f, args, args)
        return jax.grad(f, (0, 1))(*inputs), tangent(*inputs), jax.grad(lambda *a: tangent(*a)[1], (0, 1))(*inputs)

    inputs = [x / 2 for x in draw((3, 4, 4), (2, 5, 4))]  # small, so that attention is not a step function
    tuned = jax.jit(lambda: results(loss(kernels.tuned_attention, kernels.cpu_product)))()
    same(tuned, jax.jit(lambda: results(loss(kernels.attention, kernels.product)))(), 2e-6)
