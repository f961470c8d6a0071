"""A run whose work folder is gs://, through the real clients of Google Cloud Storage and a stand-in for its server."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest

pytest.importorskip("gcsfs", reason="gs:// needs the extra `gcs`")

import stand_in_bucket  # noqa: E402
from toy_training import toy_batches, toy_config, toy_task  # noqa: E402

from sfd_jax.distributed import make_mesh  # noqa: E402
from sfd_jax.errors import SfdError  # noqa: E402
from sfd_jax.training import Checkpointer, fit, load_params  # noqa: E402
from sfd_jax.training.logging import read_metrics  # noqa: E402


@pytest.fixture(scope="module")
def bucket():
    with stand_in_bucket.serve() as (variables, bucket), pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield bucket


def train(workdir, config=None):
    mesh = make_mesh(devices=jax.devices()[:1])
    return jax.device_get(
        fit(toy_task(), toy_batches(), config or toy_config(), workdir, mesh=mesh, seed=3, progress=False)
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of six steps on a local disk."""
    folder = tmp_path_factory.mktemp("whole")
    return train(folder), [row["loss"] for row in read_metrics(folder)]


def check_same(state, workdir, whole):
    jax.tree.map(np.testing.assert_array_equal, whole[0], state)
    assert [row["loss"] for row in read_metrics(workdir)] == whole[1]
    jax.tree.map(np.testing.assert_array_equal, load_params(workdir)[0], state.ema_params)


@pytest.mark.slow
def test_a_run_resumes_from_a_bucket(bucket, whole):
    run = "gs://bucket/runs/a"
    train(run, toy_config(steps=4))
    check_same(train(run), run, whole)
    names = {name.removeprefix("runs/a/") for name in bucket.objects if name.startswith("runs/a/")}
    assert {"run.json", "metrics.jsonl", "heartbeats/process_00000.json"} <= names
    assert {name.split("/")[1] for name in names if name.startswith("checkpoints/")} == {"4", "6"}
    assert json.loads(bucket.objects["runs/a/heartbeats/process_00000.json"][0])["status"] == 0
    events = [bucket.objects[f"runs/a/{name}"][0] for name in names if name.startswith("tensorboard/")]
    assert len(events) == 2 and all(b"loss" in data for data in events)  # one of each start
    with pytest.raises(SfdError, match="belongs to another run(.|\n)*ema_decay: there 0.9, here 0.5"):
        train(run, toy_config(ema_decay=0.5))


def test_a_second_start_in_a_bucket_is_refused(bucket, whole, monkeypatch):
    monkeypatch.setattr("sfd_jax.distributed.lock.PERIOD", 0.2)
    run, refused = "gs://bucket/runs/twice", []
    names = ("metrics.jsonl", "run.json", "tensorboard")  # the rest is written in the background
    contents = lambda: {name: value for name, value in bucket.objects.items() if any(part in name for part in names)}

    def batches(start):
        for step, batch in enumerate(toy_batches()(start), start + 1):
            if step == 4:
                before = contents()
                with pytest.raises(SfdError, match=f"in use by process {os.getpid()} on"):
                    train(run)
                refused.append(contents() == before)
            yield batch

    mesh = make_mesh(devices=jax.devices()[:1])
    state = fit(toy_task(), batches, toy_config(), run, mesh=mesh, seed=3, progress=False)
    check_same(jax.device_get(state), run, whole)
    assert refused == [True] and "runs/twice/.lock" not in bucket.objects


def test_which_checkpoints_are_kept_in_a_bucket(bucket):
    from sfd_jax.training import init_state, make_optimizer

    config = toy_config()
    state = init_state(toy_task(), make_optimizer(config.optimizer, 1), make_mesh(devices=jax.devices()[:1]), seed=0)
    checkpointer = Checkpointer("gs://bucket/kept", keep_last=1, keep_every=2)
    for step in range(1, 6):
        checkpointer.save(step, state, {})
    checkpointer.wait()
    assert {name.split("/")[1] for name in bucket.objects if name.startswith("kept/")} == {"2", "4", "5"}


@pytest.mark.slow
def test_sigkill_during_a_save_to_a_bucket(bucket, whole):
    """Killed while step 4's arrays are uploaded: they are not a checkpoint, and the run resumes from step 2."""
    run, here = "gs://bucket/runs/killed", Path(__file__).parent
    script = f"""
        import os, signal, sys
        sys.path[:0] = [{str(here)!r}, {str(here.parents[1])!r}]
        import jax
        from toy_training import toy_batches, toy_config, toy_task
        from sfd_jax.distributed import make_mesh
        from sfd_jax.training import Checkpointer, fit
        save = Checkpointer.save
        def cut_short(self, step, *args):
            save(self, step, *args)
            if step == 4:
                os.kill(os.getpid(), signal.SIGKILL)
        Checkpointer.save = cut_short
        fit(toy_task(), toy_batches(), toy_config(), {run!r}, mesh=make_mesh(devices=jax.devices()[:1]), seed=3)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], env=os.environ, capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    started = {name.split("/")[3] for name in bucket.objects if name.startswith("runs/killed/checkpoints/")}
    assert load_params(run)[1]["step"] == 2 and started >= {"2"}
    if "4" in started:
        with pytest.raises(SfdError, match="no checkpoint of step 4; it has 2"):
            load_params(run, step=4)
    check_same(train(run), run, whole)


def test_a_bucket_without_its_client(monkeypatch):
    def as_fsspec_says(*_):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr("etils.epath.backend._FileSystemSpecBackend.fs", as_fsspec_says)
    with pytest.raises(SfdError, match="gs://bucket/runs/none cannot be used: Please install gcsfs"):
        train("gs://bucket/runs/none")
