import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sfd_jax.models.attention import attend, implementation_for

# bfloat16 rounds by 2^-9 of values up to about 4; float32 differs by the order of sums.
TOLERANCE = {"float32": 2e-6, "bfloat16": 3e-2}


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_written_out_gradient_is_jax_own(dtype):
    keys = jax.random.split(jax.random.key(0), 4)
    query, key, value, d_out = (jax.random.normal(k, (2, 7, 3, 5)).astype(dtype) for k in keys)

    @jax.jit
    def both(query, key, value, d_out):
        answers = [jax.vjp(f, query, key, value) for f in (attend, jax.nn.dot_product_attention)]
        return [(out, *pull(d_out)) for out, pull in answers]

    ours, wanted = both(query, key, value, d_out)
    for a, b in zip(ours, wanted, strict=True):
        assert a.dtype == jnp.dtype(dtype)
        np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), atol=TOLERANCE[dtype])


def test_choice_of_a_backend():
    # XL's head width is 72, a multiple of 8; cuDNN has no float32.
    assert implementation_for("gpu", jnp.zeros(1, "bfloat16").dtype, 72) == "cudnn"
    for unfit in (
        ("gpu", jnp.float32, 72),
        ("gpu", jnp.bfloat16, 20),
        ("tpu", jnp.bfloat16, 72),
        ("cpu", jnp.bfloat16, 64),
    ):
        assert implementation_for(*unfit) == "plain"
