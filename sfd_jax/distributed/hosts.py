"""Processes of one job: the start, barriers that name missing processes, SIGTERM, the end, and output on one host.

All of this uses JAX's public functions. Its coordination service joins the processes and monitors their heartbeats:
if one is silent for `SFD_PEER_TIMEOUT` (60) seconds (killed, stopped, cut off), JAX names it and aborts the others
(status 134), and `scripts/tpu/watch.sh` starts them again.

A job has several processes where the launch script sets the variables `JAX_COORDINATOR_ADDRESS`,
`JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`, or `SFD_MULTIHOST=1` where `jax.distributed.initialize` finds them itself:
on a TPU pod or under Slurm. Otherwise there is one process and nothing here waits.
`SFD_EXPECT_PROCESSES` and `SFD_EXPECT_DEVICES` are the required numbers, `SFD_START_TIMEOUT` (300) is how many
seconds to wait for the other processes at the start.
"""

import contextlib
import itertools
import multiprocessing
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator

import jax
from etils import epath
from jax.experimental import multihost_utils

from sfd_jax.distributed.preflight import Job, compare
from sfd_jax.errors import SfdError, TryAgain

_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_rounds: dict[str, Iterator[int]] = defaultdict(itertools.count)


def start(job: Job | None = None) -> None:
    """Join the job's other processes and check that all can begin; do nothing for a single process.

    Call before anything touches a device. A later call, by a command that needed devices before it knew its job,
    only compares facts.

    Args:
      job: what this process will do; None where that is not known yet.

    Raises:
      TryAgain: a process did not start in time.
      SfdError: variables are missing or wrong, a number is not the expected one, or the hosts do not agree
        (see preflight.py): all faults are named, on all hosts.
    """
    if not jax.distributed.is_initialized():
        place = _place()
        if place is not None:
            _join(place, job)
            _expect("SFD_EXPECT_PROCESSES", jax.process_count())
        if _number("SFD_EXPECT_DEVICES") is not None:
            _expect("SFD_EXPECT_DEVICES", jax.device_count(), f" ({jax.local_device_count()} of them here)")
    if job is not None and _several():
        compare(job)


def end(status: int) -> None:
    """End this process's part in the job; every command calls it last.

    After success, processes wait for each other. After a fault, one of several processes exits at once, since JAX's
    shutdown would wait for the others, which may be waiting for this one.

    Args:
      status: exit status of the process; 0 also after a SIGTERM on which all have saved and stopped.
    """
    if status and jax.distributed.is_initialized():
        for worker in multiprocessing.active_children():  # os._exit would leave the loader's workers running
            worker.kill()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(status)
    if _several():
        barrier("the end", timeout=24 * 3600.0)  # host 0 may still be writing; JAX monitors that it is alive
        jax.distributed.shutdown()


def broke(error: Exception) -> None:
    """Do what `end(1)` does, for an unexpected error.

    A failed operation over all hosts does not show which host failed: if another host is lost, JAX aborts this
    process with status 134 while it waits here.
    """
    if _several():
        traceback.print_exception(error)
        while error is not None and not isinstance(error, jax.errors.JaxRuntimeError):
            error = error.__cause__ or error.__context__
        if error is not None:
            print("sfd: another host may have failed; waiting for JAX to report it", file=sys.stderr, flush=True)
            time.sleep(_number("SFD_PEER_TIMEOUT", 60) + 15)
        end(1)


def is_host0() -> bool:
    """Return whether this process is the one that prints and writes single files."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """Print one line for the user, on host 0 only."""
    if is_host0():
        print(text, flush=True)


def barrier(name: str, timeout: float = 300.0) -> None:
    """Wait until every process of the job has reached the barrier `name`.

    Args:
      name: what is waited for; the same text on all processes; may be used again.
      timeout: seconds to wait.

    Raises:
      TryAgain: the timeout passed; the message names each process that did not arrive.
    """
    if jax.process_count() == 1:
        return
    from orbax.checkpoint import multihost  # JAX's own barrier with a timeout has no other public name

    try:
        key = f"{name}/{next(_rounds[name])}"
        multihost.get_barrier_sync_fn()(key=key, timeout_ms=int(1000 * timeout))
    except jax.errors.JaxRuntimeError as error:
        listed = str(error).partition("timed out task names:")[2]
        absent = ", ".join(f"process {index}" for index in re.findall(r"(?m)^(?:/.*task:)?(\d+)$", listed))
        what = f"{absent} did not arrive within {timeout:.0f} s; look at its log" if absent else str(error)
        raise TryAgain(f"barrier '{name}': {what}; start all processes again") from error


@contextlib.contextmanager
def preemption_watch() -> Iterator[Callable[[int], bool]]:
    """Catch SIGTERM; yields `preempted`, to be called after each step.

    `preempted(step)` returns whether to save and exit after this step: the same on all processes at the same step.
    In a job of several processes JAX's preemption service catches the signal, from the start of a job that `saves`.
    """
    if _several():
        watched = jax.config.jax_enable_preemption_service
        yield multihost_utils.reached_preemption_sync_point if watched else lambda _: False
        return
    signals, before = [], None
    if threading.current_thread() is threading.main_thread():
        before = signal.signal(signal.SIGTERM, lambda *_: signals.append(True))
    try:
        yield lambda _: bool(signals)
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


# --- The start -----------------------------------------------------------------------------------------------


def _several() -> bool:
    return jax.distributed.is_initialized() and jax.process_count() > 1


def _place() -> dict | None:
    """Return arguments for `jax.distributed.initialize`, {} where it finds them; None for a single process."""
    given = {name: os.environ[name] for name in _VARIABLES if os.environ.get(name)}
    if not given and os.environ.get("SFD_MULTIHOST") == "1":
        return {}
    if given and (missing := [name for name in _VARIABLES if name not in given]):
        raise SfdError(f"{', '.join(given)} set but not {', '.join(missing)}: set all three or none")
    count, index = _number("JAX_NUM_PROCESSES", 1), _number("JAX_PROCESS_ID", 0)
    if index >= count:
        raise SfdError(f"JAX_PROCESS_ID={index} must be a number below JAX_NUM_PROCESSES={count}")
    _expect("SFD_EXPECT_PROCESSES", count)
    if count == 1:
        return None
    if not re.fullmatch(r".+:\d+", address := given["JAX_COORDINATOR_ADDRESS"]):
        raise SfdError(f"JAX_COORDINATOR_ADDRESS={address} is not host:port")
    return {"coordinator_address": address, "num_processes": count, "process_id": index}


def _join(place: dict, job: Job | None) -> None:
    """Call `jax.distributed.initialize`, in a thread: it blocks signals, and aborts without naming missing processes.

    Meanwhile each process rewrites a file in the job's folder every second, if possible, and looks for the others':
    a file that does not change is from an earlier start.
    """
    # The service catches SIGTERM, so work that never asks it would ignore the signal.
    jax.config.update("jax_enable_preemption_service", job is None or job.saves)
    timeout, faults = _number("SFD_START_TIMEOUT", 300), []
    waits = {"initialization_timeout": timeout + 60, "heartbeat_timeout_seconds": _number("SFD_PEER_TIMEOUT", 60)}

    def initialize() -> None:
        try:
            jax.distributed.initialize(**place, **waits)
        except Exception as error:
            faults.append(error)

    index = place.get("process_id")
    me = f"{socket.gethostname()}_{os.getpid()}" if index is None else f"process_{index}"
    folder = epath.Path(job.folder) / "heartbeats" if job and job.folder and job.shared else None
    joining = threading.Thread(target=initialize, name="join", daemon=True)
    joining.start()
    deadline, found, came = time.monotonic() + timeout, {}, {me}
    while joining.is_alive() and time.monotonic() < deadline:
        with contextlib.suppress(Exception):  # the preflight will report what is wrong with the folder
            if folder:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f"start_{me}").write_text(str(time.time()))
                now = {path.name.removeprefix("start_"): path.read_text() for path in folder.glob("start_*")}
                came |= {name for name, text in now.items() if found.setdefault(name, text) != text}
        joining.join(1.0)
    with contextlib.suppress(Exception):
        if folder:
            (folder / f"start_{me}").unlink(missing_ok=True)
    if faults:
        raise (SfdError if isinstance(faults[0], ValueError) else TryAgain)(
            f"this process cannot join its job, which {', '.join(_VARIABLES)} or a cluster that JAX knows must "
            f"describe: {faults[0]}"
        )
    if joining.is_alive():
        absent = [
            f"process {other}" for other in range(place.get("num_processes", 0)) if f"process_{other}" not in came
        ]
        raise TryAgain(
            f"{', '.join(absent) if folder and absent else 'another process'} did not start within {timeout} s "
            + (f"(by the files in {folder}; started: " if folder else "(which one is not known; this is: ")
            + f"{', '.join(sorted(came))}, on {socket.gethostname()})"
        )


def _expect(variable: str, count: int, where: str = "") -> None:
    expected = _number(variable)
    if expected not in (None, count):
        raise SfdError(
            f"{variable}={expected}, but there are {count}{where}. Start the command on all hosts and check whether "
            "another program holds devices, or correct the number"
        )


def _number(variable: str, default: int | None = None) -> int | None:
    text = os.environ.get(variable)
    if text and not text.isdigit():
        raise SfdError(f"{variable}={text} must be a whole number")
    return int(text) if text else default
