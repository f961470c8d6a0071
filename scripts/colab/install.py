"""Install this checkout at its pinned versions into the Python that runs this file, for the accelerator it finds.

A notebook's first code cell runs it (`%run scripts/colab/install.py`); if everything is installed it does nothing.
Failures are RuntimeErrors: after a SystemExit `%run` would continue with the next cell.
"""

import glob
import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement  # Jupyter needs it too, so it is there before anything is installed
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[2]
# What must be there at its pinned version (the extra `demo` too), and what an accelerator's extra brings.
NEEDED = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "scikit-learn", "matplotlib", "sfd_jax")
BROUGHT = {"tpu": ("libtpu",), "cuda": ("jax-cuda13-plugin",), "": ()}


def extra() -> str:
    """Return the extra of pyproject.toml for the accelerator of this machine: "tpu", "cuda" or ""."""
    if "TPU_WORKER_ID" in os.environ or glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"):
        return "tpu"
    return "cuda" if shutil.which("nvidia-smi") and glob.glob("/dev/nvidia[0-9]*") else ""


def missing(wanted: str) -> list[str]:
    """Return the packages that are not installed, or not at the pins for this Python, for an extra."""
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if "==" in line and ((pin := Requirement(line)).marker is None or pin.marker.evaluate()):
            pins[pin.name] = pin.specifier
    lacking = []
    for name in (*NEEDED, *BROUGHT[wanted]):
        try:
            if importlib.metadata.version(name) not in pins.get(name, SpecifierSet()):
                lacking.append(name)
        except importlib.metadata.PackageNotFoundError:
            lacking.append(name)
    return lacking


def main() -> None:
    """Install what is missing and say what was found."""
    wanted = extra()
    what = {"tpu": "a TPU", "cuda": "an NVIDIA GPU", "": "no accelerator, so the processor"}[wanted]
    lacking = missing(wanted)
    if lacking:
        print(f"found {what}; installing the pinned packages (a minute or two, once)", flush=True)
        target = f"{ROOT}[demo,{wanted}]" if wanted else f"{ROOT}[demo]"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        done = subprocess.run([*command, "--constraint", str(ROOT / "constraints.txt"), "--editable", target])
        if done.returncode:
            raise RuntimeError("pip failed, see its message above; if the network failed, run this cell again")
        old = [name for name in ("jax", "numpy") if name in sys.modules]
        if old:
            raise RuntimeError(
                f"installed, but {' and '.join(old)} were loaded before: restart the kernel, then run all cells"
            )
    print(f"found {what}; the pinned packages are installed")


if __name__ == "__main__":
    main()
