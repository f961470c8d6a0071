"""Processes of one job: start, barriers that name who is missing, the end, and who may print.

A job has several processes where the launch script says so: by JAX's own variables (`JAX_COORDINATOR_ADDRESS`,
`JAX_NUM_PROCESSES`, `JAX_PROCESS_ID`), or by `SFD_MULTIHOST=1` where JAX can find them itself: on a TPU pod, whose
metadata tell, or under Slurm. Otherwise the process is alone and nothing here waits for anything.

`SFD_EXPECT_PROCESSES` and `SFD_EXPECT_DEVICES` say how many there must be, `SFD_START_TIMEOUT` (300) how many seconds
to wait for the others at the start, `SFD_PEER_TIMEOUT` (60) how long one may give no sign of life.
"""

import contextlib
import itertools
import json
import os
import socket
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator

import jax
from jax._src import clusters, distributed  # the coordinator's store, and who finds it, have no public name

from sfd_jax.distributed.lookout import Lookout
from sfd_jax.distributed.preflight import Job, check_facts, gather_facts, look_around, remove_probe
from sfd_jax.distributed.rendezvous import meet
from sfd_jax.errors import SfdError, TryAgain

_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_rounds: dict[str, Iterator[int]] = defaultdict(itertools.count)
_lookout: Lookout | None = None


def start(job: Job | None = None, timeout: float | None = None) -> None:
    """Join the job's other processes and see that all can begin, or do nothing where this process is alone.

    Call before anything touches a device. A second call, of a door that needed devices before it knew its job,
    only looks at the job.

    Args:
      job: what is about to be done; None where that is not known yet.
      timeout: seconds to wait for all processes; `SFD_START_TIMEOUT` by default.

    Raises:
      TryAgain: a process did not come within the timeout.
      SfdError: variables are missing or wrong, a number is not the expected one, or the hosts do not go together
        (see preflight.py): all faults are named, on all hosts.
    """
    timeout = _seconds("SFD_START_TIMEOUT", 300.0) if timeout is None else timeout
    if jax.distributed.is_initialized():
        if _lookout is None:
            raise SfdError("JAX was joined before sfd_jax.distributed.start(), which must come first")
        if job is not None and jax.process_count() > 1:
            _preflight(job, jax.process_index(), lambda facts: _exchange(facts, timeout))
        return
    place = _place(timeout)
    expected, count = _number("SFD_EXPECT_PROCESSES"), place[1] if place else 1
    if expected not in (None, count):
        raise SfdError(
            f"SFD_EXPECT_PROCESSES={expected}, but the job has {count}: start it on all hosts, or mend the number"
        )
    if place and count > 1:
        address, _, index = place
        facts = _preflight(job or Job(), index, lambda facts: meet(address, count, index, facts, timeout))
        _join(place, [told["host"] for told in facts], timeout)
    elif _lookout is None:
        _watch(Lookout())
    expected = _number("SFD_EXPECT_DEVICES")
    if expected is not None and expected != jax.device_count():
        raise SfdError(
            f"SFD_EXPECT_DEVICES={expected}, but there are {jax.device_count()} ({jax.local_device_count()} of them on "
            f"{socket.gethostname()}); does another program hold some, or has the slice another size?"
        )


def end(status: int, why: str = "") -> None:
    """End this process's part in the job; every door's last act.

    Where all goes well (status 0, or 75 after a SIGTERM that all have heeded) all processes wait for each other;
    otherwise this one takes the others along, or tells them at their meeting, if they are only about to meet.

    Args:
      status: exit status that the process is about to end with.
      why: one sentence for the others, where it ends with a fault.
    """
    global _lookout
    if _lookout is None:
        if status and not jax.distributed.is_initialized():
            _tell_at_the_meeting(why)
        return
    several = jax.distributed.is_initialized() and jax.process_count() > 1
    if several and status:
        _lookout.fail(status, why)
    if several:
        _lookout.done()
        barrier("the end", timeout=24 * 3600.0)  # host 0 may still be writing; the lookout knows whether it lives
    _lookout.stop()
    _lookout = None
    if several:
        jax.distributed.shutdown()


def broke(error: Exception) -> None:
    """Do what `end` does for an error that nobody foresaw. Among several processes it does not return.

    An operation over all hosts that fails does not tell whose fault it is: there the lookout has the first word.
    """
    if jax.distributed.is_initialized() and _lookout is not None:
        traceback.print_exception(error)
        cause = error
        while cause is not None and not isinstance(cause, jax.errors.JaxRuntimeError):
            cause = cause.__cause__ or cause.__context__
        if cause is not None:
            print("sfd: this may be another host's fault; looking whether all live", file=sys.stderr, flush=True)
            _lookout.wait_for_a_verdict()
    end(1, f"{type(error).__name__}: {error}")


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
      TryAgain: the timeout passed; the message names each process that did not arrive.
    """
    if jax.process_count() > 1:
        # A name may come again: its n-th use on one process meets the n-th use on the others.
        _collect(f"sfd/barrier/{name}/{next(_rounds[name])}", "here", f"barrier '{name}'", timeout)


@contextlib.contextmanager
def preemption_watch() -> Iterator[Lookout]:
    """Watch for SIGTERM; yields the lookout, whose `shall_leave` is to be asked after each step.

    Until the first question there is nothing to save: a SIGTERM
    then ends the process (and with it the others) at once with status 75, in the middle of a compilation too.
    """
    lookout = _lookout or Lookout().start()
    try:
        with lookout.asking():
            yield lookout
    finally:
        if lookout is not _lookout:
            lookout.stop()


# --- The start -----------------------------------------------------------------------------------------------


def _place(timeout: float) -> tuple[str, int, int] | None:
    """Return (coordinator's address, number of processes, which one this is), None for a process alone."""
    given = {name: os.environ[name] for name in _VARIABLES if os.environ.get(name)}
    if not given and os.environ.get("SFD_MULTIHOST") != "1":
        return None
    if not given:
        # What jax.distributed.initialize would find out for itself, but known before it may hang.
        try:
            found = clusters.ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, int(timeout))
        except (RuntimeError, OSError, ValueError) as error:
            raise TryAgain(f"SFD_MULTIHOST=1, but this machine's place in the job cannot be found: {error}") from error
        address, count, index, _ = found
        if address is None or count is None or index is None:
            raise SfdError(
                f"SFD_MULTIHOST=1, but this machine is no part of a TPU pod or another cluster that JAX knows; set "
                f"{', '.join(_VARIABLES)} instead"
            )
        return address, count, index
    missing = [name for name in _VARIABLES if name not in given]
    if missing:
        raise SfdError(f"{', '.join(given)} set but not {', '.join(missing)}: set all three or none")
    address, count, index = (given[name] for name in _VARIABLES)
    if not (count.isdigit() and index.isdigit() and int(index) < int(count)):
        raise SfdError(f"JAX_PROCESS_ID={index} must be a number below JAX_NUM_PROCESSES={count}")
    return address, int(count), int(index)


def _preflight(job: Job, index: int, exchange: Callable[[dict], list[dict]]) -> list[dict]:
    """Exchange the facts of all processes and judge them; returns them."""
    mine = gather_facts(job, index)
    try:
        facts = exchange(mine)
        check_facts(facts)
        check_facts(exchange({"host": mine["host"], "faults": look_around(job, facts, index)}))
        return facts
    finally:
        remove_probe(job, mine, index)


def _exchange(facts: dict, timeout: float) -> list[dict]:
    """Do what `meet` does, among processes that JAX has joined already; clocks are not compared again."""
    told = _collect(f"sfd/facts/{next(_rounds['facts'])}", json.dumps(facts), "the preflight", timeout)
    return [json.loads(text) for text in told]


def _tell_at_the_meeting(why: str) -> None:
    # A courtesy: without it the others would wait for this process until their time is up.
    with contextlib.suppress(Exception):
        place = _place(10.0)
        if place and place[1] > 1:
            meet(*place, {"host": socket.gethostname(), "faults": [why]}, timeout=30.0)


def _join(place: tuple[str, int, int], names: list[str], timeout: float) -> None:
    address, count, index = place
    peer = _seconds("SFD_PEER_TIMEOUT", 60.0)
    # The lookout hears SIGTERM in every phase; JAX's service would take the signal and keep it until a step asks.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            address,
            count,
            index,
            initialization_timeout=max(1, int(timeout)),
            heartbeat_timeout_seconds=int(10 * peer + 300),  # the lookout comes first, and says who it was
        )
    except (RuntimeError, ValueError) as error:
        raise TryAgain(f"process {index} could not join the others within {timeout:.0f} s: {error}") from error
    _watch(Lookout(names, index, _store(), address, peer))


def _watch(lookout: Lookout) -> None:
    global _lookout
    _lookout = lookout.start()


def _collect(key: str, mine: str, what: str, timeout: float) -> list[str]:
    """Put this process's text under a key of the store, and return those of all; the missing ones are named."""
    store, deadline = _store(), time.monotonic() + timeout
    store.key_value_set(f"{key}/{jax.process_index()}", mine)
    texts = [_await(store, f"{key}/{index}", deadline - time.monotonic()) for index in range(jax.process_count())]
    missing = [_lookout.name(index) for index, text in enumerate(texts) if text is None]
    if missing:
        raise TryAgain(
            f"{what}: {', '.join(missing)} did not arrive within {timeout:.0f} s; look at its log, then start all "
            "processes again"
        )
    return texts


def _await(store, key: str, seconds: float) -> str | None:
    try:
        return store.blocking_key_value_get(key, max(1, int(1000 * seconds)))
    except jax.errors.JaxRuntimeError:
        return None


def _store():
    return distributed.global_state.client


def _seconds(variable: str, default: float) -> float:
    try:
        return float(os.environ.get(variable) or default)
    except ValueError:
        raise SfdError(f"{variable}={os.environ[variable]} must be a number of seconds") from None


def _number(variable: str) -> int | None:
    text = os.environ.get(variable)
    if text and not text.isdigit():
        raise SfdError(f"{variable}={text} must be a whole number")
    return int(text) if text else None
