"""Shared by the benchmarks: the machine's description, timing in turns, tables and JSON.

Speeds of a shared machine change by the minute, so contenders take turns in one process, and results are ratios of
their medians within one run.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from sfd_jax import malloc

PACKAGES = ("jax", "jaxlib", "flax", "numpy", "torch", "torchdiffeq", "torch-fidelity")


def make_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with the flags that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each contender; medians are compared")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers to this file")
    parser.add_argument("--versus", choices=["torch"], help="also run PyTorch, in turns (extra `torch`)")
    return parser


def need(*packages: str) -> None:
    """Exit with a message if a package of an optional comparison is missing."""
    if missing := [name for name in packages if importlib.util.find_spec(name.replace("-", "_")) is None]:
        raise SystemExit(f"--versus=torch needs {', '.join(missing)}: pip install {' '.join(missing)}")


def share_memory() -> None:
    """Keep JAX from reserving a GPU's memory, and freed memory of a CPU as `sfd` does; before JAX uses a device."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    malloc.keep_freed_memory()


def machine() -> dict:
    """Describe the machine and the versions of packages."""
    import jax

    device = jax.devices()[0]
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "date": datetime.date.today().isoformat(),
        "backend": jax.default_backend(),
        "device": _cpu_name() if device.platform == "cpu" else device.device_kind,
        "devices": jax.device_count(),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "versions": versions,
    }


def take_turns(
    contenders: dict[str, Callable[[], object]], rounds: int, warm: int = 0
) -> tuple[dict[str, dict], dict[str, float]]:
    """Time each contender once in each round, after a first call of each that is not counted.

    Args:
      contenders: name -> a call that returns when its work is done.
      rounds: how often each is timed.
      warm: calls of a contender in each of its turns before the timed one. For steps of a loop, which find memory and
        caches as the step before left them: a virtual machine returns memory that is free for a second to its host,
        and getting it back took longer than a step.

    Returns:
      name -> {median, least, most, all} in seconds, and name -> seconds of the first call, with compilation.
    """
    first, times = {}, {name: [] for name in contenders}
    for name, run in contenders.items():
        first[name] = seconds(run)
    for _ in range(rounds):
        for name, run in contenders.items():
            for _ in range(warm):
                run()
            times[name].append(seconds(run))
    return {name: summary(each) for name, each in times.items()}, first


def summary(times: list[float]) -> dict:
    """Return median and spread of a list of seconds."""
    return {"median": statistics.median(times), "least": min(times), "most": max(times), "all": times}


def spread(times: dict) -> str:
    """Format a summary's least and most as percentages around its median."""
    low, high = (100 * (times[end] / times["median"] - 1) for end in ("least", "most"))
    return f"{low:+.0f}..{high:+.0f} %"


def draw_params(network, seed: int = 0):
    """Draw every leaf on the device, also those that start at zero: a freshly initialised network returns zero."""
    import jax
    import jax.numpy as jnp

    def draw(path, leaf, key):
        noise, name = jax.random.normal(key, leaf.shape, jnp.float32), path[-1].key
        if name == "kernel":
            stacked = path[0].key == "blocks"
            fan_in = leaf.size // leaf.shape[-1] // (leaf.shape[0] if stacked else 1)
            return noise / np.float32(np.sqrt(fan_in))
        return 1 + 0.1 * noise if name == "scale" else 0.1 * noise

    def all_of(key):
        shapes = network.abstract_params()
        leaves, tree = jax.tree.flatten(shapes)
        keys = jax.tree.unflatten(tree, list(jax.random.split(key, len(leaves))))
        return jax.tree_util.tree_map_with_path(draw, shapes, keys)

    return jax.jit(all_of)(jax.random.key(seed))


def matrix_rate(dtype: str) -> float:
    """Measure the FLOP/s of one device's best large square matmul in a dtype: the reference for utilisation."""
    import jax
    import jax.numpy as jnp

    size = 2048 if jax.default_backend() == "cpu" else 8192
    a, b = jax.random.normal(jax.random.key(0), (2, size, size)).astype(dtype)
    repeats = 1 if jax.default_backend() == "cpu" else 20
    # A chain of products, so that none can run at the same time as another.
    product = jax.jit(lambda a, b: jax.lax.fori_loop(0, repeats, lambda _, x: (x @ b) * jnp.asarray(0.01, dtype), a))
    jax.block_until_ready(product(a, b))
    best = min(seconds(lambda: jax.block_until_ready(product(a, b))) for _ in range(5))
    return 2 * size**3 * repeats / best


def peak_memory() -> dict[str, float]:
    """Return peak GiB: of the process (host), and of JAX and PyTorch on an accelerator."""
    import sys

    import jax

    peaks = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        peaks["jax on the device"] = stats["peak_bytes_in_use"] / 2**30
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        peaks["torch on the device"] = torch.cuda.max_memory_allocated() / 2**30
    return peaks


def table(head: list[str], rows: list[list]) -> str:
    """Format rows of values as a table in Markdown."""
    rows = [[f"{value:.3g}" if isinstance(value, float) else str(value) for value in row] for row in rows]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in [head, *rows]]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def finish(record: dict, tables: list[str], notes: list[str], path: str | None) -> None:
    """Print the machine, the tables and the notes; write the record as JSON if a path is given."""
    record = {"machine": machine(), **record, "notes": notes}
    where = record["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    print(f"{where['devices']} x {where['device']} ({where['backend']}), {where['cores']} cores, {where['date']}")
    print(versions + "\n")
    print("\n\n".join(tables))
    for note in notes:
        print(f"- {note}")
    if path:
        Path(path).write_text(json.dumps(record, indent=1) + "\n")


def seconds(run: Callable[[], object]) -> float:
    """Return the seconds that a call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
