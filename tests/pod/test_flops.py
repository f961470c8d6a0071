"""FLOPs of traced programs against results known by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sfd_jax.distributed import make_mesh
from sfd_jax.models import kernels
from sfd_jax.pod.flops import program_flops


def shapes(*sizes):
    return [jax.ShapeDtypeStruct(size, np.float32) for size in sizes]


def scanned(x, weights):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0].sum()


def kept(x, weights):
    policy = jax.checkpoint_policies.dots_saveable
    step = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None), policy=policy, prevent_cse=False)
    return jax.lax.scan(step, x, weights)[0].sum()


def convolved(x, kernel):
    return jax.lax.conv(x, kernel, (1, 1), "SAME").sum()


def once(x, w):
    return jax.lax.while_loop(lambda x: x.sum() > 0, lambda x: x @ w, x)


def branches(x, w):
    return jax.lax.cond(x.sum() > 0, lambda: x @ w, lambda: x @ w @ w @ w)


PRODUCT = 2 * 2 * 11 * 11


@pytest.mark.parametrize(
    "function, sizes, flops",
    [
        (jnp.matmul, [(5, 7), (7, 3)], 2 * 5 * 7 * 3),
        (jnp.matmul, [(4, 5, 7), (4, 7, 3)], 2 * 4 * 5 * 7 * 3),
        (scanned, [(2, 11), (6, 11, 11)], 6 * PRODUCT),
        (jax.grad(scanned, argnums=(0, 1)), [(2, 11), (6, 11, 11)], 3 * 6 * PRODUCT),
        (jax.value_and_grad(jax.checkpoint(scanned), argnums=(0, 1)), [(2, 11), (6, 11, 11)], 4 * 6 * PRODUCT),
        # What the policy saves is not recomputed.
        (jax.grad(kept, argnums=(0, 1)), [(2, 11), (6, 11, 11)], 3 * 6 * PRODUCT),
        (once, [(2, 11), (11, 11)], PRODUCT),
        (branches, [(2, 11), (11, 11)], 3 * PRODUCT),
        # 3 x 3 kernels of 7 channels, at 4 x 6 places, to 5 features.
        (convolved, [(2, 7, 4, 6), (5, 7, 3, 3)], 2 * 2 * 4 * 6 * 5 * 7 * 9),
        (jax.grad(convolved, argnums=(0, 1)), [(2, 7, 4, 6), (5, 7, 3, 3)], 2 * 2 * 2 * 4 * 6 * 5 * 7 * 9),
    ],
)
def test_known_answers(function, sizes, flops):
    assert program_flops(jax.jit(function).trace(*shapes(*sizes)).jaxpr) == flops


def test_shard_map_counts_for_all_devices():
    mesh = make_mesh()
    rows = jax.sharding.PartitionSpec(mesh.axis_names)
    product = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(rows, jax.sharding.PartitionSpec()), out_specs=rows)
    assert program_flops(jax.jit(product).trace(*shapes((16, 11), (11, 3))).jaxpr) == 2 * 16 * 11 * 3


def test_a_fused_kernel_counts_each_of_its_blocks():
    """Two products forwards, as the plain form; in a gradient five more, since the kernel computes the logits again."""
    qkv = [jax.ShapeDtypeStruct((2, 1024, 3, 72), jnp.bfloat16)] * 3
    product = 2 * 2 * 3 * 1024 * 1024 * 72
    loss = lambda attend: lambda *qkv: jnp.sum(attend(*qkv).astype(np.float32))
    flops = lambda f: program_flops(jax.jit(f).trace(*qkv).jaxpr)
    assert flops(kernels.attention) == flops(kernels.splash_attention) == 2 * product
    # And one small product, of out and its gradient.
    assert flops(jax.grad(loss(kernels.splash_attention), (0, 1, 2))) == pytest.approx(7 * product, rel=1e-3)
