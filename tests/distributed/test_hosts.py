"""Variables of a job, facts that must agree, and SIGTERM, in one process.

test_trouble.py uses several processes, some killed and signalled.
"""

import contextlib
import copy
import json
import os
import signal
import time

import jax
import pytest
import toy_job

from sfd_jax.cli.main import run_command
from sfd_jax.distributed import hosts, make_mesh, preflight
from sfd_jax.distributed.preflight import Job
from sfd_jax.errors import SfdError, TryAgain


@pytest.mark.parametrize(
    "variables, message",
    [
        ({"JAX_PROCESS_ID": "0"}, "JAX_PROCESS_ID set but not JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES"),
        (
            {"JAX_COORDINATOR_ADDRESS": "localhost:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"},
            "JAX_PROCESS_ID=2 must be a number below JAX_NUM_PROCESSES=2",
        ),
        ({"JAX_COORDINATOR_ADDRESS": "localhost", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}, "not host:port"),
        (
            {
                "JAX_COORDINATOR_ADDRESS": "localhost:1",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": "1",
                "SFD_EXPECT_PROCESSES": "4",
            },
            "SFD_EXPECT_PROCESSES=4, but there are 2",
        ),
        ({"SFD_EXPECT_PROCESSES": "4"}, "SFD_EXPECT_PROCESSES=4, but there are 1"),
        ({"SFD_EXPECT_DEVICES": "16"}, "SFD_EXPECT_DEVICES=16, but there are 8"),
        ({"SFD_EXPECT_DEVICES": "many"}, "SFD_EXPECT_DEVICES=many must be a whole number"),
    ],
)
def test_impossible_variables_are_refused(variables, message, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SfdError, match=message):
        hosts.start()


def test_multihost_leaves_the_search_to_jax(monkeypatch):
    monkeypatch.setenv("SFD_MULTIHOST", "1")
    given = {}
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: given.update(arguments))
    monkeypatch.setattr(hosts, "_expect", lambda *_: None)
    hosts.start()
    assert given == {"initialization_timeout": 360, "heartbeat_timeout_seconds": 60}

    def nowhere(**_):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", nowhere)
    with pytest.raises(SfdError, match="a cluster that JAX knows must describe: coordinator_address should be defined"):
        hosts.start()


def test_a_single_process_does_not_wait():
    hosts.start()
    hosts.barrier("alone", timeout=0.0)
    hosts.end(0)
    hosts.end(2)
    assert hosts.is_host0()


# --- Preflight -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two():
    """Reports of two processes that agree."""
    facts = json.dumps(preflight.facts_of(Job({"config": {"train": {"steps": 4}}, "images": 20})))
    reports = [{"host": f"h{index}", "faults": [], "facts": json.loads(facts)} for index in range(2)]
    preflight.check_facts(reports, [0.0, 0.1])
    return reports


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda facts: facts["config"]["train"].update(steps=5),
            r"differs from .* config.train.steps: there 4, here 5",
        ),
        (lambda facts: facts.update(images=19), "images: there 20, here 19"),
        (lambda facts: facts["versions"].update(jax="0.1"), r"versions.jax: there .*, here \"0.1\""),
        (lambda facts: facts.update({"sources of sfd_jax": "x"}), r"sources of sfd_jax: there \"0.1.0, .*, here \"x\""),
    ],
)
def test_facts_that_do_not_agree(two, change, message):
    reports = copy.deepcopy(two)
    change(reports[1]["facts"])
    with pytest.raises(SfdError, match=r"the hosts cannot begin:\n  process 1 \(h1\): .*" + message):
        preflight.check_facts(reports, [0.0, 0.0])


def test_clocks_and_faults_are_named(two):
    reports = copy.deepcopy(two)
    reports[0]["faults"].append("no latents/train here")
    message = r"process 0 \(h0\): no latents/train here\n  process 1 \(h1\): its clock is -42 s off that of process 0"
    with pytest.raises(SfdError, match=message):
        preflight.check_facts(reports, [0.0, -42.0])


def test_what_each_host_must_have(tmp_path):
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "run"
    probe, faults = preflight._look_for_needs(Job(folder=folder, needs=(tmp_path / "data", None, tmp_path)), 1)
    assert probe is None and faults[0] == f"no {tmp_path / 'data'} here"
    assert faults[1].startswith(f"cannot write to {folder}:") and len(faults) == 2
    # Where only host 0 writes, the others need no access.
    assert preflight._look_for_needs(Job(folder=folder, shared=False), 1) == (None, [])


def test_one_folder_for_all(tmp_path):
    jobs = [Job(folder=tmp_path / name) for name in ("a", "a", "b")]
    token, _ = preflight._look_for_needs(jobs[0], 0)
    faults = [preflight._look_for_host0(job, token, patience=0.3) for job in jobs]
    assert faults[:2] == [[], []] and "one folder for all hosts" in faults[2][0]
    assert preflight._look_for_host0(Job(folder=tmp_path / "b", shared=False), token, patience=0.3) == []


# --- SIGTERM ---------------------------------------------------------------------------------------------------


def test_sigterm_ends_work_that_has_nothing_to_save(capsys):
    before = signal.getsignal(signal.SIGTERM)

    def command(_):
        with contextlib.suppress(Exception):  # as in a bucket's client
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        return 1

    assert run_command(command, "sample", []) == TryAgain.status == 75
    assert "by SIGTERM; run the same command again" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


def test_sigterm_before_the_first_step(tmp_path, monkeypatch):
    """While parameters are made, when the first programs are compiled."""
    monkeypatch.setattr(toy_job, "trouble", lambda phase: phase == "compile" and os.kill(os.getpid(), signal.SIGTERM))
    mesh = make_mesh(devices=jax.devices()[:1])
    assert run_command(lambda _: toy_job.fit_toy(tmp_path, mesh, 4) and 0, "train", []) == 75
    assert not (tmp_path / "checkpoints" / "2").exists()
