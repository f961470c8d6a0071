"""Libtpu on machines without a TPU, where it is installed to compile for one (the extra `pod`)."""

import importlib.util
import os
from pathlib import Path

# Libtpu looks for the machine it is on, says at length what it does not find, and lets one process at a time use the
# chips. Where there are none, this answers its questions beforehand.
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
    """Tell libtpu, before it is loaded, that it is to compile and not to run."""
    for name, value in NO_MACHINE.items():
        os.environ.setdefault(name, value)


def hush() -> None:
    """Do so where libtpu is installed without a TPU: JAX tries it at every start, and it would complain."""
    if installed() and not any(_is_googles(device) for device in Path("/sys/bus/pci/devices").glob("*/vendor")):
        expect_no_machine()


def _is_googles(vendor: Path) -> bool:
    try:
        return vendor.read_text().strip() == "0x1ae0"
    except OSError:
        return False
