"""The studies of scripts/experiments: statistics with known answers, and a tiny study that is killed and continued."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

FOLDER = ("scripts", "experiments")


@pytest.fixture
def load(root, monkeypatch):
    """Import a module of scripts/experiments by name."""
    monkeypatch.syspath_prepend(root.joinpath(*FOLDER))
    return importlib.import_module


def records(scores):
    """Return records of a sweep from offset -> Frechet distances, one a seed."""
    return [
        {"cell": f"offset_{offset:g}", "seed": seed, "step": 8, "scores": {"frechet_distance": value}}
        for offset, values in scores.items()
        for seed, value in enumerate(values)
    ]


def test_intervals_are_student_s(load):
    report = load("report")
    mean, half = report.interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.302653 / 3**0.5, rel=1e-6)  # t(0.975, 2) by a table
    assert report.interval([5.0]) == (5.0, None)


@pytest.mark.parametrize(
    "theirs, error, answer", [([4, 6, 8], 1.290994, "yes"), ([2, 4, 6], 1.290994, "no"), ([9], None, "unknown")]
)
def test_lower_by_two_standard_errors(load, theirs, error, answer):
    found = load("report").lower([1, 2, 3], theirs)  # differences -4, -2, -7; errors (1/3 + 4/3)^0.5
    assert found["lower"] == answer and found["difference"] == 2 - sum(theirs) / len(theirs)
    assert found["standard_error"] == (error and pytest.approx(error, rel=1e-6))


@pytest.mark.parametrize(
    "scores, best, papers",
    [
        ({0: [9, 9.2], 0.2: [5, 5.2], 0.3: [7, 7.2], 1: [9, 9.2]}, "yes", "yes"),
        ({0: [5.3, 5.1], 0.2: [5, 5.2], 0.3: [7, 7.2], 1: [9, 9.2]}, "no", "no"),
        ({0: [9, 9.2], 0.2: [5, 5.2], 0.3: [8, 10], 1: [9, 9.2]}, "yes", "no"),
        ({0: [9], 0.2: [5], 0.3: [7], 1: [9]}, "unknown", "unknown"),
    ],
)
def test_verdict_of_the_sweep(load, scores, best, papers):
    answers = load("offset").verdict(records(scores))
    assert [each["answer"] for each in answers.values()] == [best, papers]
    assert list(answers)[0].startswith("the best interior offset, 0.2, ")


def test_steps_to_a_score(load):
    steps_to = load("convergence").steps_to
    curve = {100: (10.0, None), 200: (6.0, None), 300: (2.0, None)}
    assert [steps_to(curve, score) for score in (12, 10, 4, 1)] == [100, 100, 250, None]


def test_cells_change_only_what_they_name(load):
    study, base = load("study"), load("bench").load_config("configs/mnist.py:study").diffusion
    systems = {cell.name: cell.config(base, 7) for cell in (*load("parts").SYSTEMS, load("parts").PCA)}
    assert {config.seed for config in systems.values()} == {7}
    semantic = {name: config.latents.semantic_channels for name, config in systems.items()}
    assert semantic == {"plain": 0, "repa": 0, "synchronous": 8, "offset_0.3": 8, "pca": 8}
    assert [name for name, config in systems.items() if not config.loss.repa_weight] == ["plain"]
    clocks = {name: config.clocks.to_dict() for name, config in systems.items()}
    assert clocks["pca"] == clocks["offset_0.3"] == {"name": "fixed_offset", "delta_t": 0.3}
    assert clocks["synchronous"] == {"name": "synchronous"}
    ends = [study.Cell("x", "x", delta_t=end).config(base, 7) for end in (0.0, 1.0)]  # networks of a sweep are the same
    assert ends[0].model == ends[1].model == systems["offset_0.3"].model


@pytest.mark.slow
def test_a_killed_study_continues(root, quick, tmp_path):
    """Three of the seven offsets with one seed; the first process is killed while it trains the first."""
    config, out = "--config=configs/digits.py:study,tiny", tmp_path / "study"
    command = [sys.executable, root.joinpath(*FOLDER, "offset.py"), "--data=digits", config, f"--out={out}"]
    command += ["--seeds=0", "--cells=1/3"]
    how = {"cwd": root, "env": {**quick, "PYTHONPATH": str(root)}, "text": True}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **how)
    kept, deadline = out / "cells" / "offset_0_s0" / "run" / "checkpoints" / "2", time.monotonic() + 600
    while not kept.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert kept.exists(), process.stderr.read()[-2000:]
    process.stderr.close()
    assert not list(out.glob("cells/*/*.json"))

    done = subprocess.run(command, capture_output=True, **how)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "[texture_vae]" not in done.stdout and "[offset_0_s0]" in done.stdout
    result = json.loads((out / "offset.json").read_text())
    assert [(each["cell"], each["seed"], each["step"]) for each in result["cells"]] == [
        (f"offset_{offset}", 0, 4) for offset in ("0", "0.3", "1")
    ]
    for each in result["cells"]:
        assert all(np.isfinite(value) for value in each["scores"].values()) and len(each["scores"]) == 4
    assert [answer["answer"] for answer in result["verdict"].values()] == ["unknown", "unknown"]
    assert "| 0.3 | 1 | " in (out / "offset.md").read_text() and os.path.getsize(out / "offset.png") > 5000

    other = subprocess.run([*command, "--config.diffusion.loss.semantic_weight=3"], capture_output=True, **how)
    assert other.returncode == 2 and "loss.semantic_weight: there 2.0, here 3.0" in other.stderr
