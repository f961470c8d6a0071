"""A small file for each process in the job's folder that shows its progress and that it is alive.

`<folder>/heartbeats/process_00000.json`: an old `time` (of writing) means that the process is dead or stopped; an old
`step_time` with a recent `time` means that it does something other than steps: it compiles, evaluates, or waits for
another host. `status` is null until the end. `scripts/tpu/watch.sh` restarts a job that is silent for too long.
"""

import json
import os
import socket
import threading
import time

import jax
from etils import epath

from sfd_jax.errors import SfdError
from sfd_jax.files import disk_fault, write_anywhere

PERIOD = 10.0  # seconds between two beats


class Heartbeat:
    """Write the file now, every ten seconds, and at the end of the `with`.

    A failed write does not stop the job, unless the disk is full: then the next `at` raises.
    """

    def __init__(self, folder: epath.PathLike | None, phase: str):
        """Prepare the file of this process.

        Args:
          folder: the job's, local or gs://; None writes no file.
          phase: what the process does, e.g. "train"; set the attribute `phase` when that changes.
        """
        index = jax.process_index()
        self.path = None if folder is None else epath.Path(folder) / "heartbeats" / f"process_{index:05d}.json"
        self.phase = phase
        self._step: int | None = None
        self._step_time: float | None = None
        self._fault: str | None = None
        self._who = {"process": index, "processes": jax.process_count(), "host": socket.gethostname()}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def at(self, step: int) -> None:
        """Record that a step, or an image, is done; raise SfdError where the disk is full."""
        if self._fault:
            raise SfdError(self._fault)
        self._step, self._step_time = step, time.time()

    def __enter__(self) -> "Heartbeat":
        self._write()
        self._thread.start()
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._end.set()
        self._thread.join(60)  # a bucket may not respond
        code = getattr(error, "code", getattr(error, "status", 1))  # of a SystemExit, of an SfdError
        self.phase = "end"
        self._write(0 if error is None else code if isinstance(code, int) else 1)

    def _beat(self) -> None:
        while not self._end.wait(PERIOD):
            self._write()

    def _write(self, status: int | None = None) -> None:
        if self.path is None:
            return
        beat = {
            **self._who,
            "pid": os.getpid(),
            "time": round(time.time(), 3),
            "phase": self.phase,
            "step": self._step,
            "step_time": self._step_time and round(self._step_time, 3),
            "status": status,
        }
        try:
            write_anywhere(self.path, json.dumps(beat) + "\n")
            self._fault = None
        except Exception as error:
            self._fault = disk_fault(error)
