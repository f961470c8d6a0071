"""Start the processes of a job on this machine."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

# The programs are small: optimising them in LLVM would take most of a process's time.
XLA_FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"


def launch(
    arguments: Sequence,
    count: int,
    *,
    devices: int = 4,
    indices: Sequence[int] | None = None,
    variables: Callable[[int], dict[str, str]] = lambda _: {},
    log: Callable[[int], Path] | None = None,
) -> dict[int, subprocess.Popen]:
    """Start Python as the processes of one job.

    Args:
      arguments: Python's.
      count: processes in the job.
      devices: how many they have together.
      indices: those that start; all by default.
      variables: index -> environment variables of a process.
      log: index -> file for what it prints; pipes by default.

    Returns:
      Index -> process.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    started = {}
    for index in range(count) if indices is None else indices:
        environment = {
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_NUM_PROCESSES": str(count),
            "JAX_PROCESS_ID": str(index),
            # The first process alone would write programs, and the others would read some of them.
            "JAX_ENABLE_COMPILATION_CACHE": "false",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices // count} {XLA_FLAGS}",
            # JAX's heartbeats come from threads of C++, so a loaded machine does not stop them.
            "SFD_PEER_TIMEOUT": "15",
            "SFD_START_TIMEOUT": "150",
            **variables(index),
        }
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        if log is not None:
            pipes = {"stdout": log(index).open("w"), "stderr": subprocess.STDOUT}
        command = [sys.executable, *map(str, arguments)]
        started[index] = subprocess.Popen(command, env=os.environ | environment, text=True, **pipes)
    return started
