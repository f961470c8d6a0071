"""Libtpu on machines without a TPU, where it is installed to compile ahead of time (the extra `pod`)."""

import importlib.util
import os
from pathlib import Path

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
