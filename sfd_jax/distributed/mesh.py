"""The device mesh ("data", "fsdp"), also across TPU slices."""

import math
from collections.abc import Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import Mesh

from sfd_jax.errors import SfdError
from sfd_jax.ranges import check

AXES = ("data", "fsdp")
# The largest `fsdp` where both sizes are -1. A sixteenth of an XL's state is 0.6 GiB, so more devices would save
# little, while the rings over which every layer's parameters are gathered grow. And 256, the largest slice of a v5e,
# does not divide XL's widths (1152 = 128 * 9): each device would hold all of the attention's weights.
FSDP_MOST = 16


def make_mesh(data: int = -1, fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arrange the devices as a mesh ("data", "fsdp").

    Neighbours along `fsdp` exchange parameters in every layer, neighbours along `data` only gradients once
    a step; so with several slices only `data` crosses the slow network between them.

    Args:
      data: size of the data axis; -1 for the devices that `fsdp` leaves.
      fsdp: size of the axis that splits the training state; -1 for the devices that `data` leaves. Both -1: `fsdp`
        takes the devices of a slice, or of as large a part of it as FSDP_MOST allows.
      devices: the devices to arrange; all of them by default.

    Returns:
      A Mesh of shape (data, fsdp) over all `devices`.

    Raises:
      SfdError: the sizes do not multiply to the number of devices, or do not fit the slices; or a chip has two devices.
    """
    check("mesh", data=data, fsdp=fsdp)
    devices = jax.devices() if devices is None else list(devices)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    data, fsdp = _fill(data, fsdp, len(devices), slices)
    if data % slices:
        raise SfdError(
            f"mesh.data={data} does not divide over {slices} slices: parameters are split only inside a slice, "
            f"so make mesh.data a multiple of {slices} (mesh.fsdp is at most {len(devices) // slices})"
        )
    kind = devices[0].device_kind
    if kind not in ("TPU v2", "TPU v3") and any(getattr(device, "core_on_chip", 0) for device in devices):
        raise SfdError(
            f"each {kind} chip has several devices, but a mesh needs one for each chip (megacore), which is the "
            "default on Cloud TPU VMs: do not change the chips' mode, or describe the topology with "
            "chip_config_name='megacore'"
        )
    if slices > 1:
        grid = mesh_utils.create_hybrid_device_mesh((data // slices, fsdp), (slices, 1), devices)
    else:
        grid = mesh_utils.create_device_mesh((data, fsdp), devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES)


def _fill(data: int, fsdp: int, count: int, slices: int) -> tuple[int, int]:
    if data == fsdp == -1:
        fsdp = math.gcd(count // slices, FSDP_MOST)
    sizes = {"data": data, "fsdp": fsdp}
    free = [name for name, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if free and count % fixed == 0:
        sizes[free[0]] = count // fixed
    if math.prod(sizes.values()) != count:
        raise SfdError(
            f"mesh.data={data} and mesh.fsdp={fsdp} do not fill {count} devices; "
            "set one of them to -1 and the other to a divisor of the number of devices"
        )
    return sizes["data"], sizes["fsdp"]
