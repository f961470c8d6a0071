"""Before a job of several hosts begins: do they run the same code with the same settings, and have all they need?

Each process gathers its facts, all exchange them (rendezvous.py, or the coordinator's store once JAX runs), and each
draws the same conclusion from the same list. A process that cannot go on says so in its facts instead of staying
away, so that the others need not wait for it.
"""

import dataclasses
import hashlib
import os
import platform
import secrets
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

from etils import epath

from sfd_jax.errors import SfdError
from sfd_jax.files import differences

MAX_CLOCK_SKEW = 10.0  # seconds; credentials of a bucket and the order of log lines suffer from more
_PACKAGE = Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Job:
    """What a door is about to do.

    Attributes:
      settings: JSON-able; what must be the same on all hosts: flags, config, what was found in the data.
      folder: the job's folder, local or gs://; None where it has none.
      shared: whether every host writes into the folder, which must then be one folder for all; else host 0 does.
      needs: files and folders that each host must have.
    """

    settings: dict = dataclasses.field(default_factory=dict)
    folder: Any = None
    shared: bool = True
    needs: tuple = ()


def gather_facts(job: Job, index: int) -> dict:
    """Return what the others shall know of this process; JSON-able, touches no device.

    Args:
      job: what it is about to do.
      index: which process it is.

    Returns:
      host, pid, commit, sources (a hash), versions, settings, faults (sentences), probe (see `look_around`).
    """
    from importlib.metadata import version

    from sfd_jax import __version__

    faults, probe = [], None
    for path in filter(None, job.needs):
        try:
            faults += [] if epath.Path(path).exists() else [f"no {path} here"]
        except Exception as error:
            faults.append(f"cannot look for {path}: {error}")
    if job.folder is not None and (job.shared or index == 0):
        try:
            probe = _leave_probe(job.folder, index)
        except Exception as error:  # a bucket raises what its client does
            faults.append(f"cannot write to {job.folder}: {getattr(error, 'strerror', None) or error}")
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "commit": _commit(),
        "sources": _sources(),
        "versions": {
            "sfd_jax": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("jax", "jaxlib", "flax", "orbax-checkpoint")},
        },
        "settings": job.settings,
        "faults": faults,
        "probe": probe,
    }


def check_facts(facts: list[dict]) -> None:
    """Raise SfdError where the processes do not go together; the same on all of them.

    Args:
      facts: of each process, by index, as `gather_facts` returns them; `clock` is seconds ahead of process 0, where
        it was measured.
    """
    name = lambda index: f"process {index} ({facts[index].get('host')})"
    faults = [f"{name(index)}: {fault}" for index, told in enumerate(facts) for fault in told.get("faults", [])]
    first = facts[0]
    for index, told in enumerate(facts[1:], 1):
        if not {"sources", "settings"} <= first.keys() & told.keys():
            continue  # it told of its fault alone
        if told["sources"] != first["sources"]:
            same = told["commit"] == first["commit"]
            what = "edited sources of the same commit" if same and told["commit"] else _code(told)
            faults.append(f"{name(index)} runs other code than {name(0)}: {what}, there {_code(first)}")
        for part, title in (("versions", "other versions"), ("settings", "other settings")):
            if lines := differences(first[part], told[part]).values():
                listed = "\n    ".join(lines)
                faults.append(f"{name(index)} (here) has {title} than {name(0)} (there):\n    {listed}")
        if abs(told.get("clock", 0.0)) > MAX_CLOCK_SKEW:
            faults.append(f"the clock of {name(index)} is {told['clock']:+.0f} s off that of {name(0)}; set it by NTP")
    if faults:
        raise SfdError("the hosts cannot begin:\n  " + "\n  ".join(faults))


def look_around(job: Job, facts: list[dict], index: int, patience: float = 20.0) -> list[str]:
    """Look in the folder for what the others have left there.

    Args:
      job: what the process is about to do.
      facts: of all processes.
      index: which process it is: 0 looks for all, the others for what 0 has left.
      patience: seconds; a network disk shows another host's file a little later.

    Returns:
      Faults, each a sentence.
    """
    others = range(1, len(facts)) if index == 0 else [0]
    wanted = {other: _probe(job.folder, other, facts[other]["probe"]) for other in others if facts[other].get("probe")}
    deadline = time.monotonic() + patience
    while job.shared and wanted and time.monotonic() < deadline:
        wanted = {other: path for other, path in wanted.items() if not path.exists()}
        time.sleep(0.2 if wanted else 0.0)
    return [
        f"does not see in {job.folder} what process {other} ({facts[other]['host']}) wrote there: it must be one folder "
        "for all hosts, on a network disk or gs://"
        for other in (wanted if job.shared else ())
    ]


def remove_probe(job: Job, facts: dict, index: int) -> None:
    """Remove what `gather_facts` left in the folder."""
    if facts["probe"]:
        _probe(job.folder, index, facts["probe"]).unlink(missing_ok=True)


def _leave_probe(folder, index: int) -> str:
    token = secrets.token_hex(8)
    path = _probe(folder, index, token)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")
    return token


def _probe(folder, index: int, token: str) -> epath.Path:
    return epath.Path(folder) / f".preflight_{index}_{token}"


def _commit() -> str | None:
    """Return the commit of the sources, None where they are no git checkout."""
    if not (_PACKAGE.parent / ".git").exists():
        return None
    command = ["git", "-C", str(_PACKAGE.parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _sources() -> str:
    """Return a hash of the package's sources: what runs, committed or not."""
    digest = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        digest.update(str(path.relative_to(_PACKAGE)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _code(told: dict) -> str:
    commit = told["commit"]
    return f"commit {commit[:12]}" if commit else f"sfd_jax {told['versions']['sfd_jax']} ({told['sources'][:12]})"
