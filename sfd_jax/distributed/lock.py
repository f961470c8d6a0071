"""A lock for folders: a second command in the same folder is refused before it touches anything.

On a local or network disk the lock is `flock` on the file `.lock`: the kernel releases it however the process ends
(on NFS within the server's lease time). Buckets, and file systems without `flock`, have a lease instead: `.lock` names
the holder and is rewritten every ten seconds. A process that finds a lease takes it over at once if the holder was a
process of this machine and is dead; otherwise it watches for a minute, and takes over a lease that is not renewed.
Nothing depends on the clocks of two machines. The package `filelock` would empty the file that names the holder, and
does not support buckets.
"""

import contextlib
import errno
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from pathlib import Path

from etils import epath

from sfd_jax.distributed.hosts import barrier, is_host0, say
from sfd_jax.errors import SfdError
from sfd_jax.files import write_anywhere

PERIOD = 10.0  # seconds between two renewals of a lease
STALE = 60.0  # seconds without a renewal after which a lease is taken over
_SETTLE = 1.0  # of two processes that take a lease within this time, the later one gets it
_NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class FolderLock:
    """Lock a folder, local or gs://, during a `with`; host 0 takes the lock for all hosts of the job."""

    def __init__(self, folder: str | os.PathLike):
        """Prepare the lock; nothing is touched before the `with`, which makes the folder where needed."""
        self._folder, self._path = folder, epath.Path(folder) / ".lock"
        # Processes of two containers may share host name and PID, but not the PID namespace.
        space = os.readlink("/proc/self/ns/pid") if os.path.exists("/proc/self/ns/pid") else ""
        self._me = {"host": socket.gethostname(), "space": space, "pid": os.getpid(), "token": secrets.token_hex(8)}
        self._me["since"] = time.strftime("%Y-%m-%d %H:%M:%S")
        self._descriptor: int | None = None
        self._thread: threading.Thread | None = None  # renews the lease
        self._end, self._taken_over, self._renewed = threading.Event(), False, 0.0

    def __enter__(self) -> "FolderLock":
        """Take the lock.

        Raises:
          SfdError: another command runs in the folder, or it cannot be written to.
        """
        if is_host0():
            try:
                if "://" in str(self._path) or not self._flock():
                    self._take_lease()
            except SfdError:
                raise
            except Exception as error:  # a bucket's client has its own types, and may be missing
                what = f"work folder {self._folder} cannot be used: {error}"
                raise SfdError(f"{what}; choose one that can be written") from error
        barrier(f"{self._folder} is locked")
        return self

    def __exit__(self, *exception) -> None:
        self._let_go()
        if self._thread is not None:
            self._end.set()
            self._thread.join(PERIOD)
            with contextlib.suppress(Exception):
                if self._is_mine(self._read()):
                    self._path.unlink()

    def check(self) -> None:
        """Raise SfdError where another process took over the lease while this one was stopped."""
        if self._thread is not None and time.monotonic() - self._renewed > STALE:
            self._renew()
        if self._taken_over:
            raise SfdError(
                f"{self._folder}: this process was stopped for a long time, and another one has taken over the folder"
            )

    def _flock(self) -> bool:
        Path(self._folder).mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            who = _parsed(os.read(descriptor, 1000))
            os.close(descriptor)
            if error.errno in _NO_FLOCK:
                return False
            if not isinstance(error, BlockingIOError):
                raise
            self._refuse(who)
        self._descriptor = descriptor
        # A loader's process that outlives a killed run must not keep its lock.
        os.register_at_fork(after_in_child=self._let_go)
        with contextlib.suppress(OSError):  # on a full disk only the name of the holder is missing
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(self._me).encode(), 0)
        return True

    def _let_go(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _take_lease(self) -> None:
        found = self._read()
        if found and not self._is_dead(found):
            say(f"{self._folder}: {_name(found)} may still be running here; waiting up to {STALE:.0f} s to find out")
            deadline = time.monotonic() + STALE
            while (now := self._read()) == found and time.monotonic() < deadline:
                time.sleep(_SETTLE)
            if now not in (found, None):
                self._refuse(now)
        self._write()
        time.sleep(_SETTLE)
        if not self._is_mine(now := self._read()):
            self._refuse(now or {})
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()

    def _keep(self) -> None:
        while not self._end.wait(PERIOD) and not self._taken_over:
            with contextlib.suppress(Exception):  # a lease survives five failed renewals
                self._renew()

    def _renew(self) -> None:
        found = self._read()
        if found and not self._is_mine(found):
            self._taken_over = True
        else:
            self._write()

    def _write(self) -> None:
        write_anywhere(self._path, json.dumps({**self._me, "renewal": secrets.token_hex(8)}))
        self._renewed = time.monotonic()

    def _read(self) -> dict | None:
        return _parsed(self._path.read_bytes()) if self._path.exists() else None

    def _is_mine(self, found: dict | None) -> bool:
        return found is not None and found.get("token") == self._me["token"]

    def _is_dead(self, who: dict) -> bool:
        same_machine = self._me["space"] and all(who.get(key) == self._me[key] for key in ("host", "space"))
        return bool(same_machine) and not os.path.exists(f"/proc/{who.get('pid')}")

    def _refuse(self, who: dict) -> None:
        raise SfdError(
            f"{self._folder} is in use by {_name(who)}; nothing was touched. Wait until that command ends, stop it, or "
            "choose another folder"
        )


def _name(who: dict) -> str:
    return f"process {who.get('pid', '?')} on {who.get('host', 'an unknown host')} (since {who.get('since', '?')})"


def _parsed(data: bytes) -> dict:
    with contextlib.suppress(ValueError):
        if isinstance(who := json.loads(data), dict):
            return who
    return {"host": "an unknown host"}
