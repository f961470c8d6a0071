"""TPU chips, topologies, and their devices for ahead-of-time compilation."""

import dataclasses
import math
import re

from sfd_jax import libtpu
from sfd_jax.errors import SfdError, nearest


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of chip.

    Attributes:
      memory: nominal bytes of HBM of a JAX device, which is one chip for all of these.
      usable: bytes of it that a program may use; the compiler reserves the rest.
      matrix_rate: peak bfloat16 FLOPs per second.
      clock: cycles per second, which follow from the rate and the size of the matrix units.
      link_rate: bytes per second that a chip receives over all its links.
      slices: shapes of 2D slices; None for 3D ones, see `_is_cube_slice`.
      options: for libtpu, besides the topology's name.

    Source: memory and rates from Google Cloud's page of each TPU version; `usable` from libtpu's message for too
      large programs ("Used ... of 15.75G hbm").
    """

    memory: int
    usable: int
    matrix_rate: float
    clock: float
    link_rate: float
    slices: tuple[str, ...] | None
    options: dict


_GIB = 2**30
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_SMALL_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")
CHIPS = {
    # Two cores, which Cloud TPU VMs run as one device ("megacore").
    "v4": Chip(32 * _GIB, int(30.75 * _GIB), 275e12, 1.05e9, 300e9, None, {"chip_config_name": "megacore"}),
    "v5e": Chip(16 * _GIB, int(15.75 * _GIB), 197e12, 1.5e9, 200e9, _FLAT, {}),
    "v5p": Chip(95 * _GIB, int(95.74 * _GIB), 459e12, 1.75e9, 600e9, None, {}),
    "v6e": Chip(32 * _GIB, int(31.25 * _GIB), 918e12, 1.75e9, 400e9, _FLAT, {}),
}


# Peak bfloat16 FLOPs per second of a device, by the first letters of its kind in JAX; GPUs without sparsity.
_PEAK_RATES = {
    "TPU v4": CHIPS["v4"].matrix_rate,
    "TPU v5 lite": CHIPS["v5e"].matrix_rate,
    "TPU v5": CHIPS["v5p"].matrix_rate,
    "TPU v6": CHIPS["v6e"].matrix_rate,
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_rate(kind: str) -> float | None:
    """Return the peak bfloat16 FLOPs per second of a device of a kind (`device.device_kind`); None where unknown."""
    return next((rate for name, rate in _PEAK_RATES.items() if kind.startswith(name)), None)


@dataclasses.dataclass(frozen=True)
class Topology:
    """One slice, or several equal ones joined by a slower network.

    Attributes:
      name: a chip and the shape of the slice, e.g. "v5e:4x4".
      slices: number of slices.

    Raises:
      SfdError: the chip or shape is unknown; the message lists the known ones.
    """

    name: str
    slices: int = 1

    def __post_init__(self):
        kind, colon, shape = self.name.partition(":")
        if kind not in CHIPS:
            raise SfdError(
                f"topology '{self.name}': there is no chip '{kind}'; {nearest(kind, CHIPS)} "
                f"(a topology is {', '.join(CHIPS)}, a colon, and the slice's shape, as in v5e:4x4)"
            )
        flat = CHIPS[kind].slices
        if not colon or not (shape in flat if flat else _is_cube_slice(shape)):
            known = flat or (*_SMALL_CUBES, "or three multiples of 4 up to 24 in ascending order, as in 4x4x8")
            raise SfdError(f"topology '{self.name}': {kind} has slices of {', '.join(known)}")
        if self.slices < 1:
            raise SfdError(f"slices={self.slices}: give at least 1")

    @property
    def chip(self) -> Chip:
        return CHIPS[self.name.partition(":")[0]]

    @property
    def count(self) -> int:
        """Chips of all slices."""
        return self.slices * math.prod(map(int, self.name.partition(":")[2].split("x")))

    def __str__(self) -> str:
        return self.name if self.slices == 1 else f"{self.slices} slices of {self.name}"


def _is_cube_slice(shape: str) -> bool:
    if shape in _SMALL_CUBES:
        return True
    if not re.fullmatch(r"\d+x\d+x\d+", shape):
        return False
    sides = [int(side) for side in shape.split("x")]
    return sides == sorted(sides) and all(side % 4 == 0 and 0 < side <= 24 for side in sides)


def topology_devices(topology: Topology) -> list:
    """Return the devices of a topology, for a mesh to compile for.

    Raises:
      SfdError: libtpu is not installed, or does not know the topology.
    """
    if not libtpu.installed():
        raise SfdError("compiling for TPUs needs libtpu (but no TPU): install it with `bash scripts/setup.sh pod`")
    libtpu.expect_no_machine()
    import jax
    from jax.experimental import topologies

    options = dict(topology.chip.options)
    if topology.name.endswith(":1x1"):
        options["chips_per_host_bounds"] = (1, 1, 1)
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    try:
        return topologies.get_topology_desc(topology.name, platform="tpu", **options).devices
    except jax.errors.JaxRuntimeError as error:
        raise SfdError(f"libtpu does not know topology '{topology}': {str(error).splitlines()[0]}") from error
