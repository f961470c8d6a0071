"""Memory that is freed stays with a process that computes on the CPU."""

import os
import subprocess
import sys

import pytest

# Pages that the kernel hands out while 64 MB are taken and freed ten times.
COUNT = """
import resource
from sfd_jax.malloc import keep_freed_memory
keep_freed_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    b"x" * 64_000_000
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the setting is glibc's")
@pytest.mark.parametrize(
    "environment, kept", [({}, True), ({"JAX_PLATFORMS": "cuda"}, False), ({"MALLOC_ARENA_MAX": "8"}, False)]
)
def test_freed_memory_is_kept_on_a_cpu(environment, kept, root):
    mine = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    mine |= {"JAX_PLATFORMS": "cpu", **environment, "PYTHONPATH": str(root)}
    pages = int(subprocess.check_output([sys.executable, "-c", COUNT], env=mine))
    once = 64e6 / os.sysconf("SC_PAGE_SIZE")
    assert (pages < 2 * once) == kept
