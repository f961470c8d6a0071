"""A command reuses programs that an earlier process compiled; in subprocesses, since each has a cache in memory."""

import os
import subprocess
import sys

SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from sfd_jax.cli.main import run_command

def command(arguments):
    import jax
    events = []
    jax.monitoring.register_event_listener(lambda name, **_: events.append(name.rsplit("/", 1)[1]))
    jax.jit(lambda x: (x @ x).sum())(jax.numpy.ones((9, 9)))
    print(events.count("cache_hits"), events.count("cache_misses"))

sys.exit(run_command(command, "train", []))
"""


def run(root, **variables):
    """Return how many programs were found in the cache, and how many were not."""
    # By default JAX only stores programs that took a second to compile.
    environment = {**os.environ, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", **variables}
    environment = {name: value for name, value in environment.items() if value is not None}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(root)], env=environment, capture_output=True, text=True, check=True
    )
    return tuple(map(int, done.stdout.split()))


def test_the_second_start_reuses_compiled_programs(root, tmp_path):
    on = {"JAX_ENABLE_COMPILATION_CACHE": None, "JAX_COMPILATION_CACHE_DIR": None, "SFD_CACHE": str(tmp_path / "home")}
    hits, misses = run(root, **on)
    assert hits == 0 and misses > 0
    assert run(root, **on) == (misses, 0)
    kept = sorted((tmp_path / "home" / "compilations").iterdir())
    # With another folder or switched off, the first folder does not change.
    assert (
        run(root, **on | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "moved")}) == (0, misses)
        and (tmp_path / "moved").exists()
    )
    assert run(root, **on | {"JAX_ENABLE_COMPILATION_CACHE": "false"}) == (0, 0)
    assert sorted((tmp_path / "home" / "compilations").iterdir()) == kept
