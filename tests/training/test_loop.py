"""The loop: exact resume, kills, one run for each folder, and the files it writes."""

import dataclasses
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from toy_training import HIDDEN, INPUTS, OUTPUTS, toy_batches, toy_config, toy_task

from sfd_jax.distributed import make_mesh
from sfd_jax.errors import SfdError
from sfd_jax.experiment.run import Run, ideal_seconds
from sfd_jax.models.fingerprint import params_hash
from sfd_jax.pod import chips
from sfd_jax.training import EXIT_PREEMPTED, OptimizerConfig, Preempted, fit, load_params
from sfd_jax.training.logging import read_metrics
from sfd_jax.training.loop import check_workdir
from sfd_jax.training.optimizer import SCHEDULES, make_schedule


def train(workdir, config=None, batches=None, devices=1, seed=3, **kwargs):
    mesh = make_mesh(-1, 1, devices=jax.devices()[:devices])
    return fit(
        toy_task(),
        batches or toy_batches(),
        config or toy_config(),
        workdir,
        mesh=mesh,
        seed=seed,
        progress=False,
        **kwargs,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of six steps: its state and its folder."""
    folder = tmp_path_factory.mktemp("whole")
    return jax.device_get(train(folder)), folder


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def without_time(rows):
    return [{k: v for k, v in row.items() if k != "time" and not k.endswith("per_second")} for row in rows]


def test_resume_equals_an_uninterrupted_run(whole, tmp_path):
    state, folder = whole
    train(tmp_path, toy_config(steps=4))
    resumed = train(tmp_path)
    assert_same(state, resumed)
    assert without_time(read_metrics(tmp_path)) == without_time(read_metrics(folder))
    assert_same(resumed, train(tmp_path))  # finished: nothing is done


def test_the_average_may_be_kept_on_the_host(whole, tmp_path, monkeypatch):
    """It changes where the average's matrices are, and only rounding; a run may go on with it or without."""
    monkeypatch.setattr("sfd_jax.training.state.MIN_ELEMENTS", HIDDEN + 1)
    averages, there = [], toy_config(average_on_host=True)
    first = train(tmp_path, dataclasses.replace(there, steps=4))
    kinds = lambda tree: {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree) if leaf.ndim == 2}
    assert kinds(first.ema_params) == {"pinned_host"}
    assert kinds((first.params, first.opt_state, first.average())) == {"device"}
    shutil.copytree(tmp_path, tmp_path / "back")
    near = lambda a, b: jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), *jax.device_get((a, b))
    )

    def evaluate(state, step):
        averages.append(state.average())
        return {}

    resumed = train(tmp_path, there, evaluate=evaluate)
    assert kinds(resumed.ema_params) == {"pinned_host"} and kinds(averages) == {"device"}
    near(resumed, whole[0])
    assert_same(averages[-1], resumed.ema_params)
    back = train(tmp_path / "back")
    assert kinds(back.ema_params) == {"device"}
    near(back, whole[0])
    sharded = [train(tmp_path / str(on), toy_config(average_on_host=on), devices=4) for on in (True, False)]
    near(*sharded)


def test_sigkill_loses_nothing_saved(whole, tmp_path):
    """The process kills itself while drawing batch 6: steps 2 and 4 are saved, rows go up to 5."""
    here = Path(__file__).parent
    script = f"""
        import os, signal, sys
        sys.path[:0] = [{str(here)!r}, {str(here.parents[1])!r}]
        import jax
        from toy_training import HIDDEN, INPUTS, OUTPUTS, toy_batches, toy_config, toy_task
        from sfd_jax.distributed import make_mesh
        from sfd_jax.training import fit
        def batches(start):
            for step, batch in enumerate(toy_batches()(start), start + 1):
                if step == 6:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield batch
        fit(toy_task(), batches, toy_config(), {str(tmp_path)!r}, mesh=make_mesh(devices=jax.devices()[:1]), seed=3)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert read_metrics(tmp_path)[-1]["step"] == 5
    # The remains of a kill during a save and during a row.
    (tmp_path / "checkpoints" / "6.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    with pytest.raises(SfdError, match="no checkpoint of step 6"):
        load_params(tmp_path, step=6)
    state, folder = whole
    assert_same(state, train(tmp_path))
    assert without_time(read_metrics(tmp_path)) == without_time(read_metrics(folder))


def test_sigterm_saves_and_exits_with_status_75(whole, tmp_path):
    def batches(start):
        for step, batch in enumerate(toy_batches()(start), start + 1):
            if step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted) as left:
        train(tmp_path, batches=batches)
    assert left.value.code == EXIT_PREEMPTED == 75
    assert signal.getsignal(signal.SIGTERM) is before
    assert load_params(tmp_path)[1]["step"] == 3
    assert_same(whole[0], train(tmp_path))


def test_sigterm_that_stops_the_loader_too(whole, tmp_path):
    """A machine that shuts down signals all processes: the loader stops before the step is done."""

    def batches(start):
        for step, batch in enumerate(toy_batches()(start), start + 1):
            if step == 3 and start == 0:
                os.kill(os.getpid(), signal.SIGTERM)
                raise RuntimeError("worker process was terminated")
            yield batch

    with pytest.raises(Preempted):
        train(tmp_path, batches=batches)
    assert load_params(tmp_path)[1]["step"] == 3
    assert_same(whole[0], train(tmp_path))
    with pytest.raises(RuntimeError, match="broken for another reason"):
        train(tmp_path / "other", batches=lambda start: _broken())


def _broken():
    raise RuntimeError("broken for another reason")
    yield


def test_resume_on_another_mesh(whole, tmp_path):
    train(tmp_path, toy_config(steps=4))
    state = train(tmp_path, devices=8)
    # Two of six steps reduce in another order: float32 rounding.
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, whole[0], jax.device_get(state))


def test_a_new_run_starts_from_given_parameters(whole, tmp_path):
    state, folder = whole
    params, _ = load_params(folder, which="raw")
    still = dataclasses.replace(toy_config(steps=1), optimizer=OptimizerConfig(learning_rate=1e-30))
    started = train(tmp_path, still, params=params)
    assert_same(state.params, started.params)
    # d p + (1 - d) p is p to the last bit only where the two products are not rounded separately.
    jax.tree.map(np.testing.assert_array_max_ulp, jax.device_get(state.params), jax.device_get(started.ema_params))
    # Their hash is part of the run, which does not need them again after its first checkpoint.
    assert (
        load_params(tmp_path)[1]["init"]
        == json.loads((tmp_path / "run.json").read_text())["init"]
        == params_hash(params)
    )
    assert_same(started, train(tmp_path, still, params=params))
    assert_same(started, train(tmp_path, still))
    assert load_params(tmp_path)[1]["init"] == params_hash(params)
    other = jax.tree.map(lambda x: 0 * x, params)
    with pytest.raises(SfdError, match='init: there ".*, here "'):
        train(tmp_path, still, params=other)
    with pytest.raises(SfdError, match='init: there null, here "'):
        train(folder, params=params)
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(SfdError, match="give the same --init again"):
        train(tmp_path, still)


def test_a_record_without_hashes_and_a_missing_one(whole, tmp_path):
    train(tmp_path, toy_config(steps=4))
    record = json.loads((tmp_path / "run.json").read_text())
    del record["init"]
    (tmp_path / "run.json").write_text(json.dumps(record))
    assert_same(whole[0], train(tmp_path, params=load_params(whole[1], which="raw")[0]))
    (tmp_path / "run.json").unlink()
    with pytest.raises(SfdError, match="holds checkpoints but no run.json"):
        train(tmp_path)


def test_memory_settings_and_paths_of_data_may_change(tmp_path):
    metadata = {
        "network_config": {"width": 8, "remat": "none", "scan_blocks": None},
        "data_hash": "a",
        "config": {"model": {"remat": "auto"}, "mesh": {"fsdp": 1}, "data": {"path": "here", "images": {"path": ""}}},
    }
    changed = {
        "network_config": {"width": 8, "remat": "full", "scan_blocks": False},
        "data_hash": "a",
        "config": {"model": {"remat": "full"}, "mesh": {"fsdp": 2}, "data": {"path": "there", "images": {"path": "x"}}},
    }
    train(tmp_path, toy_config(steps=2), metadata=metadata)
    train(tmp_path, toy_config(steps=4, accumulation=2), metadata=changed)
    with pytest.raises(SfdError, match='data_hash: there "a", here "b"'):
        train(tmp_path, metadata={**metadata, "data_hash": "b"})
    with pytest.raises(SfdError, match="network_config.width: there 8, here 16"):
        train(tmp_path, metadata={**metadata, "network_config": {"width": 16}})
    with pytest.raises(SfdError, match="fit.global_batch_size: there 16, here 8"):
        train(tmp_path, toy_config(global_batch_size=8), metadata=metadata)


def test_too_many_bad_steps_stop_the_run_and_name_the_step(tmp_path):
    with pytest.raises(SfdError, match="not finite in 2 steps in a row, from step 4 on.*checkpoint is of step 4"):
        train(tmp_path, toy_config(max_bad_steps=2, log_every=6, steps=9), toy_batches(bad_steps=(4, 5)))
    assert load_params(tmp_path)[1]["step"] == 4


def test_bad_steps_are_counted_in_the_rows(tmp_path):
    state = train(tmp_path, toy_config(log_every=6, checkpoint_every=6), toy_batches(bad_steps=(2, 4)))
    (row,) = read_metrics(tmp_path)
    assert row["skipped"] == pytest.approx(2 / 6) and np.isfinite(row["loss"])
    assert int(state.skipped) == 2


def test_another_run_may_not_use_the_folder(whole):
    _, folder = whole
    with pytest.raises(SfdError, match=r"belongs to another run(.|\n)*fit.ema_decay: there 0.9, here 0.5"):
        train(folder, toy_config(ema_decay=0.5))
    with pytest.raises(SfdError, match="seed: there 3, here 4"):
        train(folder, seed=4)
    assert json.loads((folder / "run.json").read_text())["fit"]["ema_decay"] == 0.9
    train(folder, toy_config(log_every=5, keep_last=1))  # these may change


def test_a_second_start_is_refused_and_touches_nothing(whole, tmp_path):
    """From within the run's own loop, with one checkpoint and another being saved."""
    seen = []

    def batches(start):
        for step, batch in enumerate(toy_batches()(start), start + 1):
            if step == 4:
                leftover = tmp_path / "checkpoints" / "9.orbax-checkpoint-tmp"  # what a clean-up would remove
                leftover.mkdir()
                before = listing(tmp_path)
                with pytest.raises(SfdError, match=f"in use by process {os.getpid()} on"):
                    train(tmp_path)
                seen.append(listing(tmp_path) == before)
                leftover.rmdir()  # fails where it is gone
            yield batch

    assert_same(whole[0], train(tmp_path, batches=batches))
    assert seen == [True]
    assert without_time(read_metrics(tmp_path)) == without_time(read_metrics(whole[1]))


def listing(folder):
    """Files that do not change for a moment: checkpoints and heartbeats are written in the background."""
    parts = (folder, folder / "tensorboard")
    files = [file for part in parts for file in part.iterdir() if file.name not in ("checkpoints", "heartbeats")]
    return {str(file): file.stat().st_mtime_ns for file in files}


def test_steps_may_change_only_if_the_schedule_does_not_depend_on_them(tmp_path):
    config = toy_config(steps=2)
    falling = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, schedule="cosine"))
    train(tmp_path, falling)
    with pytest.raises(SfdError, match=f"cannot be made longer or shorter(.|\n)*--init={tmp_path} with another"):
        train(tmp_path, dataclasses.replace(falling, steps=6))
    with pytest.raises(SfdError, match=r"fit.ema_decay: there 0.9, here 0.5(.|\n)*fit.steps: there 2, here 6"):
        train(tmp_path, dataclasses.replace(falling, steps=6, ema_decay=0.5))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_run_may_be_extended_where_its_learning_rates_stay_what_they_were(schedule):
    """Two lengths of a run have the same rates up to the end of the shorter one, or it may not be extended."""
    config = OptimizerConfig(
        learning_rate=1.0, schedule=schedule, warmup_steps=3, constant_steps=4 * (schedule != "constant")
    )
    rates = [[float(make_schedule(config, length)(step)) for step in range(10)] for length in (10, 20)]
    assert config.may_extend == (rates[0] == rates[1])


def test_a_run_with_warm_up_goes_on_for_more_steps(tmp_path, capsys):
    config = toy_config(steps=6)
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, warmup_steps=4))
    whole = train(tmp_path / "whole", config)
    train(tmp_path / "longer", dataclasses.replace(config, steps=2))
    assert_same(whole, train(tmp_path / "longer", config))
    capsys.readouterr()
    shorter = dataclasses.replace(config, steps=2)
    train(tmp_path / "longer", shorter)
    left = "has done 6 steps, so train.steps=2 is already reached"
    assert left in capsys.readouterr().out
    assert check_workdir(toy_task(), shorter, tmp_path / "longer", seed=3) == [f"{tmp_path / 'longer'} {left}"]
    for steps, folder in ((7, "longer"), (6, "new")):
        assert not check_workdir(toy_task(), dataclasses.replace(config, steps=steps), tmp_path / folder, seed=3)


def test_batch_of_the_wrong_size(tmp_path):
    with pytest.raises(SfdError, match=r"batch\['x'\] has 8 rows.*makes 16"):
        train(tmp_path, batches=toy_batches(rows=8))


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(SfdError, match="work folder .* cannot be used"):
        train(tmp_path / "file" / "run")


def test_metadata_evaluation_tensorboard_and_profile(tmp_path):
    metadata = {"config": {"model": {"size": "S"}}, "latent_statistics": None, "class_names": ["a", "b"]}
    watch = {"evaluate": lambda state, step: {"held_out": 10.0 * step}, "ideal_seconds": 1e-3, "profile": (2, 2)}
    train(tmp_path, config := toy_config(steps=2, log_every=1), metadata=metadata, **watch)
    row = read_metrics(tmp_path)[-1]
    assert row["held_out"] == 20.0 and row["mfu"] == pytest.approx(row["steps_per_second"] * 1e-3)
    assert row["images_per_second"] == pytest.approx(row["steps_per_second"] * config.global_batch_size)
    (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
    assert b"jit_step" in trace.read_bytes()
    _, stored = load_params(tmp_path)
    assert stored["class_names"] == ["a", "b"] and stored["task"] == "toy" and stored["step"] == 2
    with pytest.raises(SfdError, match='config.model.size: there "S", here "B"'):
        train(tmp_path, metadata={**metadata, "config": {"model": {"size": "B"}}})

    events = tensorboard_scalars(tmp_path / "tensorboard")
    rows = {row["step"]: row for row in read_metrics(tmp_path)}
    assert events["held_out"] == {2: 20.0}
    assert events["loss"] == pytest.approx({step: row["loss"] for step, row in rows.items()})  # float32


def test_the_ideal_time_of_a_step_counts_its_products_at_the_peak_rate(monkeypatch):
    assert chips.peak_rate("TPU v5 lite") == 197e12 and chips.peak_rate("TPU v5") == 459e12
    assert chips.peak_rate("NVIDIA H100 80GB HBM3") == 989e12 and chips.peak_rate("cpu") is None
    run = Run(toy_task(), config := toy_config(), None, None, None, {})
    batch, mesh = next(toy_batches()(0)), make_mesh(devices=jax.devices()[:2])
    assert ideal_seconds(run, batch, mesh) is None
    monkeypatch.setattr(chips, "peak_rate", lambda kind: 1e6)
    # Outputs and gradients of both kernels, and the gradient of what is between them.
    products = 2 * config.global_batch_size * HIDDEN * (2 * INPUTS + 3 * OUTPUTS)
    assert ideal_seconds(run, batch, mesh) == pytest.approx(products / 2e6)


def test_weights_and_biases_gets_the_rows_and_goes_on_with_its_run(tmp_path, monkeypatch):
    config = toy_config(steps=2, log_every=1, wandb="digits")
    with pytest.raises(SfdError, match="train.wandb=digits needs the package wandb"):
        train(tmp_path, config)
    assert not list(tmp_path.iterdir())
    began, logged = [], []
    run = types.SimpleNamespace(log=lambda row, step: logged.append((step, row["loss"])), finish=lambda: None)
    init = lambda **about: began.append(about) or run
    monkeypatch.setitem(sys.modules, "wandb", stub := types.ModuleType("wandb"))
    stub.init, stub.__spec__ = init, True
    train(tmp_path, config, metadata={"config": {"seed": 3}})
    train(tmp_path, dataclasses.replace(config, steps=3, wandb="other"), metadata={"config": {"seed": 3}})
    assert began[0]["id"] == began[1]["id"] and len(began[0]["id"]) == 8 and began[1]["project"] == "other"
    assert began[0]["config"] == {"seed": 3} and began[0]["resume"] == "allow"
    assert logged == [(row["step"], row["loss"]) for row in read_metrics(tmp_path)]


def tensorboard_scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Read event files as TensorBoard does: records of length, checksum, bytes, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    scalars = {}
    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            for value in event.summary.value:
                scalars.setdefault(value.tag, {})[event.step] = value.simple_value
    return scalars


def test_an_ema_too_slow_for_the_run_is_noted_if_it_starts_from_random_weights(tmp_path, capsys):
    config, params = toy_config(steps=2), toy_task().init(jax.random.key(0))
    train(tmp_path / "drawn", config)
    assert "note: train.ema_decay=0.9 is too large for 2 steps" in (out := capsys.readouterr().out)
    assert "still hold 81.0% of the initial ones. Set train.ema_decay=0.1 " in out
    train(tmp_path / "given", config, params=params)
    train(tmp_path / "short", dataclasses.replace(config, ema_decay=0.1))
    assert "note:" not in capsys.readouterr().out
    found = {name: load_params(tmp_path / name)[1]["average"] for name in ("drawn", "given")}
    assert found == {"drawn": {"decay": 0.9, "from": "drawn weights"}, "given": {"decay": 0.9, "from": "given weights"}}
