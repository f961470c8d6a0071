"""Test environment: eight virtual CPU devices, strict rank promotion, and the parity pack.

The environment is set before JAX is imported: device count and platform cannot change later.
"""

import fcntl
import gc
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

os.environ["JAX_PLATFORMS"] = "cpu"
# Both cores have a test process. More threads would wait for each other, spinning.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# The tests, and the processes that they start, share this run's compiled programs, but use none of an earlier run.
# The hosts of a job share none: see distributed/job_testing.py.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "true"
if "PYTEST_XDIST_WORKER" not in os.environ:
    _compiled = tempfile.TemporaryDirectory(prefix="sfd_jax_compiled_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
# Most of the time of the suite is spent compiling, which takes half as long without LLVM's optimisations. `.ci/run`
# runs the parity pack with them too. To split a program for several threads costs time, and both cores are busy.
_short = ("--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1")
_flags = os.environ.get("XLA_FLAGS", "")
for _flag in ("--xla_force_host_platform_device_count=8", *_short):
    if _flag.partition("=")[0] not in _flags:
        _flags = f"{_flags} {_flag}".strip()
os.environ["XLA_FLAGS"] = _flags

import jax  # noqa: E402
import pytest  # noqa: E402

# A silent broadcast over a missing axis is the most common shape bug: raise an error.
jax.config.update("jax_numpy_rank_promotion", "raise")

ROOT = Path(__file__).resolve().parents[1]
_shared = ROOT.parent / "shared"
os.environ.setdefault("SFD_PARITY_DIR", f"{_shared / 'parity'}{os.pathsep}{_shared / 'parity_more'}")
# `configs/` and helpers of test folders are imported from here without installation.
sys.path.insert(0, str(ROOT))
# A shell starts background jobs with SIGINT ignored, and so would be the commands that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish():
    """Search rarely for unused cycles: tracing makes many small objects, and that search was a tenth of the time."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def parity_dir() -> Path:
    """The folder of released answers: of those of `SFD_PARITY_DIR` the first that has the released files."""
    from sfd_jax.parity.pack import pack_folders

    folders = [folder for folder in pack_folders(os.environ["SFD_PARITY_DIR"]) if list(folder.glob("*.npz"))]
    if not folders:
        pytest.skip("no parity pack; set SFD_PARITY_DIR to a folder that holds one, or to several with colons between")
    return next((folder for folder in folders if (folder / "files").is_dir()), folders[0])


@pytest.fixture(scope="session")
def quick() -> dict[str, str]:
    """Variables for a process on one device with short programs: less time to compile, slower code."""
    return {**os.environ, "XLA_FLAGS": " ".join(_short)}


class TinyDemo(NamedTuple):
    """A finished demo.

    Attributes:
      folder: its work folder, of all tests: copy what is to be changed.
      printed: by the command.
    """

    folder: Path
    printed: str


@pytest.fixture(scope="session")
def tiny_demo(quick, tmp_path_factory) -> TinyDemo:
    """The demo at tiny size, run once for all processes of the tests."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "tiny_demo"
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "printed").exists():
            command = [sys.executable, "-m", "sfd_jax", "demo", "--config=configs/digits.py:tiny"]
            command += [f"--workdir={folder / 'demo_out'}"]
            done = subprocess.run(command, cwd=ROOT, env=quick, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-3000:]
            (folder / "printed").write_text(done.stdout)
    return TinyDemo(folder / "demo_out", (folder / "printed").read_text())
