"""The lookout of a process: it hears SIGTERM in every phase, and notices other processes that stop, die or leave.

A collective waits for a missing process for ever, and JAX's own watch ends the waiting ones with a stack trace. Here
each process tells once a second, through the coordinator's key-value store, that it lives, how far it is and
whether it shall leave. Who falls silent is named, and the others end with status 75 so that the job can be started
again; who ends with a fault takes the others along, with its own words.

Silence is counted in one's own ticks, not in time: a process that was stopped itself does not blame the others.
"""

import contextlib
import ctypes
import json
import multiprocessing
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import NoReturn

from sfd_jax.distributed.heartbeat import Heartbeat
from sfd_jax.errors import TryAgain

TICK = 1.0  # seconds
_TOLD = "sfd/lookout/"


class Lookout:
    """Two threads beside the work: one listens for SIGTERM and judges silence, one talks to the store."""

    def __init__(
        self, names: list[str] = ("alone",), index: int = 0, store=None, address: str = "", timeout: float = 60.0
    ):
        """Prepare the lookout.

        Args:
          names: the host of each process, by index.
          index: this process.
          store: the coordinator's key-value client; None for a process alone.
          address: "host:port" of the coordinator.
          timeout: seconds of silence after which a process counts as lost.
        """
        self._names, self._index, self._store, self._address = list(names), index, store, address
        self._patience = max(1, round(timeout / TICK))
        self._timeout = timeout
        self._told = threading.Event()  # by SIGTERM
        self._over = threading.Event()
        self._leaving = threading.Lock()
        # What this process tells of itself, and what it last heard of each.
        self._self: dict = {"beat": 0, "told": False, "answered": None, "end": None}
        self._others: dict[int, dict] = {}
        self._answers = 0
        # Steps: which was last answered "go on", and at which all processes leave. Held while they agree on it.
        self._steps = threading.Lock()
        self._answered: int | None = None
        self._leave_at: int | None = None
        self._heeded = False  # whether the work has been told to leave, and is at it
        self._threads = [threading.Thread(target=self._watch, name="lookout", daemon=True)]
        if store is not None:
            self._threads.append(threading.Thread(target=self._talk, name="lookout-talk", daemon=True))

    def start(self) -> "Lookout":
        """Begin; SIGTERM is heard where this is the main thread, as Python demands."""
        self._ears, self._mouth = socket.socketpair()
        self._mouth.setblocking(False)
        self._before = None
        if threading.current_thread() is threading.main_thread():
            # The C part of Python's handler writes to the socket even where the main thread sits in a compilation.
            self._before = (
                signal.set_wakeup_fd(self._mouth.fileno(), warn_on_full_buffer=False),
                signal.signal(signal.SIGTERM, lambda *_: self._told.set()),
            )
            if self._store is not None and self._index > 0:
                self._catch_abort()
        for thread in self._threads:
            thread.start()
        return self

    def stop(self) -> None:
        """Give SIGTERM back and stop watching."""
        self._over.set()
        self._mouth.send(b"\0")  # wakes `_watch`
        if self._before is not None:
            signal.set_wakeup_fd(self._before[0])
            signal.signal(signal.SIGTERM, self._before[1])
        for thread in self._threads:
            thread.join(2 * TICK)
        self._ears.close()
        self._mouth.close()

    # --- What the work asks -----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def asking(self) -> Iterator["Lookout"]:
        """Enter the part of the work that asks `shall_leave` after each step; see `hosts.preemption_watch`."""
        self._answered = self._leave_at = None
        try:
            yield self
        finally:
            if self._heeded:
                self._told.clear()
            self._answered, self._heeded = None, False

    @property
    def heard_sigterm(self) -> bool:
        """Whether this process itself has been told to leave."""
        return self._told.is_set()

    def shall_leave(self, step: int) -> bool:
        """Return whether to save and leave after this step; all processes get the same answer at the same step."""
        with self._steps:
            if self._store is None:
                leave = self._told.is_set()
            else:
                leave = self._leave_at is not None and step >= self._leave_at
            self._answered = step
            self._heeded |= leave
            return leave

    def fail(self, status: int, why: str) -> NoReturn:
        """End this process, which has said what it had to say, and take the others along."""
        self._leave(status, why, say=False)

    def done(self) -> None:
        """Tell the others that this process needs no watching any more."""
        self._self["end"] = [0, ""]

    def wait_for_a_verdict(self) -> None:
        """Sleep until the lookout ends the process, or long enough to know that all others live.

        For the moment after a collective broke: its error does not tell which process is lost, the lookout will.
        """
        time.sleep(self._timeout + 5 * TICK)

    # --- SIGTERM and judgement --------------------------------------------------------------------------------

    def _watch(self) -> None:
        silence, beats, answers, mute = dict.fromkeys(range(len(self._names)), 0), {}, -1, 0
        last = time.monotonic()
        while not self._over.is_set():
            try:
                heard, _, _ = select.select([self._ears], [], [], TICK)
                if heard and signal.SIGTERM in self._ears.recv(64):
                    self._told.set()
            except (OSError, ValueError):
                return  # closed by `stop`
            if self._told.is_set() and self._answered is None and not self._heeded:
                self._leave(TryAgain.status, "told to leave by SIGTERM; what is saved stays, the same command goes on")
            now = time.monotonic()
            if self._store is None or now - last < TICK / 2:
                continue
            last = now
            mute = mute + 1 if self._answers == answers else 0
            answers = self._answers
            if mute >= self._patience:
                self._lost([0])
            for index in silence:
                told = self._others.get(index, {"beat": 0, "end": None})
                silence[index] = 0 if told["beat"] != beats.get(index) or told["end"] else silence[index] + (mute == 0)
                beats[index] = told["beat"]
            if lost := [index for index, ticks in silence.items() if ticks >= self._patience]:
                self._lost(lost)

    def _lost(self, indices: list[int]) -> NoReturn:
        who = ", ".join(map(self.name, indices))
        self._leave(
            TryAgain.status,
            f"{who} has given no sign of life for {self._timeout:.0f} s (stopped, killed or cut off); look at its log. "
            "What is saved stays: start the same command again on all hosts",
        )

    # --- The talk with the others -----------------------------------------------------------------------------

    def _talk(self) -> None:
        # JAX's client raises what gRPC says where the coordinator is gone; `_watch` counts that as silence.
        while not self._over.wait(TICK):
            with contextlib.suppress(Exception):
                self._exchange()
                for index, told in self._others.items():
                    if told["end"] and told["end"][0]:
                        status, why = told["end"]
                        # Who left for another's sake passes on who that was.
                        self._leave(status, why if why.startswith("process ") else f"{self.name(index)} ended: {why}")
                if any(told["told"] for told in self._others.values()) and self._leave_at is None:
                    self._agree()

    def _exchange(self) -> None:
        self._self["beat"] += 1
        self._self["told"] = self._self["told"] or (self._told.is_set() and self._answered is not None)
        self._store.key_value_set(f"{_TOLD}{self._index}", json.dumps(self._self), True)
        told = self._store.key_value_dir_get(_TOLD)
        self._others = {int(key.rsplit("/", 1)[1]): json.loads(value) for key, value in told}
        self._answers += 1

    def _agree(self) -> None:
        """Agree on the step after which all leave: the one behind the furthest that any has gone on from."""
        with self._steps:  # nobody goes further meanwhile
            self._self["answered"] = self._answered or 0
            while not self._over.is_set():
                self._exchange()
                answered = [told["answered"] for told in self._others.values()]
                if len(answered) == len(self._names) and None not in answered:
                    self._leave_at = max(answered) + 1
                    return
                if any(told["end"] for told in self._others.values()):
                    return  # the run is over, or something worse has happened
                time.sleep(TICK / 10)

    def name(self, index: int) -> str:
        """Return what to call a process in a sentence."""
        return f"process {index} ({self._names[index]})"

    # --- The end ----------------------------------------------------------------------------------------------

    def _leave(self, status: int, why: str, say: bool = True) -> NoReturn:
        """Tell user and others, and end the process without the farewells that wait for everybody."""
        if not self._leaving.acquire(blocking=False):
            time.sleep(30)  # the other thread is at it
        if say:
            print(f"\nsfd: {why}", file=sys.stderr, flush=True)
        for worker in multiprocessing.active_children():  # os._exit would leave the loader's behind
            worker.kill()
        # Neither a bucket nor the store may keep this process alive.
        farewell = threading.Thread(target=self._farewell, args=(status, why), daemon=True)
        farewell.start()
        farewell.join(8)
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os._exit(status)

    def _farewell(self, status: int, why: str) -> None:
        with contextlib.suppress(Exception):
            if self._store is not None:
                self._self["end"] = [status, why]
                self._exchange()
        if Heartbeat.current is not None:
            Heartbeat.current.end(status)
        with contextlib.suppress(Exception):
            # With process 0 goes the store: it lets the others read why, as long as they come for it.
            heard, patience = -1, 0
            while self._store is not None and self._index == 0 and patience < 3:
                self._exchange()
                ended = sum(bool(told["end"]) for told in self._others.values())
                if ended == len(self._names):
                    return
                patience, heard = (0 if ended > heard else patience + 1), ended
                time.sleep(TICK)

    def _catch_abort(self) -> None:
        """Where the coordinator dies JAX aborts at once: turn that into a sentence and a status.

        JAX's own hook for this takes no Python function (it fails to hand it the error). Other aborts go on.
        """

        def handler(number: int) -> None:
            host, _, port = self._address.rpartition(":")
            try:
                socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
            except OSError:
                text = (
                    f"\nsfd: {self.name(0)} is gone, and with it the job's coordinator; look at its log. What is saved "
                )
                text += "stays: start the same command again on all hosts\n"
                os.write(2, text.encode())
                with contextlib.suppress(Exception):
                    if Heartbeat.current is not None:
                        Heartbeat.current.end(TryAgain.status)
                os._exit(TryAgain.status)
            signal_of_c(number, None)

        self._abort_handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(handler)  # kept alive as long as this object
        signal_of_c = ctypes.CDLL(None).signal
        signal_of_c.argtypes, signal_of_c.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
        signal_of_c(signal.SIGABRT, ctypes.cast(self._abort_handler, ctypes.c_void_p))
