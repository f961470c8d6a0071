"""The meeting, the facts that must agree, and the lookout: in threads of this process, which are quick.

test_trouble.py does the same for real, with processes that are stopped and killed.
"""

import concurrent.futures
import copy
import json
import socket
import threading
import time
from types import SimpleNamespace

import jax
import pytest

from sfd_jax.distributed import hosts, lookout, preflight
from sfd_jax.distributed.preflight import Job
from sfd_jax.distributed.rendezvous import meet
from sfd_jax.errors import SfdError, TryAgain


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def meet_all(port, indices, count, timeout):
    with concurrent.futures.ThreadPoolExecutor() as pool:
        calls = [pool.submit(meet, f"localhost:{port}", count, i, {"host": f"h{i}"}, timeout) for i in indices]
        return [call.exception() or call.result() for call in calls]


def test_all_learn_of_all(port):
    answers = meet_all(port, (2, 0, 1), 3, timeout=20)
    assert answers == [answers[0]] * 3
    assert [told["host"] for told in answers[0]] == ["h0", "h1", "h2"]
    assert all(abs(told["clock"]) < 5 for told in answers[0])  # one machine's clock, compared with itself


def test_who_did_not_start_is_named_to_all(port):
    faults = meet_all(port, (0, 2), 4, timeout=2)
    for fault in faults:
        assert isinstance(fault, SfdError)
        assert "process 1, process 3 did not start within 2 s; these did: 0 (h0), 2 (h2)" in str(fault)


def test_process_0_did_not_start(port):
    (fault,) = meet_all(port, (1,), 2, timeout=1)
    assert f"process 0 at localhost:{port} did not answer process 1 within 1 s" in str(fault)


def test_two_processes_with_one_index(port):
    assert all("index 1 is taken twice" in str(fault) for fault in meet_all(port, (0, 1, 1), 3, timeout=10)[:1])


@pytest.mark.parametrize(
    "variables, message",
    [
        ({"JAX_PROCESS_ID": "0"}, "JAX_PROCESS_ID set but not JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES"),
        (
            {"JAX_COORDINATOR_ADDRESS": "localhost:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"},
            "JAX_PROCESS_ID=2 must be a number below JAX_NUM_PROCESSES=2",
        ),
        ({"JAX_COORDINATOR_ADDRESS": "localhost", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}, "not host:port"),
    ],
)
def test_variables_that_cannot_be(variables, message, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SfdError, match=message):
        hosts.start(timeout=1)


def test_alone_nothing_is_waited_for():
    hosts.start()
    hosts.barrier("alone", timeout=0.0)
    assert hosts.is_host0()


# --- Preflight -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two():
    """The facts of two processes that agree."""
    job = Job({"config": {"train": {"steps": 4}}, "images": 20})
    told = json.dumps(preflight.gather_facts(job, 0))
    facts = [{**json.loads(told), "host": f"h{index}", "clock": 0.1 * index} for index in range(2)]
    preflight.check_facts(facts)
    return facts


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda told: told["settings"]["config"]["train"].update(steps=5),
            r"process 1 \(h1\) \(here\) has other settings than process 0 \(h0\) \(there\):\n *config.train.steps: there 4, here 5",
        ),
        (lambda told: told["settings"].update(images=19), "images: there 20, here 19"),
        (lambda told: told["versions"].update(jax="0.1"), r"other versions(.|\n)*jax: there .*, here \"0.1\""),
        (
            lambda told: told.update(sources="x", commit="abcdef0123456789"),
            "process 1 .h1. runs other code .*: commit abcdef012345, there",
        ),
        (
            lambda told: told.update(sources="x"),
            "runs other code than process 0 .h0.: edited sources of the same commit",
        ),
        (lambda told: told.update(clock=-42.0), r"the clock of process 1 \(h1\) is -42 s off that of process 0 \(h0\)"),
        (lambda told: told["faults"].append("no latents/train here"), r"process 1 \(h1\): no latents/train here"),
    ],
)
def test_facts_that_do_not_agree(two, change, message):
    facts = copy.deepcopy(two)
    change(facts[1])
    if facts[1]["commit"] is None:
        facts[1]["commit"] = facts[0]["commit"] = "abc"  # not a checkout
    with pytest.raises(SfdError, match=message):
        preflight.check_facts(facts)


def test_code_without_git_is_named_by_version_and_hash(two):
    facts = copy.deepcopy(two)
    facts[0]["commit"] = facts[1]["commit"] = None
    facts[1]["sources"] = "f" * 64
    with pytest.raises(SfdError, match=r"sfd_jax 0.1.0 \(ffffffffffff\), there sfd_jax 0.1.0 \("):
        preflight.check_facts(facts)


def test_what_each_host_must_have(tmp_path):
    (tmp_path / "file").write_text("")
    faults = preflight.gather_facts(
        Job(folder=tmp_path / "file" / "run", needs=(tmp_path / "data", None, tmp_path)), 1
    )["faults"]
    assert faults[0] == f"no {tmp_path / 'data'} here" and faults[1].startswith(
        f"cannot write to {tmp_path / 'file' / 'run'}:"
    )
    assert len(faults) == 2
    # Where host 0 alone writes, the others need not be able to.
    assert preflight.gather_facts(Job(folder=tmp_path / "file" / "run", shared=False), 1)["faults"] == []


def test_one_folder_for_all(tmp_path):
    jobs = [Job(folder=tmp_path / name) for name in ("a", "a", "b")]
    facts = [preflight.gather_facts(job, index) for index, job in enumerate(jobs)]
    look = lambda index: preflight.look_around(jobs[index], facts, index, patience=0.3)
    assert "process 2" in look(0)[0] and "one folder for all hosts" in look(0)[0] and len(look(0)) == 1
    assert look(1) == [] and "what process 0" in look(2)[0]
    for index, job in enumerate(jobs):
        preflight.remove_probe(job, facts[index], index)
    assert not list((tmp_path / "a").iterdir()) and not list((tmp_path / "b").iterdir())


@pytest.mark.parametrize(
    "variable, value, message",
    [
        ("SFD_EXPECT_PROCESSES", "4", "SFD_EXPECT_PROCESSES=4, but the job has 1"),
        ("SFD_EXPECT_DEVICES", "16", "SFD_EXPECT_DEVICES=16, but there are 8"),
        ("SFD_EXPECT_DEVICES", "many", "SFD_EXPECT_DEVICES=many must be a whole number"),
        ("SFD_START_TIMEOUT", "soon", "SFD_START_TIMEOUT=soon must be a number of seconds"),
        ("SFD_MULTIHOST", "1", "SFD_MULTIHOST=1, but this machine is no part of a TPU pod"),
    ],
)
def test_a_process_alone_that_should_not_be(variable, value, message, monkeypatch):
    monkeypatch.setenv(variable, value)
    try:
        with pytest.raises(SfdError, match=message):
            hosts.start()
    finally:
        hosts.end(2)


def test_place_as_jax_finds_it(monkeypatch):
    """Slurm's variables stand for a pod's metadata: JAX's own detection reads both."""
    for name, value in {
        "SLURM_JOB_ID": "70123",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_NUM_TASKS": "3",
        "SLURM_NTASKS": "3",
        "SLURM_PROCID": "2",
        "SLURM_LOCALID": "2",
        "SFD_MULTIHOST": "1",
    }.items():
        monkeypatch.setenv(name, value)
    address, count, index = hosts._place(5.0)
    assert address.startswith("localhost:") and (count, index) == (3, 2)


# --- Lookout ---------------------------------------------------------------------------------------------------


class Store:
    """The coordinator's store in a dict."""

    def __init__(self):
        self.values = {}

    def key_value_set(self, key, value, allow_overwrite=False):
        self.values[key] = value

    def key_value_dir_get(self, prefix):
        return [(key, value) for key, value in list(self.values.items()) if key.startswith(prefix)]

    def blocking_key_value_get(self, key, milliseconds):
        deadline = time.monotonic() + milliseconds / 1000
        while key not in self.values:
            if time.monotonic() > deadline:
                raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED")
            time.sleep(0.01)
        return self.values[key]


@pytest.fixture
def outlooks(monkeypatch):
    """Three lookouts that note why they would leave, instead of ending the process."""
    monkeypatch.setattr(lookout, "TICK", 0.05)
    store, made = Store(), []
    for index in range(3):
        one = lookout.Lookout(["h0", "h1", "h2"], index, store, timeout=2.0)
        one.left = []
        one._leave = lambda status, why, say=True, one=one: (one.left.append((status, why)), one._over.set())
        threads = [threading.Thread(target=run, daemon=True) for run in (one._watch, one._talk)]
        one._threads = threads
        one._ears, one._mouth = socket.socketpair()
        made.append(one)
        for thread in threads:
            thread.start()
    yield made
    for one in made:
        one._over.set()
        for thread in one._threads:
            thread.join()


def until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_all_leave_at_one_step(outlooks):
    """Each goes at its own pace, held within two steps of the others as collectives would; one is told to leave."""
    at, lock = [0, 0, 0], threading.Condition()

    def work(index):
        with outlooks[index].asking() as one:
            for step in range(1, 100_000):
                if one.shall_leave(step):
                    return step
                with lock:
                    at[index] = step
                    lock.notify_all()
                    lock.wait_for(lambda: step - min(at) < 2, timeout=20)
                if index == 1 and step == 20:
                    outlooks[1]._told.set()
                time.sleep(0.002 * index)

    with concurrent.futures.ThreadPoolExecutor() as pool:
        ends = list(pool.map(work, range(3)))
    assert ends[0] == ends[1] == ends[2] > 20
    assert not any(one.left for one in outlooks)


def test_told_before_the_first_step(outlooks):
    outlooks[2]._told.set()
    until(lambda: outlooks[2].left)
    assert outlooks[2].left[0][0] == 75 and "told to leave by SIGTERM" in outlooks[2].left[0][1]


def test_who_falls_silent_is_named(outlooks):
    until(lambda: len(outlooks[0]._others) == 3)
    outlooks[1].done()  # needs no watching any more
    until(lambda: outlooks[0]._others[1]["end"])
    outlooks[1]._over.set()
    outlooks[2]._over.set()
    until(lambda: outlooks[0].left)
    (status, why), *_ = outlooks[0].left
    assert status == 75 and why.startswith("process 2 (h2) has given no sign of life for 2 s")


def test_a_store_that_does_not_answer_is_process_0(outlooks, monkeypatch):
    until(lambda: len(outlooks[1]._others) == 3)
    monkeypatch.setattr(Store, "key_value_set", lambda *_: time.sleep(3))
    until(lambda: outlooks[1].left)
    assert outlooks[1].left[0][1].startswith("process 0 (h0) has given no sign of life")


def test_a_fault_takes_all_along_with_its_words(outlooks):
    outlooks[1]._farewell(2, "a disk is missing")
    until(lambda: outlooks[0].left and outlooks[2].left)
    assert outlooks[0].left[0] == outlooks[2].left[0] == (2, "process 1 (h1) ended: a disk is missing")


def test_barrier_names_who_does_not_come(outlooks, monkeypatch):
    monkeypatch.setattr(hosts, "_store", Store)
    monkeypatch.setattr(hosts, "_lookout", outlooks[0])
    monkeypatch.setattr(
        hosts, "jax", SimpleNamespace(errors=jax.errors, process_count=lambda: 3, process_index=lambda: 1)
    )
    with pytest.raises(TryAgain, match=r"barrier 'data': process 0 \(h0\), process 2 \(h2\) did not arrive within 0 s"):
        hosts.barrier("data", timeout=0.2)
