"""Processes of one job: the start, barriers that name who is missing, SIGTERM, the end, and who may print.

JAX does the work, by its public functions. Its coordination service joins the processes and hears their heartbeats:
where one is silent for `SFD_PEER_TIMEOUT` (60) seconds (killed, stopped, cut off) JAX says which and aborts the others
(status 134), which `scripts/tpu/watch.sh` starts again.

A job has several processes where the launch script says so: by the variables `JAX_COORDINATOR_ADDRESS`,
`JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`, or by `SFD_MULTIHOST=1` where `jax.distributed.initialize` finds them itself:
on a TPU pod or under Slurm. Otherwise the process is alone and nothing here waits for anything.
`SFD_EXPECT_PROCESSES` and `SFD_EXPECT_DEVICES` say how many there must be, `SFD_START_TIMEOUT` (300) how many seconds
to wait for the others at the start.
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
    """Join the job's other processes and see that all can begin, or do nothing where this process is alone.

    Call before anything touches a device. A later call, of a command that needed devices before it knew its job,
    only compares facts.

    Args:
      job: what is about to be done; None where that is not known yet.

    Raises:
      TryAgain: a process did not come in time.
      SfdError: variables are missing or wrong, a number is not the expected one, or the hosts do not go together
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
    """End this process's part in the job; every command's last act.

    Where all goes well, processes wait for each other. A fault among several ends this one here and now, since JAX's
    farewell would wait for the others, which may be waiting for it.

    Args:
      status: exit status that the process is about to end with; 0 also after a SIGTERM that all have heeded.
    """
    if status and jax.distributed.is_initialized():
        for worker in multiprocessing.active_children():  # os._exit would leave the loader's behind
            worker.kill()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(status)
    if _several():
        barrier("the end", timeout=24 * 3600.0)  # host 0 may still be writing; JAX knows whether it lives
        jax.distributed.shutdown()


def broke(error: Exception) -> None:
    """Do what `end(1)` does for an error that nobody foresaw.

    An operation over all hosts that fails does not tell whose fault it is: where another host is lost, JAX ends this
    process with 134 while it waits here.
    """
    if _several():
        traceback.print_exception(error)
        while error is not None and not isinstance(error, jax.errors.JaxRuntimeError):
            error = error.__cause__ or error.__context__
        if error is not None:
            print("sfd: this may be another host's fault; waiting to see whether all live", file=sys.stderr, flush=True)
            time.sleep(_number("SFD_PEER_TIMEOUT", 60) + 15)
        end(1)


def is_host0() -> bool:
    """Return whether this process is the one that prints and writes single files."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """Print one line for the user, on host 0 alone."""
    if is_host0():
        print(text, flush=True)


def barrier(name: str, timeout: float = 300.0) -> None:
    """Wait until every process of the job has reached the barrier `name`.

    Args:
      name: what is waited for; the same text on all processes, each of which may use it again.
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
    """Note SIGTERM instead of ending; yields `shall_leave`, to be asked after each step.

    `shall_leave(step)` tells whether to save and leave after this step: to all processes the same at the same step.
    Among several JAX's preemption service hears the signal, from the start of a job that `saves`.
    """
    if _several():
        heard = jax.config.jax_enable_preemption_service
        yield multihost_utils.reached_preemption_sync_point if heard else lambda _: False
        return
    told, before = [], None
    if threading.current_thread() is threading.main_thread():
        before = signal.signal(signal.SIGTERM, lambda *_: told.append(True))
    try:
        yield lambda _: bool(told)
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


# --- The start -----------------------------------------------------------------------------------------------


def _several() -> bool:
    return jax.distributed.is_initialized() and jax.process_count() > 1


def _place() -> dict | None:
    """Return what `jax.distributed.initialize` is to be told, {} where it finds out; None for a process alone."""
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
    """Call `jax.distributed.initialize`, in a thread: it waits deaf to signals, and aborts without naming anybody.

    Meanwhile each process writes a file of the job's folder anew every second, where it can, and looks for the others':
    one that does not change was left by an earlier start.
    """
    # Work that does not ask would never learn what the service has heard.
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
        with contextlib.suppress(Exception):  # the preflight will say what is wrong with the folder
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
            f"this process cannot join its job, of which {', '.join(_VARIABLES)} or a cluster that JAX knows must tell "
            f"it: {faults[0]}"
        )
    if joining.is_alive():
        absent = [
            f"process {other}" for other in range(place.get("num_processes", 0)) if f"process_{other}" not in came
        ]
        raise TryAgain(
            f"{', '.join(absent) if folder and absent else 'another process'} did not start within {timeout} s "
            + (f"(no sign in {folder}, of these there was: " if folder else "(which is not known; this is: ")
            + f"{', '.join(sorted(came))}, on {socket.gethostname()})"
        )


def _expect(variable: str, count: int, where: str = "") -> None:
    expected = _number(variable)
    if expected not in (None, count):
        raise SfdError(
            f"{variable}={expected}, but there are {count}{where}. Start the command on all hosts and look whether "
            "another program holds devices, or fix the number"
        )


def _number(variable: str, default: int | None = None) -> int | None:
    text = os.environ.get(variable)
    if text and not text.isdigit():
        raise SfdError(f"{variable}={text} must be a whole number")
    return int(text) if text else default
