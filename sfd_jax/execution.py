"""How networks are computed on the devices of a mesh: chosen here when a step or sampler is built, and passed in.

Only this file looks at the hardware; `models` has the operations and knows no device. It stands apart because
training, generation, evaluation and `pod` all build on `models` and `distributed`, which do not import each other.
Encoders and VAEs without gradients use the plain forms. Numbers: docs/performance.md.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sfd_jax.distributed import batch_sharding, replicated, shard_rule
from sfd_jax.distributed.mesh import AXES
from sfd_jax.models import kernels
from sfd_jax.models.execution import PLAIN, Execution

# GiB a device that "auto" lets blocks keep, by the first letters of the device's kind: about a third of its memory,
# since parameters, optimizer and a block's own values need the rest.
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


# Tokens from which TPUs use a fused attention: the memory of the weights grows with their square.
SPLASH_FROM = 1024


def choose_execution(
    mesh: Mesh,
    *,
    scan: bool | None = None,
    remat: str = "none",
    fused_attention: bool = True,
    rows: int = 0,
    kept_by_dots: int = 0,
) -> Execution:
    """Choose how networks are computed on a mesh.

    Args:
      mesh: of devices that may be abstract, for compiling ahead of time.
      scan: run blocks as one loop; None: everywhere but on a GPU.
      remat: a key of `stack.REMAT`, or "auto": what fits the devices.
      fused_attention: attend by a fused kernel where one is faster.
      rows: of the batch, over all devices; used by "auto".
      kept_by_dots: bytes that the blocks keep of one row with "dots"; used by "auto".
    """
    device = mesh.devices.flat[0]
    platform = "gpu" if device.platform in ("cuda", "rocm") else device.platform
    # On a GPU a loop copies all that the backward pass needs into one array for all blocks and out again: a tenth of
    # XL's step. On a TPU it keeps the gathering of weights in order. On both it compiles fast.
    scan = platform != "gpu" if scan is None else scan
    if remat == "auto":
        remat = _what_fits(platform, device.device_kind, rows / mesh.size * kept_by_dots, scan)
    return Execution(
        attention=_attention(mesh) if fused_attention else kernels.tuned_attention,
        product=kernels.cpu_product if platform == "cpu" else kernels.product,
        scan=scan,
        remat=remat,
        gather=functools.partial(_gather, mesh) if mesh.shape["fsdp"] > 1 else PLAIN.gather,
        split=functools.partial(_split, mesh) if mesh.size > 1 else PLAIN.split,
    )


def _attention(mesh: Mesh) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    device = mesh.devices.flat[0]
    if device.platform == "tpu":
        return functools.partial(_splash, mesh)
    return kernels.cudnn_attention if _cudnn_attends(device) else kernels.tuned_attention


def _splash(mesh: Mesh, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Attend by the fused kernel to many tokens, each device to those of its rows."""
    if query.shape[1] < SPLASH_FROM or query.shape[0] % mesh.size:
        return kernels.tuned_attention(query, key, value)
    rows = PartitionSpec(AXES)
    attend = jax.shard_map(kernels.splash_attention, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
    return attend(query, key, value)


def _cudnn_attends(device: jax.Device) -> bool:
    """Tell whether a device has cuDNN's attention: NVIDIA's do from Ampere on, so a T4 or V100 and AMD's do not."""
    major = getattr(device, "compute_capability", "").partition(".")[0]  # "9.0" of an H100; "gfx942" of AMD's
    return major.isdigit() and int(major) >= 8


def _what_fits(platform: str, kind: str, kept: float, scan: bool) -> str:
    """Return the remat policy, given the bytes a device that blocks keep with "dots".

    On SFD-XL "dots" saves a quarter of a training step's FLOPs compared with "full". "none" saves hardly any more
    FLOPs and, in a loop, keeps six times as much. With unrolled blocks XLA for GPUs keeps only twice as much, and
    reads and writes a tenth less than with "dots".
    """
    known = (gib for name, gib in KEPT_AT_MOST.items() if kind.startswith(name))
    most = next(known, _KEPT_ELSEWHERE) * 2**30
    if platform == "gpu" and not scan and 2 * kept <= most:
        return "none"
    return "dots" if kept <= most else "full"


def _gather(mesh: Mesh, params: Any) -> Any:
    """Gather the parameters of one block on every device; scatter their gradients to the devices' shards.

    Without it the compiler may leave the weights split and exchange the activations instead, which are many times
    larger.
    """
    pieces = lambda x: NamedSharding(mesh, shard_rule(x.shape, mesh))
    return jax.tree.map(lambda x: kernels.gather(x, replicated(mesh), pieces(x)), params)


def _split(mesh: Mesh, x: jax.Array) -> jax.Array:
    """Keep (B, ...) split over all devices by its first axis where they divide B."""
    return x if x.shape[0] % mesh.size else jax.lax.with_sharding_constraint(x, batch_sharding(mesh))
