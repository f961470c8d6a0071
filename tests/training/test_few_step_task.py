"""Few-step training: it starts as its teacher, takes no derivative in bfloat16, and refuses what does not fit."""

import functools
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_train_command import make_store

from sfd_jax.cli.main import run_command
from sfd_jax.cli.train import main
from sfd_jax.diffusion.clocks import FixedOffset
from sfd_jax.diffusion.few_step import FewStepConfig
from sfd_jax.diffusion.losses import LossConfig
from sfd_jax.errors import SfdError
from sfd_jax.experiment.build import network_from_config
from sfd_jax.experiment.config_files import load_config
from sfd_jax.experiment.few_step import open_few_step, start_from
from sfd_jax.latents import LatentLayout
from sfd_jax.models import Network
from sfd_jax.training import few_step, load_params, save_params
from sfd_jax.training.logging import read_metrics

DIT = dict(width=16, depth=1, num_heads=2, input_size=2, in_channels=5, num_classes=3)
LAYOUT = LatentLayout(3, 2)


def random_params(network, seed=0, scale=0.2):
    """Return random weights: a fresh network returns zero."""
    leaves, tree = jax.tree.flatten(network.abstract_params())
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(tree, [rng.normal(0, scale, leaf.shape).astype(np.float32) for leaf in leaves])


def batch(scale=1.0):
    rng = np.random.default_rng(5)
    latents = np.float32(rng.normal(0, scale, (8, 2, 2, 5)))
    return {"latents": latents, "labels": np.int32(rng.integers(0, 3, 8)), "row_indices": jnp.arange(8)}


def test_the_student_starts_as_its_teacher_bit_for_bit():
    teacher = Network("lightning_dit", {**DIT, "repa_features": 4, "repa_depth": 1, "repa_width": 4})
    student = Network("lightning_dit", {**DIT, "end_time": True})
    params = random_params(teacher)
    started = start_from(student, params, seed=0)
    latents, labels = batch()["latents"], batch()["labels"]
    t, end = np.float32(np.random.default_rng(1).uniform(0, 1, (2, 2, 8)))
    ours = jax.jit(student.apply)(started, latents, *t, labels, tuple(end))
    assert np.std(ours) > 0.1
    np.testing.assert_array_equal(ours, jax.jit(teacher.apply)(params, latents, *t, labels))
    with pytest.raises(SfdError, match="set end_time"):
        jax.eval_shape(lambda: teacher.apply(params, latents, *t, labels, tuple(end)))


def make_task(scale=0.2, compute_dtype="float32", **config):
    student, teacher = (
        Network("lightning_dit", DIT | more | {"compute_dtype": compute_dtype}) for more in ({"end_time": True}, {})
    )
    params = random_params(teacher, scale=scale)
    options = LossConfig(label_dropout=0.0, repa_weight=0.0), FewStepConfig(**config)
    task = few_step.few_step_task(student, LAYOUT, FixedOffset(), *options, {"teacher": (teacher, params)})
    return task, start_from(student, params, 0)


def test_bf16_training_takes_its_derivative_in_float32_and_stays_finite(monkeypatch):
    task, params = make_task(scale=0.6, compute_dtype="bfloat16")  # large weights: the teacher's velocity is 9 to 20

    def spy(network, latents, velocity, at, *rest):
        times, ends = rest[0].times(at.tau), rest[0].times(at.rho)
        programs.append(str(jax.make_jaxpr(network)(latents, *times, ends)))
        return original(network, latents, velocity, at, *rest)

    programs, original = [], few_step.mean_target
    monkeypatch.setattr(few_step, "mean_target", spy)
    step = jax.jit(jax.value_and_grad(task.loss, has_aux=True))
    (loss, metrics), grads = step(params, batch(scale=1e3), jax.random.key(0), task.frozen)  # a stress: huge latents
    assert "bf16" not in programs[0] and "f32" in programs[0]
    assert np.isfinite(loss) and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    assert np.abs(grads["way_embed_texture"]["linear2"]["kernel"]).max() > 0
    counts = [float(metrics[f"error_length_q{q}"][1]) for q in range(1, 5)]
    assert sum(counts) == 8 and counts[0] < 8

    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(3e-3))
    update, state, errors = jax.jit(optimizer.update), optimizer.init(params), []
    for number in range(150):
        (loss, metrics), grads = step(params, batch(), jax.random.key(number), task.frozen)
        updates, state = update(grads, state)
        params = optax.apply_updates(params, updates)
        errors.append(float(metrics["error"][0]) / 8)
    assert np.isfinite(errors).all() and np.mean(errors[-30:]) < 0.5 * np.mean(errors[:30])


@pytest.mark.parametrize("source", [{"velocity": "data"}, {}, {"guidance": "cfg", "guidance_scale": 3.0}], ids=str)
def test_the_velocity_is_that_of_the_data_or_of_the_teacher(source, monkeypatch):
    task, params = make_task(**source)
    seen = []

    def loss(*given):
        task.loss(*given)
        return seen[-1]

    monkeypatch.setattr(few_step, "mean_target", lambda _, *given: seen.append(given[:3]) or given[1])
    rows = batch()
    latents, velocity, at = jax.jit(loss)(params, rows, jax.random.key(0), task.frozen)
    times = FixedOffset().times(at.tau)
    if "velocity" in source:
        left = 1 - LAYOUT.per_channel(times[1], times[0])[:, None, None]
        np.testing.assert_allclose(latents + left * velocity, rows["latents"], atol=1e-5)
        return
    teacher = jax.jit(functools.partial(Network("lightning_dit", DIT).apply, task.frozen["teacher"]))
    own, null = (teacher(latents, *times, labels) for labels in (rows["labels"], np.full(8, 3, np.int32)))
    assert np.abs(own - null).max() > 0.1
    np.testing.assert_allclose(velocity, null + 3 * (own - null) if source else own, rtol=1e-4, atol=1e-4)


def test_refusals_name_what_to_do(tmp_path, capsys):
    flags = ["--config=configs/sfd.py:xl,few_step,tiny", f"--workdir={tmp_path / 'run'}"]
    flags += [f"--config.data.path={make_store(tmp_path / 'latents')}", "--config.few_step.guidance=autoguidance"]
    assert run_command(main, "train", [*flags, "--init=elsewhere"]) == 2
    err = capsys.readouterr().err
    assert "--init has no effect here" in err and "--config.teacher=CKPT" in err and "--config.weak=CKPT" in err
    with pytest.raises(SfdError, match="data has no guidance"):
        FewStepConfig(velocity="data", guidance="cfg")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Latents, a teacher and a weaker model."""
    folder, config = tmp_path_factory.mktemp("few_step"), load_config("configs/sfd.py:xl,tiny")
    make_store(folder / "latents")
    for name, seed in (("teacher", 1), ("weak", 2)):
        network = network_from_config(config, depth=1, repa_features=0, compute_dtype="float32")
        metadata = {**network.metadata(), "config": config.to_dict(), "step": 3}
        save_params(folder / name, random_params(network, seed), metadata)
    return folder


def test_a_run_says_which_guidance_it_learns(folder):
    def recorded(*flags):
        given = [f"--config.data.path={folder / 'latents'}", f"--config.teacher={folder / 'teacher'}", *flags]
        return open_few_step(load_config("configs/sfd.py:xl,few_step,tiny", given)).metadata["few_step"]

    unguided, cfg = recorded(), recorded("--config.few_step.guidance=cfg", "--config.few_step.guidance_scale=2")
    assert (unguided["guidance"], unguided["guidance_scale"], "weak" in unguided) == ("none", 1.0, False)
    assert (cfg["guidance"], cfg["guidance_scale"]) == ("cfg", 2.0)
    assert recorded("--config.few_step.velocity=data")["velocity"] == "data"


@pytest.mark.slow
def test_the_command_distils_and_a_killed_run_continues_bit_for_bit(folder, tmp_path, capsys):
    flags = ["--config=configs/sfd.py:xl,few_step,tiny", f"--config.data.path={folder / 'latents'}"]
    flags += [f"--config.{name}={folder / name}" for name in ("teacher", "weak")]
    train = functools.partial(run_command, main, "train")
    whole, parts = (f"--workdir={tmp_path / name}" for name in ("whole", "parts"))
    assert train([*flags, whole]) == 0
    assert "depth 1" in capsys.readouterr().out
    script = f"""
        import os, signal, time
        from sfd_jax.cli.train import main
        from sfd_jax.data.pipeline import TrainBatches
        draw = TrainBatches.at
        def at(self, step):
            while step == 3:
                if os.path.exists({str(tmp_path / "parts" / "checkpoints" / "2" / "commit_success.txt")!r}):
                    os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(0.01)
            return draw(self, step)
        TrainBatches.at = at
        main({[*flags, parts]!r})
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert train([*flags, parts]) == 0
    assert "resuming from step 2 of 4" in capsys.readouterr().out
    ours, theirs = load_params(tmp_path / "whole"), load_params(tmp_path / "parts")
    jax.tree.map(np.testing.assert_array_equal, ours[0], theirs[0])
    assert ours[1]["few_step"]["guidance"] == "autoguidance" and ours[1]["few_step"]["teacher"]["step"] == 3
    assert "error_length_q1" in read_metrics(tmp_path / "whole")[0]
