"""A tower of equal blocks: parameters stacked along a leading axis L, run as one compiled loop.

One loop body instead of L copies keeps compilation short, and stacked parameters are few large
arrays, which shard and checkpoint well.
"""

import jax
from flax import nnx

from sfd_jax.distributed.sharding import gather_params, share_of_device, split_batch

# What a block keeps for the backward pass. docs/performance.md has the numbers behind this and the choices below.
REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
# GiB a device that "auto" lets blocks keep, by the beginning of the device's kind: about a third of its memory, since
# parameters, optimizer and a block's own values need the rest.
KEPT_AT_MOST = {
    "TPU v5 lite": 5,
    "TPU v5": 30,
    "TPU v4": 10,
    "TPU v6": 10,
    "NVIDIA A100-SXM4-40GB": 12,
    "NVIDIA A100": 25,
    "NVIDIA H200": 45,
    "NVIDIA H": 25,
}
_KEPT_ELSEWHERE = 5


def stack(make_block, depth: int, rngs: nnx.Rngs) -> nnx.Module:
    """Build `depth` blocks as one module with stacked parameters, each drawn with its own key.

    Args:
      make_block: builds one block from an nnx.Rngs.
      depth: L.
      rngs: one key is drawn from its `params` stream.
    """
    make = nnx.vmap(lambda key: make_block(nnx.Rngs(params=key)))
    return make(jax.random.split(rngs.params(), depth))


def choose_scan() -> bool:
    """Say whether blocks run as one loop where a config leaves it open: everywhere but on a GPU.

    There a loop copies all that the backward pass needs into one array for all blocks and out again, a tenth of XL's
    step. On a TPU the loop keeps the gathering of each block's weights in order; on both it is what compiles fast.
    """
    return jax.default_backend() != "gpu"


def choose_remat(kept_a_row: int, rows: int, scan: bool = True) -> str:
    """Choose what blocks keep by what fits the device; what "auto" means.

    On SFD-XL "dots" saves a quarter of a training step's FLOPs beside "full". "none" saves next to no FLOPs more, and
    in a loop keeps six times as much; but of unrolled blocks XLA for GPUs keeps but twice as much, and reads and
    writes a tenth less than with "dots".

    Args:
      kept_a_row: bytes that all blocks keep of one row of the batch with "dots".
      rows: of the batch, over all devices of the mesh (`distributed.mesh_context`).
      scan: whether the blocks run as one loop.

    Returns:
      "none" (unrolled on a GPU alone), "dots" or "full", the first that fits.
    """
    rows, kind = share_of_device(rows)
    known = (gib for name, gib in KEPT_AT_MOST.items() if kind.startswith(name))
    kept, most = rows * kept_a_row, next(known, _KEPT_ELSEWHERE) * 2**30
    if not scan and jax.default_backend() == "gpu" and 2 * kept <= most:
        return "none"
    return "dots" if kept <= most else "full"


def run_stack(blocks: nnx.Module, x, *, extras=(), start=0, stop=None, scan=True, remat="none") -> jax.Array:
    """Pass `x` through the blocks `start` to `stop` of a stack.

    Args:
      blocks: what `stack` built.
      x: what the first block reads; every block returns its like.
      extras: further arguments, the same for each block.
      scan: one compiled loop; otherwise unrolled.
      remat: a key of REMAT: "none" recomputes nothing in the backward pass, "full" everything,
        "dots" everything but the matmuls with weights.
    """
    graphdef, state = nnx.split(blocks)
    params = jax.tree.map(lambda p: p[start:stop], nnx.to_pure_dict(state))

    def step(x, block_params):
        block = nnx.merge(graphdef, gather_params(block_params))
        return split_batch(block(split_batch(x), *extras)), None

    if remat != "none":
        # A scan already keeps XLA from merging the recomputation with the forward pass.
        step = jax.checkpoint(step, policy=REMAT[remat], prevent_cse=not scan)
    if scan:
        return jax.lax.scan(step, x, params)[0]
    depth = jax.tree.leaves(params)[0].shape[0]
    for layer in range(depth):
        x, _ = step(x, jax.tree.map(lambda p, layer=layer: p[layer], params))
    return x
