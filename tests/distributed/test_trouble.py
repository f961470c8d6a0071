"""Jobs of several processes on this machine with faults: none hangs, and each ends with its status.

All jobs run at the same time, since they mostly wait: for the import of JAX, and for timeouts. Only those that must
save train; the others only count together.
"""

import json
import signal
import subprocess
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from job_testing import launch
from toy_job import fit_toy

from sfd_jax.distributed import make_mesh, sharding
from sfd_jax.training import load_params

pytestmark = pytest.mark.slow

# name -> (what it does, which processes start, of how many, variables of all, variables of process 1)
JOBS = {
    "four": ("train", (0, 1, 2, 3), 4, {}, {}),
    "preempted": ("train", (0, 1), 2, {"TROUBLE": "evaluate:term", "END": "100000"}, {}),
    "preempted while compiling": ("train", (0, 1), 2, {"TROUBLE": "compile:term", "END": "100000"}, {}),
    "killed while saving": ("train", (0, 1), 2, {"TROUBLE": "save:kill"}, {}),
    "coordinator killed": ("count", (0, 1), 2, {"TROUBLE": "step:kill", "SUFFERER": "0"}, {}),
    "preempted with nothing to save": ("count", (0, 1), 2, {"TROUBLE": "step:term"}, {}),
    "bug": ("count", (0, 1), 2, {"TROUBLE": "step:error"}, {}),
    "late": ("count", (0, 1), 2, {"TROUBLE": "step:sleep"}, {}),
    "other config": ("count", (0, 1), 2, {}, {"END": "9", "NEEDS": "nowhere/latents"}),
    "absent": ("count", (0, 2), 4, {"SFD_START_TIMEOUT": "30"}, {}),
}
# Statuses that `scripts/tpu/watch.sh` restarts; an abort is a signal here, and 134 in a shell.
AGAIN = (75, -signal.SIGABRT)


class Ended:
    """A job that has ended: statuses and what its processes printed."""

    def __init__(self, folder: Path, what: str, indices: tuple, count: int, variables: dict, of_1: dict):
        folder.mkdir()
        self.folder, log = folder, lambda index: folder / f"log{index}"
        environment = {"RUN": str(folder / "run"), **variables}
        self.processes = launch(
            [Path(__file__).with_name("toy_job.py"), what],
            count,
            indices=indices,
            variables=lambda index: environment | (of_1 if index == 1 else {}),
            log=log,
        )
        self.logs = {index: log(index) for index in indices}

    def wait(self, deadline: float) -> None:
        for process in self.processes.values():
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
        self.statuses = [process.wait() for process in self.processes.values()]
        self.says = [log.read_text() for log in self.logs.values()]

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


@pytest.fixture
def here(monkeypatch):
    """Train the toy in this process, on as many devices as the jobs have in all; returns the parameters."""
    monkeypatch.setattr(sharding, "MIN_ELEMENTS", 1)
    return lambda folder: fit_toy(folder, make_mesh(2, -1, devices=jax.devices()[:4]), 8).params


def check_same(folder: Path, params: dict) -> None:
    """Compare a folder's newest checkpoint with parameters; sums run in another order."""
    saved, metadata = load_params(folder, which="raw")
    assert metadata["step"] == 8
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), saved, jax.device_get(params))


def test_four_processes_and_a_killed_job_end_with_the_result_of_one_process(jobs, here, tmp_path):
    whole, four, killed = here(tmp_path), jobs["four"], jobs["killed while saving"]
    assert four.statuses == [0] * 4, four.says
    check_same(four.folder / "run", whole)
    beats = [four.heartbeat(index) for index in range(4)]
    found = [[beat[name] for name in ("process", "processes", "step", "phase", "status")] for beat in beats]
    assert found == [[index, 4, 8, "end", 0] for index in range(4)]
    assert not [path for name in (".preflight*", "heartbeats/start_*") for path in (four.folder / "run").glob(name)]
    # A killed job loses one interval; it resumes on another number of hosts.
    assert killed.statuses[0] in AGAIN and killed.statuses[1] == -signal.SIGKILL, killed.says
    assert load_params(killed.folder / "run")[1]["step"] in (2, 4)  # complete, whether step 4's was in time or not
    here(killed.folder / "run")
    check_same(killed.folder / "run", whole)


@pytest.mark.parametrize("name", ["preempted", "preempted while compiling"])
def test_sigterm_at_one_saves_on_all_at_one_step(jobs, name):
    job = jobs[name]
    assert job.statuses == [75, 75], job.says
    step = load_params(job.folder / "run")[1]["step"]
    assert (4 if name == "preempted" else 0) < step < 100_000
    assert f"step {step} is saved" in job.says[0] and "is saved" not in job.says[1]
    assert [job.heartbeat(index)["status"] for index in (0, 1)] == [75, 75]


def test_sigterm_with_nothing_to_save_ends_all(jobs):
    job = jobs["preempted with nothing to save"]
    assert job.statuses[0] in AGAIN and job.statuses[1] == 75, job.says
    assert "by SIGTERM" in job.says[1]


def test_a_killed_coordinator_ends_the_others(jobs):
    job = jobs["coordinator killed"]
    assert job.statuses[0] == -signal.SIGKILL and job.statuses[1] in AGAIN, job.says


def test_a_bug_in_one_process_ends_both(jobs):
    job = jobs["bug"]
    assert job.statuses[0] in AGAIN and job.statuses[1] == 1, job.says
    assert "Traceback" in job.says[1] and "ValueError: a bug" in job.says[1]


def test_a_process_missing_at_a_barrier_is_named(jobs):
    job = jobs["late"]
    assert job.statuses == [75, 75] or job.statuses[0] == 75 and job.statuses[1] in AGAIN, job.says
    assert "barrier 'counted': process 1 did not arrive within 5 s" in job.says[0]


def test_another_config_and_missing_data_are_named_by_both(jobs):
    job = jobs["other config"]
    assert job.statuses == [2, 2], job.says
    for says in job.says:
        assert "config.steps: there 4, here 9" in says and "): no nowhere/latents here" in says
        assert "step 0" not in says  # nothing has started


def test_processes_that_did_not_start_are_named(jobs):
    job = jobs["absent"]
    assert job.statuses == [75, 75], job.says
    for says in job.says:
        assert "process 1, process 3 did not start within 30 s" in says and "process_0, process_2" in says
