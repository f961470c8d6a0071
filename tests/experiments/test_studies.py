"""The studies of scripts/experiments: statistics with known answers, and their cells.

tests/cli/test_demo.py runs a study.
"""

import argparse
import dataclasses
import importlib
import json

import pytest

from sfd_jax.errors import SfdError


@pytest.fixture
def load(root, monkeypatch):
    """Import a module of scripts/experiments by name."""
    monkeypatch.syspath_prepend(root / "scripts" / "experiments")
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


def test_results_of_another_configuration_are_refused(load, tmp_path):
    study, bench = load("study"), load("bench")
    base, cell = bench.load_config("configs/digits.py:study").diffusion, study.Cell("x", "x", delta_t=0.3)
    args, job = argparse.Namespace(out=tmp_path, guided=""), bench.SampleJob()
    shared = bench.Bench(base, {}, "", job, None, {"reference": "a"}, "", small=True)
    assert study.finished(args, shared, cell, 0, 400) is None
    path = tmp_path / "cells" / "x_s0" / "step_400.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"seed": 0, "about": study._about(shared, cell, 0)}))
    longer = base.copy_and_resolve_references().unlock()
    longer.train.steps = 800  # what a checkpoint at step 400 is does not depend on it
    assert study.finished(args, dataclasses.replace(shared, base=longer), cell, 0, 400)["seed"] == 0
    other = base.copy_and_resolve_references().unlock()
    other.loss.semantic_weight = 3.0
    for changed, says in ((dict(base=other), "semantic_weight: there 2.0, here 3.0"), (dict(about={}), "reference")):
        with pytest.raises(SfdError, match=says):
            study.finished(args, dataclasses.replace(shared, **changed), cell, 0, 400)


def few_step_records(scores):
    """Return records from cell -> (evaluations, Frechet distances, share classified as label, recall)."""
    names = ("frechet_distance", "ratio", "read_as_label", "recall")
    return [
        {"cell": cell, "evaluations": count, "seed": seed, "step": 0, "scores": dict(zip(names, each, strict=True))}
        for cell, (count, distances, read, recall) in scores.items()
        for seed, each in enumerate((distance, distance / 2, read, recall) for distance in distances)
    ]


def test_verdict_of_few_steps(load):
    found = load("few_step").verdict(
        few_step_records(
            {
                "teacher_dopri5": (62, [2, 2], 0.99, 0.6),
                "teacher_euler_2": (4, [3, 3], 1, 0.2),
                "unguided_ab2_4": (4, [2.1, 2.3], 1, 0.2),
                "student_4": (4, [2.0, 2.2], 0.99, 0.56),
                "student_2": (2, [2.4, 2.2], 0.98, 0.54),
            }
        )
    )
    answers = {name.removeprefix("NFE ").partition(": ")[::2]: each["answer"] for name, each in found.items()}
    assert answers.pop(("4", "at most 1.05 times the teacher's Frechet distance")) == "yes"  # 1.05, just
    assert answers.pop(("4", "below the teacher's solvers at equal evaluations")) == "yes"  # 2.1 < 2.2
    assert answers.pop(("2", "at most 1.10 times the teacher's Frechet distance")) == "no"
    assert list(answers.values()) == ["no", "no", "yes", "yes"]  # accuracy and recall
    half = found["NFE 4: at most 1.05 times the teacher's Frechet distance"]["half_interval"]
    assert half == pytest.approx(12.7062 * 0.05, rel=1e-4)  # t(0.975, 1) by a table


def test_the_teacher_s_evaluations_are_of_both_its_networks(load, tmp_path):
    few_step, demo = (
        load("few_step"),
        load("bench").stages.Demo(load("bench").load_config("configs/digits.py"), tmp_path),
    )
    cells = few_step.cells_of(demo, stages=3)
    assert cells[0].name == few_step.REFERENCE and cells[0].networks == 2 and cells[0].job.guidance == "autoguidance"
    equal = {cell.name for cell in cells if (cell.job.nfe or 0) * cell.networks == 4}
    assert equal == {"student_4", *(f"teacher_{way}" for way in ("ab2_2", "heun_2", "euler_2"))} | {
        f"unguided_{solver}_4" for solver in ("ab2", "heun", "euler")
    }
    assert {cell.job.mode for cell in cells if cell.name.endswith("euler_4")} == {"staged"}
    assert {cell.job.mode for cell in cells if cell.name.endswith("ab2_4")} == {"released"}  # staged needs six calls
    assert len({cell.name for cell in cells}) == len(cells)
