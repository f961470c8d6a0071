"""Print what an issue report needs: versions, platform, devices, caches and environment.

  sfd env [--timeout=SECONDS]

Devices are listed in a separate process, so the command also works if JAX is broken or the accelerator is busy or does
not respond. Variables that may hold a token, key or password are shown without their values.
"""

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import sfd_jax
from sfd_jax import libtpu
from sfd_jax.cli.flags import command_parser, parse_command

PACKAGES = (
    *(
        "jax",
        "jaxlib",
        "libtpu",
        "jax-cuda13-plugin",
        "jax-cuda12-plugin",
        "flax",
        "optax",
        "orbax-checkpoint",
        "grain",
    ),
    *("numpy", "ml-collections", "safetensors", "huggingface-hub", "pillow", "scikit-learn", "gcsfs", "torch"),
)
VARIABLES = re.compile(
    r"(JAX|XLA|LIBTPU|TPU|TF_CPP|TF_XLA|SFD|HF|HUGGINGFACE|CUDA|NVIDIA|GLIBC|OMP|SLURM)_|LD_PRELOAD$|PYTHONPATH$"
)
SECRET = re.compile(r"TOKEN|KEY|SECRET|PASS|CREDENTIAL", re.I)

PROBE = """
import json, jax
memory = lambda device: (device.memory_stats() or {}).get("bytes_limit")
print(json.dumps({
    "backend": jax.default_backend(),
    "devices": [(device.device_kind, memory(device)) for device in jax.local_devices()],
    "all": jax.device_count(), "processes": jax.process_count(),
}))
"""


def main(argv: list[str]) -> int:
    """Print a line or more on each subject."""
    parser = command_parser("env", __doc__)
    parser.add_argument(
        "--timeout", type=float, default=60.0, help="seconds to wait for the devices (default: %(default)s)"
    )
    args = parse_command(parser, argv)
    lines = {
        "sfd_jax": version(),
        "installed in": str(Path(sfd_jax.__file__).parent),
        "Python": f"{platform.python_version()} ({sys.executable})",
        "platform": f"{platform.platform()}, {_processors()} processors{_memory()}",
        "packages": ", ".join(f"{name} {found}" for name in PACKAGES if (found := _version_of(name))),
        "devices": devices(args.timeout),
        "cache": "\n".join(_size(path) for path in _caches()),
        "variables": "\n".join(variables()) or "none that changes anything",
    }
    width = max(map(len, lines)) + 2
    for name, text in lines.items():
        print(f"{name:<{width}}" + text.replace("\n", "\n" + " " * width), flush=True)
    return 0


def version() -> str:
    """Return the version of this package, with the commit where it runs from a checkout."""
    folder = Path(sfd_jax.__file__).parents[1]
    if not (folder / ".git").exists():
        return sfd_jax.__version__
    try:
        git = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=10"]
        commit = subprocess.run(git, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return f"{sfd_jax.__version__} (a checkout of unknown commit)"
    return f"{sfd_jax.__version__} (commit {commit})"


def devices(timeout: float) -> str:
    """Return this process's devices, or why JAX does not list them."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return (
            f"no answer in {timeout:g} s: another process may hold the accelerator, or this is one host of several "
            "(run the command on all of them: scripts/tpu/launch.sh -- env)"
        )
    try:
        found = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        last = (done.stderr.strip() or f"status {done.returncode}").splitlines()[-1]
        if platforms := os.environ.get("JAX_PLATFORMS"):  # JAX's message does not name these
            last += f" (JAX_PLATFORMS={platforms})"
        return f"JAX does not start: {last:.400}"
    kinds = {}
    for kind, memory in found["devices"]:
        kinds.setdefault(f"{kind}, {memory / 2**30:.1f} GiB" if memory else kind, []).append(kind)
    local = "; ".join(f"{len(each)} x {kind}" for kind, each in kinds.items())
    return f"{found['backend']}: {local} in this process; {found['all']} in all {found['processes']} process(es)"


def variables() -> list[str]:
    """Return the environment variables that change what this package does, without secrets."""
    hide = lambda name, value: "(set, not shown)" if SECRET.search(name) else re.sub(r"//[^/@\s]+@", "//...@", value)
    # `sfd` itself sets these: for libtpu without a TPU, and the compilation cache.
    own = {*libtpu.NO_MACHINE.items(), ("JAX_COMPILATION_CACHE_DIR", str(Path(_home()) / "compilations"))}
    kept = [each for each in sorted(os.environ.items()) if VARIABLES.match(each[0]) and each not in own]
    return [f"{name}={hide(name, value)}" for name, value in kept]


def _version_of(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processors() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _memory() -> str:
    try:
        return f", {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"
    except (OSError, ValueError):
        return ""


def _home() -> str:
    return os.environ.get("SFD_CACHE") or str(Path.home() / ".cache" / "sfd_jax")


def _caches() -> list[str]:
    return [_home(), os.environ.get("JAX_COMPILATION_CACHE_DIR") or os.path.join(_home(), "compilations")]


def _size(path: str) -> str:
    """Return a folder with the number and total size of its files."""
    if "://" in path:
        return path
    if not os.path.isdir(path):
        return f"{path}: does not exist yet"
    sizes = []
    for folder, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(OSError):  # removed since
                sizes.append(os.lstat(os.path.join(folder, name)).st_size)
    return f"{path}: {len(sizes)} files, {sum(sizes) / 2**30:.2f} GiB"
