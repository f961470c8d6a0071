"""Checks before a job of several hosts: that all run the same code with the same settings and have their files.

Each process gathers its facts, all exchange them, and each reaches the same conclusion from the same list. A process
that cannot begin reports its faults this way instead of exiting, so that the others do not wait for it.
"""

import dataclasses
import hashlib
import json
import platform
import secrets
import socket
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from sfd_jax import __version__
from sfd_jax.errors import SfdError
from sfd_jax.files import differences

MAX_CLOCK_SKEW = 10.0  # seconds; credentials of a bucket and the order of log lines suffer from more
_PACKAGE = Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Job:
    """What a command will do.

    Attributes:
      settings: JSON-able; what must be the same on all hosts: flags, config, facts about the data.
      folder: the job's folder, local or gs://; None where it has none.
      shared: whether every host writes into the folder, which must then be one folder for all; else host 0 does.
      needs: files and folders that each host must have.
      saves: whether the work uses `hosts.preemption_watch`; other work ends at once upon SIGTERM.
    """

    settings: dict = dataclasses.field(default_factory=dict)
    folder: Any = None
    shared: bool = True
    needs: tuple = ()
    saves: bool = False


def compare(job: Job) -> None:
    """Exchange facts with all processes and compare them, before anything is computed.

    Args:
      job: what this process will do.

    Raises:
      SfdError: the processes do not agree, or one cannot begin; the same error on all of them.
    """
    index = jax.process_index()
    probe, faults = _look_for_needs(job, index)
    try:
        reports = _exchange({"host": socket.gethostname(), "probe": probe, "faults": faults, "facts": facts_of(job)})
        clocks = _exchange(time.time())  # comparable, since all finish the first exchange at the same time
        check_facts(reports, [clock - clocks[0] for clock in clocks])
        refuse_hosts(reports, _exchange(_look_for_host0(job, reports[0]["probe"])))
    finally:
        if probe:
            _probe(job, index, probe).unlink(missing_ok=True)


def facts_of(job: Job) -> dict:
    """Return what must be the same on all hosts: code, versions and settings; JSON-able."""
    sources = hashlib.sha256()  # of the code that runs, committed or not
    for path in sorted(_PACKAGE.rglob("*.py")):
        sources.update(str(path.relative_to(_PACKAGE)).encode() + b"\0" + path.read_bytes())
    versions = {name: version(name) for name in ("jax", "jaxlib", "flax", "orbax-checkpoint")}
    return {
        "sources of sfd_jax": f"{__version__}, {sources.hexdigest()[:12]}",
        "versions": {"python": platform.python_version(), **versions},
        **job.settings,
    }


def check_facts(reports: list[dict], clocks: list[float]) -> None:
    """Raise SfdError where the processes do not agree or cannot begin.

    Args:
      reports: `host`, `faults` and `facts` of each process, by index.
      clocks: seconds by which each process's clock is ahead of process 0's.
    """
    first, faults = reports[0], [list(report["faults"]) for report in reports]
    for found, report, clock in zip(faults, reports, clocks, strict=True):
        lines = differences(first["facts"], report["facts"]).values()
        found += [f"differs from process 0 in {line}" for line in lines]
        if abs(clock) > MAX_CLOCK_SKEW:
            found.append(f"its clock is {clock:+.0f} s off that of process 0 ({first['host']}); set it by NTP")
    refuse_hosts(reports, faults)


def refuse_hosts(reports: list[dict], faults: list[list[str]]) -> None:
    """Raise SfdError that names all faults, each a sentence, by process, where there are any."""
    pairs = enumerate(zip(reports, faults, strict=True))
    lines = [f"process {index} ({report['host']}): {fault}" for index, (report, found) in pairs for fault in found]
    if lines:
        raise SfdError("the hosts cannot begin:\n  " + "\n  ".join(lines))


def _look_for_needs(job: Job, index: int) -> tuple[str | None, list[str]]:
    """Look for the files that the job needs, and write a probe into its folder; return the probe's token and faults."""
    faults, probe = [], None
    for path in filter(None, job.needs):
        try:
            faults += [] if epath.Path(path).exists() else [f"no {path} here"]
        except Exception as error:  # of a bucket's client
            faults.append(f"cannot look for {path}: {error}")
    if job.folder is not None and (job.shared or index == 0):
        try:
            epath.Path(job.folder).mkdir(parents=True, exist_ok=True)
            token = secrets.token_hex(8)
            _probe(job, index, token).write_text("")
            probe = token
        except Exception as error:
            faults.append(f"cannot write to {job.folder}: {getattr(error, 'strerror', None) or error}")
    return probe, faults


def _look_for_host0(job: Job, token: str | None, patience: float = 20.0) -> list[str]:
    """Look in the folder for process 0's probe; return faults."""
    deadline = time.monotonic() + patience  # a network disk shows another host's file a little later
    while job.shared and token and not _probe(job, 0, token).exists():
        if time.monotonic() > deadline:
            return [
                f"does not see the file that process 0 wrote to {job.folder}: it must be one folder for all hosts, on "
                "a network disk or gs://"
            ]
        time.sleep(0.2)
    return []


def _probe(job: Job, index: int, token: str) -> epath.Path:
    return epath.Path(job.folder) / f".preflight_{index}_{token}"


def _exchange(mine: Any) -> list:
    """Return the JSON-able values of all processes, by index."""
    data = np.frombuffer(json.dumps(mine).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(data.size))
    texts = multihost_utils.process_allgather(np.pad(data, (0, int(sizes.max()) - data.size)))
    return [json.loads(bytes(text[:size])) for text, size in zip(texts, sizes, strict=True)]
