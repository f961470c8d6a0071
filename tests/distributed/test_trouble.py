"""Jobs of several processes on this machine that get into trouble: all named, none hangs, each ends with its status.

All jobs run at the same time, since they mostly wait: for JAX to be imported, and for silence to last.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from sfd_jax.training import load_params

pytestmark = pytest.mark.slow

# name -> (processes, variables of all, variables of process 1; None leaves it out)
JOBS = {
    "whole": (1, {}, {}),
    "four": (4, {}, {}),
    "stopped": (2, {"TROUBLE": "step:stop"}, {}),
    "coordinator killed": (2, {"TROUBLE": "step:kill", "SUFFERER": "0"}, {}),
    "killed while saving": (2, {"TROUBLE": "save:kill"}, {}),
    "told to leave": (2, {"TROUBLE": "evaluate:term", "END": "100000"}, {}),
    "told while compiling": (2, {"TROUBLE": "compile:term"}, {}),
    "told while compiling alone": (1, {"TROUBLE": "compile:term", "SUFFERER": "0"}, {}),
    "bug": (2, {"TROUBLE": "step:error"}, {}),
    "fault before the start": (2, {"TROUBLE": "flags:fault"}, {}),
    "other config": (2, {}, {"END": "9", "NEEDS": "nowhere/latents"}),
    "absent": (2, {"SFD_START_TIMEOUT": "8"}, None),
}


class Ended:
    """A job that has ended: statuses and what its processes printed."""

    def __init__(self, folder: Path, count: int, variables: dict, of_1: dict | None):
        self.folder, self.processes, self.logs = folder, {}, {}
        folder.mkdir()
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        # The silence that counts is far longer than eleven jobs at once on two cores can cause.
        common = {
            "RUN": str(folder / "run"),
            "JAX_PLATFORMS": "cpu",
            "SFD_PEER_TIMEOUT": "12",
            "SFD_START_TIMEOUT": "120",
        }
        for index in range(count):
            if index == 1 and of_1 is None:
                continue
            own = {
                "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                "JAX_NUM_PROCESSES": str(count),
                "JAX_PROCESS_ID": str(index),
            }
            own["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={4 // count}"
            environment = {**os.environ, **common, **own, **variables, **(of_1 if index == 1 else {})}
            self.logs[index] = folder / f"log{index}"
            command = [sys.executable, str(Path(__file__).with_name("toy_job.py"))]
            with self.logs[index].open("w") as log:
                self.processes[index] = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)

    def wait(self, deadline: float) -> None:
        while any(process.poll() is None for process in self.processes.values()) and time.monotonic() < deadline:
            alive = [index for index, process in self.processes.items() if process.poll() is None]
            if len(alive) == 1 and len(self.processes) > 1 and self.is_stopped(alive[0]):
                break  # the one that was stopped stays so
            time.sleep(0.1)
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()
        self.statuses = [process.wait() for process in self.processes.values()]
        self.says = [log.read_text() for log in self.logs.values()]

    def is_stopped(self, index: int) -> bool:
        stat = Path(f"/proc/{self.processes[index].pid}/stat")
        return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] == "T"

    def heartbeat(self, index: int) -> dict:
        return json.loads((self.folder / "run" / "heartbeats" / f"process_{index:05d}.json").read_text())


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("jobs")
    jobs = {name: Ended(folder / name.replace(" ", "_"), *job) for name, job in JOBS.items()}
    deadline = time.monotonic() + 400
    for job in jobs.values():
        job.wait(deadline)
    return jobs


def kernel(job: Ended) -> np.ndarray:
    return np.load(job.folder / "run" / "kernel.npy")


def test_four_processes_train_as_one_does(jobs):
    whole, four = jobs["whole"], jobs["four"]
    assert whole.statuses == [0] and four.statuses == [0] * 4, four.says
    np.testing.assert_allclose(kernel(four), kernel(whole), rtol=1e-5, atol=1e-5)  # sums run in another order
    for index in range(4):
        beat = four.heartbeat(index)
        assert (beat["process"], beat["processes"], beat["step"], beat["phase"], beat["status"]) == (
            index,
            4,
            8,
            "end",
            0,
        )
    assert not list((four.folder / "run").glob(".preflight*"))


def test_a_stopped_process_is_named(jobs):
    job = jobs["stopped"]
    assert job.statuses[0] == 75, job.says
    assert (
        "process 1 (" in job.says[0]
        and "has given no sign of life for 12 s (stopped, killed or cut off)" in job.says[0]
    )
    assert job.heartbeat(0)["status"] == 75 and load_params(job.folder / "run")[1]["step"] in (2, 4)


def test_a_killed_coordinator_is_named(jobs):
    job = jobs["coordinator killed"]
    assert job.statuses == [-signal.SIGKILL, 75], job.says
    last = job.says[1].strip().splitlines()[-1]
    assert last.startswith("sfd: process 0 (") and ("is gone" in last or "no sign of life" in last)


def test_killed_while_saving_loses_one_interval_and_goes_on_with_another_number_of_hosts(jobs, tmp_path):
    job = jobs["killed while saving"]
    assert job.statuses == [75, -signal.SIGKILL], job.says
    assert "process 1 (" in job.says[0]
    assert load_params(job.folder / "run")[1]["step"] in (2, 4)  # whole, whether step 4's is in time or not
    variables = {**os.environ, "RUN": str(job.folder / "run"), "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    subprocess.run([sys.executable, str(Path(__file__).with_name("toy_job.py"))], env=variables, check=True)
    np.testing.assert_allclose(kernel(job), kernel(jobs["whole"]), rtol=1e-5, atol=1e-5)


def test_sigterm_at_one_stops_both_at_one_step(jobs):
    job = jobs["told to leave"]
    assert job.statuses == [75, 75], job.says
    step = load_params(job.folder / "run")[1]["step"]
    assert 4 < step < 100_000
    assert f"step {step} is saved" in job.says[0] and "is saved" not in job.says[1]
    assert job.heartbeat(0)["status"] == job.heartbeat(1)["status"] == 75


def test_sigterm_while_compiling_does_not_wait_for_the_compiler(jobs):
    job = jobs["told while compiling"]
    assert job.statuses == [75, 75], job.says
    assert "told to leave by SIGTERM" in job.says[1] and jobs["told while compiling alone"].statuses == [75]
    assert "process 1 (" in job.says[0] and "ended: told to leave by SIGTERM" in job.says[0]


def test_a_bug_of_one_ends_both(jobs):
    job = jobs["bug"]
    assert job.statuses == [1, 1], job.says
    assert "ValueError: a bug" in job.says[1] and "Traceback" in job.says[1]
    assert "process 1 (" in job.says[0] and "ended: ValueError: a bug" in job.says[0]


def test_a_fault_before_the_start_is_told_at_the_meeting(jobs):
    job = jobs["fault before the start"]
    assert job.statuses == [2, 2], job.says
    assert job.says[1].strip() == "sfd train: a disk is missing"
    assert "process 1 (" in job.says[0] and "): a disk is missing" in job.says[0]


def test_another_config_and_missing_data_are_named_by_both(jobs):
    job = jobs["other config"]
    assert job.statuses == [2, 2], job.says
    for says in job.says:
        assert "config.steps: there 8, here 9" in says and "): no nowhere/latents here" in says
    assert not (job.folder / "run" / "run.json").exists()  # nothing has begun


def test_who_did_not_start_is_named(jobs):
    job = jobs["absent"]
    assert job.statuses == [75], job.says
    assert "process 1 did not start within 8 s; these did: 0 (" in job.says[0]
