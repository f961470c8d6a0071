"""Processes of one job: start, barriers that name who is missing, preemption, and who may print.

A job has several processes where the launch script says so, by JAX's own variables
(`JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES`, `JAX_PROCESS_ID`), or by `SFD_MULTIHOST=1` on a TPU pod,
whose metadata tell the rest. Otherwise the process is alone and nothing here waits for anything.
"""

import contextlib
import itertools
import os
import signal
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator

import jax
from jax._src import distributed  # the key-value store of the coordinator has no public name
from jax.experimental import multihost_utils

from sfd_jax.distributed.rendezvous import meet
from sfd_jax.errors import SfdError

_rounds: dict[str, Iterator[int]] = defaultdict(itertools.count)


def start(timeout: float = 300.0) -> None:
    """Join the job's other processes, or do nothing where this process is the only one.

    Call before anything touches a device. A second call does nothing.

    Args:
      timeout: seconds to wait for all processes.

    Raises:
      SfdError: variables are missing or wrong, or a process did not come within the timeout.
    """
    variables = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = {name: os.environ[name] for name in variables if os.environ.get(name)}
    if jax.distributed.is_initialized() or not (given or os.environ.get("SFD_MULTIHOST") == "1"):
        return
    arguments = _arguments(given, variables, timeout) if given else {}
    try:
        jax.distributed.initialize(**arguments, initialization_timeout=int(timeout))
    except (RuntimeError, ValueError) as error:
        raise SfdError(f"this process could not join the job's others within {timeout:.0f} s: {error}") from error
    _store().key_value_set(f"sfd/host/{jax.process_index()}", socket.gethostname())


def _arguments(given: dict[str, str], variables: tuple[str, ...], timeout: float) -> dict:
    """Return the arguments of jax.distributed.initialize, once all processes have met."""
    missing = [name for name in variables if name not in given]
    if missing:
        raise SfdError(f"{', '.join(given)} set but not {', '.join(missing)}: set all three or none")
    address, count, index = (given[name] for name in variables)
    if not (count.isdigit() and index.isdigit() and int(index) < int(count)):
        raise SfdError(f"JAX_PROCESS_ID={index} must be a number below JAX_NUM_PROCESSES={count}")
    meet(address, int(count), int(index), {"host": socket.gethostname()}, timeout)
    return {"coordinator_address": address, "num_processes": int(count), "process_id": int(index)}


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
      name: what is waited for; the same text on all processes.
      timeout: seconds to wait.

    Raises:
      SfdError: the timeout passed; the message names each process that did not arrive.
    """
    if jax.process_count() == 1:
        return
    # A name may come again: its n-th use on one process meets the n-th use on the others.
    key = f"sfd/barrier/{name}/{next(_rounds[name])}"
    store, deadline = _store(), time.monotonic() + timeout
    store.key_value_set(f"{key}/{jax.process_index()}", "here")
    missing = [
        index
        for index in range(jax.process_count())
        if not _arrives(store, f"{key}/{index}", deadline - time.monotonic())
    ]
    if missing:
        names = ", ".join(f"process {index} ({_host_name(store, index)})" for index in missing)
        raise SfdError(
            f"barrier '{name}': {names} did not arrive within {timeout:.0f} s; "
            "look at its log, then start all processes again"
        )


def _store():
    return distributed.global_state.client


def _arrives(store, key: str, seconds: float) -> bool:
    try:
        store.blocking_key_value_get(key, max(1, int(1000 * seconds)))
        return True
    except jax.errors.JaxRuntimeError:
        return False


def _host_name(store, index: int) -> str:
    try:
        return store.key_value_try_get(f"sfd/host/{index}")
    except jax.errors.JaxRuntimeError:
        return "never started"


@contextlib.contextmanager
def preemption_watch() -> Iterator[Callable[[int], bool]]:
    """Watch for SIGTERM; yields a function that tells, asked after each step, whether to save and leave.

    All processes get the same answer at the same step: with several of them JAX's preemption service, which
    has taken over the signal, agrees on the step; a process alone keeps its own flag.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    received = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # signals reach the main thread only
        yield lambda step: False
        return
    previous = signal.signal(signal.SIGTERM, lambda *_: received.set())
    try:
        yield lambda step: received.is_set()
    finally:
        signal.signal(signal.SIGTERM, previous)
