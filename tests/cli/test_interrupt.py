"""Ctrl-C, sent to the process or, as a terminal does, to its group: one message, and no process is left."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sfd_jax.cli.main import run_command

COMMAND = """
import functools, sys, time
from sfd_jax.cli.main import run_command

def main(_):
    import numpy as np
    from sfd_jax.data.pipeline import prefetch
    from sfd_jax.distributed import start
    from sfd_jax.distributed.heartbeat import Heartbeat
    from sfd_jax.distributed.lock import FolderLock
    from sfd_jax.training.logging import MetricsLog
    start()
    with FolderLock(sys.argv[1]), Heartbeat(sys.argv[1], "train"), MetricsLog(sys.argv[1]) as log:
        for step, batch in enumerate(prefetch(functools.partial(np.full, 3), 0, 10**6, 2), 1):
            log.write(step, {"loss": float(batch[0])})
            print(step, flush=True)
            time.sleep(0.01)

if __name__ == "__main__":
    sys.exit(run_command(main, "train", []))
"""


@pytest.mark.parametrize("to", ["process", "group"])
def test_ctrl_c(to, tmp_path):
    script = tmp_path / "command.py"
    script.write_text(COMMAND)
    root = Path(__file__).resolve().parents[2]
    command = subprocess.Popen(
        [sys.executable, script, tmp_path / "run"],
        text=True,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    try:
        while command.stdout.readline().strip() != "3":
            assert command.poll() is None
        assert len(members(command.pid)) >= 3  # the loader's processes among them
        (os.killpg if to == "group" else os.kill)(command.pid, signal.SIGINT)
        _, error = command.communicate(timeout=60)
        assert error == "sfd train: interrupted; run the same command again to continue\n"
        assert command.returncode == 130
        deadline = time.monotonic() + 10
        while members(command.pid) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not members(command.pid)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(command.pid, signal.SIGKILL)


def test_ctrl_c_in_a_finalizer_is_not_lost(monkeypatch, capsys):
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # keep the handlers of this process

    class Finalized:
        def __del__(self):
            raise KeyboardInterrupt  # as Python's handler for Ctrl-C does

    def command(_):
        Finalized()
        time.sleep(10)

    assert run_command(command, "sample", []) == 130
    assert capsys.readouterr().err == "sfd sample: interrupted; run the same command again to continue\n"


def members(group: int) -> list[str]:
    """Return the processes of a group that are not dead."""
    listed = subprocess.run(["ps", "-A", "-o", "pgid=,stat=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(maxsplit=2) for line in listed.splitlines()]
    return [row[-1] for row in rows if row[0] == str(group) and not row[1].startswith("Z")]
