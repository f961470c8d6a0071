"""Several processes on this machine: meeting, barriers, and a training run that one process would do alike."""

import concurrent.futures
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from sfd_jax.distributed import hosts
from sfd_jax.distributed.rendezvous import meet
from sfd_jax.errors import SfdError

ROOT = Path(__file__).resolve().parents[2]


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


@pytest.mark.parametrize("variables, message", [
    ({"JAX_PROCESS_ID": "0"}, "JAX_PROCESS_ID set but not JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES"),
    ({"JAX_COORDINATOR_ADDRESS": "localhost:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"},
     "JAX_PROCESS_ID=2 must be a number below JAX_NUM_PROCESSES=2"),
    ({"JAX_COORDINATOR_ADDRESS": "localhost", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}, "not host:port"),
])
def test_variables_that_cannot_be(variables, message, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SfdError, match=message):
        hosts.start(timeout=1)


def test_alone_nothing_is_waited_for():
    hosts.start()
    hosts.barrier("alone", timeout=0.0)
    assert hosts.is_host0()


def spawn(script, port, count, **environment):
    """Start `count` processes with four devices in all; returns their (status, output)."""
    script = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests/training')!r}]\n" + textwrap.dedent(script)
    processes = []
    for index in range(count):
        variables = dict(os.environ, JAX_PLATFORMS="cpu", **environment)
        variables["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={4 // count}"
        if count > 1:
            variables |= {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": str(count),
                          "JAX_PROCESS_ID": str(index)}
        processes.append(subprocess.Popen([sys.executable, "-c", script], env=variables, text=True,
                                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


@pytest.mark.slow
def test_barrier_names_the_process_that_does_not_come(port):
    ends = spawn("""
        import os, time
        from sfd_jax.distributed import hosts
        hosts.start(timeout=120)
        hosts.barrier("first", 120)
        if os.environ["JAX_PROCESS_ID"] == "1":
            time.sleep(8)
        try:
            hosts.barrier("data ready", 2)
        except Exception as error:
            print(error, flush=True)
        time.sleep(8)
        os._exit(0)  # without JAX's own farewell, which waits for both
    """, port, 2)
    assert "barrier 'data ready': process 1 (" in ends[0][1], ends
    assert "did not arrive within 2 s" in ends[0][1]


TRAIN = """
    import os
    from sfd_jax.distributed import hosts, make_mesh
    hosts.start(timeout=120)
    import jax, signal
    from toy_training import toy_batches, toy_config, toy_task
    from sfd_jax.distributed import sharding
    from sfd_jax.training import fit, load_params
    sharding.MIN_ELEMENTS = 1
    index, count = jax.process_index(), jax.process_count()
    rows, end = 16 // count, int(os.environ.get("END", "6"))

    def batches(start):
        for step, batch in enumerate(toy_batches()(start), start + 1):
            if step == 3 and index == 1 and end > 6:
                os.kill(os.getpid(), signal.SIGTERM)
            yield {name: array[index * rows : (index + 1) * rows] for name, array in batch.items()}

    fit(toy_task(), batches, toy_config(steps=end, checkpoint_every=1000), os.environ["RUN"], mesh=make_mesh(2, 2),
        progress=False)
    params, _ = load_params(os.environ["RUN"])
    print("sum", float(params["hidden"]["kernel"].sum()), float(abs(params["hidden"]["kernel"]).sum()))
"""


@pytest.mark.slow
def test_two_processes_train_as_one_does(port, tmp_path):
    sums = []
    for count in (1, 2):
        for status, output in spawn(TRAIN, port, count, RUN=str(tmp_path / str(count))):
            assert status == 0, output
            line = next(line for line in output.splitlines() if line.startswith("sum"))
            sums.append([float(word) for word in line.split()[1:]])
    for other in sums[1:]:
        assert other == pytest.approx(sums[0], rel=1e-5)  # reductions cross the processes in another order


@pytest.mark.slow
def test_sigterm_at_one_process_stops_both_at_one_step(port, tmp_path):
    ends = spawn(TRAIN, port, 2, RUN=str(tmp_path), END="100000")
    assert [status for status, _ in ends] == [75, 75], ends
    steps = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    assert len(steps) == 1 and 3 <= int(steps[0]) < 100000
    assert f"step {steps[0]} is saved" in ends[0][1] and "is saved" not in ends[1][1]
