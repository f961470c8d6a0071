"""A stack of equal blocks: parameters stacked along a leading axis L, run as one compiled loop.

One loop body instead of L copies keeps compilation short, and stacked parameters are few large
arrays, which shard and checkpoint well.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from sfd_jax.models.execution import Execution

# What a block keeps for the backward pass: "full" recomputes everything, "dots" all but the matmuls with weights.
REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def stack(make_block: Callable[[nnx.Rngs], nnx.Module], depth: int, rngs: nnx.Rngs) -> nnx.Module:
    """Build `depth` blocks as one module with stacked parameters, each drawn with its own key.

    Args:
      make_block: builds one block from an nnx.Rngs.
      depth: L.
      rngs: one key is drawn from its `params` stream.
    """
    make = nnx.vmap(lambda key: make_block(nnx.Rngs(params=key)))
    return make(jax.random.split(rngs.params(), depth))


def run_equal(modules: list[nnx.Module], execution: Execution, x: jax.Array) -> jax.Array:
    """Pass `x` through modules of the same structure that have their own parameters, from three on as one loop.

    Two take the compiler hardly longer than a loop of two.

    Args:
      modules: each returns the shape of `x`.
      execution: `scan` is used here.
      x: (B, ...), input of the first module.
    """
    if not execution.scan or len(modules) < 3:
        for module in modules:
            x = module(x)
        return x
    graphdef, _ = nnx.split(modules[0])
    states = [nnx.to_pure_dict(nnx.state(module)) for module in modules]
    params = jax.tree.map(lambda *each: jnp.stack(each), *states)
    return jax.lax.scan(lambda x, params: (nnx.merge(graphdef, params)(x), None), x, params)[0]


def run_stack(
    blocks: nnx.Module,
    execution: Execution,
    x: jax.Array,
    *,
    extras: tuple = (),
    start: int = 0,
    stop: int | None = None,
) -> jax.Array:
    """Pass `x` through the blocks `start` to `stop` of a stack.

    Weights are gathered inside the loop, so that only one block's are whole at a time.

    Args:
      blocks: what `stack` built.
      execution: `scan`, `remat`, `gather` and `split` are used here.
      x: (B, ...), input of the first block; every block returns the same shape.
      extras: further arguments, the same for each block.
    """
    graphdef, state = nnx.split(blocks)
    params = jax.tree.map(lambda p: p[start:stop], nnx.to_pure_dict(state))

    def step(x, block_params):
        block = nnx.merge(graphdef, execution.gather(block_params))
        return execution.split(block(execution.split(x), *extras)), None

    if execution.remat != "none":
        # A scan already keeps XLA from merging the recomputation with the forward pass.
        step = jax.checkpoint(step, policy=REMAT[execution.remat], prevent_cse=not execution.scan)
    depth = jax.tree.leaves(params)[0].shape[0]
    if execution.scan and depth:
        return jax.lax.scan(step, x, params)[0]
    for layer in range(depth):
        x, _ = step(x, jax.tree.map(lambda p, layer=layer: p[layer], params))
    return x
