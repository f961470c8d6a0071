"""One command at a time in a folder, with flock and without; a killed holder never blocks."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sfd_jax.distributed import lock
from sfd_jax.distributed.lock import FolderLock
from sfd_jax.errors import SfdError

ROOT = Path(__file__).resolve().parents[2]
HOLD = """
import os, sys, time
from sfd_jax.distributed import lock
lock.PERIOD = 0.2
if sys.argv[2] == "lease":
    lock.FolderLock._flock = lambda self: False
with lock.FolderLock(sys.argv[1]):
    if os.fork() == 0:  # as a loader's process, which has let go of the lock by now
        print("held", flush=True)
        time.sleep(5)
        os._exit(0)
    time.sleep(60)
"""


@pytest.fixture
def lease(monkeypatch):
    """No flock, as in a bucket, and short times."""
    monkeypatch.setattr(lock, "PERIOD", 0.2)
    monkeypatch.setattr(lock, "STALE", 3.0)
    monkeypatch.setattr(lock, "_SETTLE", 0.3)
    monkeypatch.setattr(FolderLock, "_flock", lambda self: False)


@pytest.fixture(params=["flock", "lease"])
def kind(request):
    if request.param == "lease":
        request.getfixturevalue("lease")
    return request.param


def hold(folder, kind) -> subprocess.Popen:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, folder, kind], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    return holder


def test_a_second_start_is_refused_until_the_first_is_gone(kind, tmp_path, capsys):
    holder = hold(tmp_path, kind)
    try:
        with pytest.raises(SfdError, match=f"in use by process {holder.pid} on .*nothing was touched"):
            FolderLock(tmp_path).__enter__()
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    capsys.readouterr()
    with FolderLock(tmp_path):  # the holder's child still lives
        assert "waiting" not in capsys.readouterr().out
    with FolderLock(tmp_path) as again:
        again.check()


def test_a_lease_of_another_machine_is_watched_and_then_taken_over(lease, monkeypatch, tmp_path, capsys):
    naps, sleep = [], time.sleep
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: naps.append(seconds) or sleep(seconds))
    (tmp_path / ".lock").write_text(json.dumps({"host": "other", "space": "", "pid": 1, "since": "x", "token": "y"}))
    start = time.monotonic()
    with FolderLock(tmp_path) as mine:
        assert time.monotonic() - start >= 3  # watched for that long,
        assert sum(naps) <= 3 + 2 * 0.3  # and no longer, but for the last look and the time to settle
        assert "process 1 on other (since x) may still be running here; waiting up to 3 s" in capsys.readouterr().out
        # As if this process were stopped for a long time, while another one takes over.
        (tmp_path / ".lock").write_text(json.dumps({"host": "other", "token": "z"}))
        deadline = time.monotonic() + 60
        with pytest.raises(SfdError, match="another one has taken over the folder"):
            while time.monotonic() < deadline:
                mine.check()
                time.sleep(0.05)
    assert json.loads((tmp_path / ".lock").read_text())["token"] == "z"  # not ours to remove


def test_of_two_that_take_a_lease_at_once_one_gets_it(lease, monkeypatch, tmp_path):
    first = FolderLock(tmp_path)
    monkeypatch.setattr(lock.time, "sleep", lambda _: FolderLock(tmp_path)._write())  # another one, meanwhile
    with pytest.raises(SfdError, match="in use by"):
        first.__enter__()


def test_a_damaged_lock_file_does_not_block(kind, tmp_path):
    (tmp_path / ".lock").write_bytes(b"\xff\x00")
    with FolderLock(tmp_path):
        assert os.listdir(tmp_path) == [".lock"]


def test_a_process_of_a_loaders_process_keeps_its_files(tmp_path):
    """The first closes the lock's descriptor, and a file of its own gets the number."""
    code = """
import os, sys
from sfd_jax.distributed.lock import FolderLock
with FolderLock(sys.argv[1]) as held:
    number = held._descriptor
    if os.fork() == 0:
        files = [os.open(__file__, os.O_RDONLY) for _ in range(4)]
        assert number in files
        if os.fork() == 0:
            os._exit(not os.path.exists(f"/proc/self/fd/{number}"))
        os._exit(os.waitstatus_to_exitcode(os.wait()[1]))
    sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
"""
    (tmp_path / "forks.py").write_text(code)
    command = [sys.executable, str(tmp_path / "forks.py"), str(tmp_path / "run")]
    subprocess.run(command, check=True, timeout=60, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
