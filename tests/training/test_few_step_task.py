"""Few-step training: it starts as its teacher, takes no derivative in bfloat16, and refuses what does not fit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
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
from sfd_jax.experiment.few_step import start_from
from sfd_jax.latents import LatentLayout
from sfd_jax.models import Network
from sfd_jax.training import few_step, load_params, save_params
from sfd_jax.training.logging import read_metrics

DIT = dict(width=16, depth=1, num_heads=2, input_size=2, in_channels=5, num_classes=3)
LAYOUT = LatentLayout(3, 2)


def random_params(network, seed=0):
    """Return random weights: a fresh network returns zero."""
    leaves, tree = jax.tree.flatten(network.abstract_params())
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(tree, [rng.normal(0, 0.2, leaf.shape).astype(np.float32) for leaf in leaves])


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


def make_task(velocity="teacher", **changes):
    student, teacher = (Network("lightning_dit", DIT | more | changes) for more in ({"end_time": True}, {}))
    params = random_params(teacher)
    options = LossConfig(label_dropout=0.0, repa_weight=0.0), FewStepConfig(velocity=velocity)
    task = few_step.few_step_task(student, LAYOUT, FixedOffset(), *options, {"teacher": (teacher, params)})
    return task, start_from(student, params, 0)


def test_bf16_training_takes_its_derivative_in_float32_and_stays_finite(monkeypatch):
    task, params = make_task(compute_dtype="bfloat16")

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


def test_refusals_name_what_to_do(tmp_path, capsys):
    flags = ["--config=configs/sfd.py:xl,few_step,tiny", f"--workdir={tmp_path / 'run'}"]
    flags += [f"--config.data.path={make_store(tmp_path / 'latents')}", "--config.few_step.guidance=autoguidance"]
    assert run_command(main, "train", [*flags, "--init=elsewhere"]) == 2
    err = capsys.readouterr().err
    assert "--init has no effect here" in err and "--config.teacher=CKPT" in err and "--config.weak=CKPT" in err
    with pytest.raises(SfdError, match="data has no guidance"):
        FewStepConfig(velocity="data", guidance="cfg")


@pytest.mark.slow
def test_the_command_distils_resumes_and_samples(tmp_path, capsys):
    latents, config = make_store(tmp_path / "latents"), load_config("configs/sfd.py:xl,tiny")
    for name, seed in (("teacher", 1), ("weak", 2)):
        network = network_from_config(config, depth=1, repa_features=0, compute_dtype="float32")
        metadata = {**network.metadata(), "config": config.to_dict(), "step": 3}
        save_params(tmp_path / name, random_params(network, seed), metadata)
    flags = ["--config=configs/sfd.py:xl,few_step,tiny", f"--config.data.path={latents}"]
    flags += [f"--config.{name}={tmp_path / name}" for name in ("teacher", "weak")]
    train = functools.partial(run_command, main, "train")
    whole, parts = (f"--workdir={tmp_path / name}" for name in ("whole", "parts"))
    assert train([*flags, whole]) == 0
    assert "depth 1" in capsys.readouterr().out
    assert train([*flags, parts, "--config.train.steps=2"]) == 0 and train([*flags, parts]) == 0
    ours, theirs = load_params(tmp_path / "whole"), load_params(tmp_path / "parts")
    jax.tree.map(np.testing.assert_array_equal, ours[0], theirs[0])
    assert ours[1]["few_step"]["guidance"] == "autoguidance" and ours[1]["few_step"]["teacher"]["step"] == 3
    assert "error_length_q1" in read_metrics(tmp_path / "whole")[0]
