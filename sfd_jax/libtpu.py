"""Libtpu: flags of its compiler, and its use on machines without a TPU, to compile ahead of time (the extra `pod`)."""

import importlib.util
import os
from pathlib import Path

from sfd_jax.errors import SfdError, nearest

# Libtpu queries the machine it is on, logs at length what it does not find, and lets one process at a time use the
# chips. Where there are no chips, these variables answer its queries.
NO_MACHINE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def installed() -> bool:
    return "TPU_LIBRARY_PATH" in os.environ or importlib.util.find_spec("libtpu") is not None


def expect_no_machine() -> None:
    """Set the environment for libtpu, before it is loaded, to compile without a TPU."""
    for name, value in NO_MACHINE.items():
        os.environ.setdefault(name, value)


def hush() -> None:
    """Call `expect_no_machine` where libtpu is installed without a TPU: JAX loads it at every start."""
    if installed() and not any(_is_googles(device) for device in Path("/sys/bus/pci/devices").glob("*/vendor")):
        expect_no_machine()


def _is_googles(vendor: Path) -> bool:
    try:
        return vendor.read_text().strip() == "0x1ae0"
    except OSError:
        return False


def flag_sets() -> list[str]:
    """Return the names of the sets in tpu_flags.txt, and "none"."""
    return ["none", *dict.fromkeys(name for name, _, _ in _flag_rows())]


def flags_of(names: str, chip: str) -> dict[str, str]:
    """Return the compiler's flags of one set, or of several joined by "+", for a chip.

    Raises:
      SfdError: there is no such set.
    """
    flags = {}
    for name in names.split("+"):
        if name not in flag_sets():
            raise SfdError(f"there is no set of flags '{name}'; {nearest(name, flag_sets())}")
        flags |= dict(flag.split("=", 1) for set_, chips, flag in _flag_rows() if set_ == name and chip in chips)
    return flags


def _flag_rows() -> list[tuple[str, list[str], str]]:
    lines = Path(__file__).with_name("tpu_flags.txt").read_text().splitlines()
    rows = (line.split() for line in lines if line.strip() and not line.startswith("#"))
    return [(name, chips.split(","), flag) for name, chips, flag in rows]
