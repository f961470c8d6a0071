"""Few network evaluations: students of a finished demo's model beside the model itself with every solver.

  python scripts/experiments/few_step.py --model=demo_out --out=study_few_step [--seeds=0,1,2]

The teacher is the demo's model with the demo's guidance; it is the same for all seeds. Seed s is `config.seed` of a
student, which decides its new weights, the order of the data, and the noise and intervals of its training. It is also
the seed of the noise that all samplers start from: ratios to the teacher's score compare equal noise and labels. A
teacher with guidance counts two network evaluations a call, of both its networks or of one with two labels.

OUT/seed_S/student     the training run of a student
OUT/seed_S/NAME.json   the scores of a sampler
OUT/few_step.json, .md, .png

The same command continues after a kill. `--config.KEY=VALUE` changes the students' training.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import report
from bench import Score, scorer_of
from ml_collections import ConfigDict
from study import parse_with_config, read_cell

from sfd_jax.cli.main import run_command
from sfd_jax.diffusion.sample_config import SampleJob
from sfd_jax.errors import SfdError
from sfd_jax.evaluation.image_sets import image_set_of
from sfd_jax.experiment.checkpoints import open_checkpoint
from sfd_jax.experiment.config_files import load_config
from sfd_jax.experiment.demo.record import read_record
from sfd_jax.experiment.demo.stages import Demo
from sfd_jax.experiment.few_step import open_few_step
from sfd_jax.experiment.run import train
from sfd_jax.files import write_json
from sfd_jax.generation import Sampler, make_sampler
from sfd_jax.generation.labels import balanced_labels
from sfd_jax.generation.parts import clocks_of
from sfd_jax.models.fingerprint import params_hash
from sfd_jax.training.record import FREE_GROUPS, FREE_KEYS

TRAINING = ("train.steps=300", "train.global_batch_size=64", "train.ema_decay=0.983", "optimizer.schedule=cosine")
TRAINING += ("model.scan_blocks=True",)
STEPS = (1, 2, 3, 4, 6, 8)
# Calls of the teacher, with guidance and without, for equal network evaluations.
GUIDED = {"ab2": (2, 4), "heun": (2, 4), "euler": (2, 4)}
UNGUIDED = {"ab2": (4,), "heun": (4,), "euler": (1, 2, 4)}
TARGETS = {4: 1.05, 2: 1.10, 1: 1.20}  # steps -> largest Frechet distance, as a multiple of the teacher's
REFERENCE = "teacher_dopri5"


@dataclasses.dataclass(frozen=True)
class Cell:
    """A sampler: name of its files, label, curve in the plot, settings, and networks evaluated in a call."""

    name: str
    label: str
    curve: str
    job: SampleJob
    networks: int = 1


def cells_of(demo: Demo, stages: int) -> list[Cell]:
    """Return the samplers; few calls of the teacher take the released grid, whose steps cross `stages`."""
    group, guided = demo.config.sample.to_dict(), demo.config.sample.guidance != "none"
    unguided = {**group, "guidance": "none", "guidance_scale": 1.0}
    found = [Cell(REFERENCE, "teacher, dopri5", "teacher, dopri5", SampleJob.from_group(group), 1 + guided)]
    for steps in STEPS:
        job = SampleJob.from_group({**unguided, "solver": "few_step", "nfe": steps})
        found.append(Cell(f"student_{steps}", f"student, {steps} steps", "student", job))
    kinds = [("teacher", group, GUIDED, 1 + guided)] if guided else []
    for kind, settings, budgets, networks in [*kinds, ("teacher without guidance", unguided, UNGUIDED, 1)]:
        for solver, budget in budgets.items():
            for calls in budget:
                mode = "staged" if calls >= stages * (1 if solver == "euler" else 2) else "released"
                job = SampleJob.from_group({**settings, "solver": solver, "mode": mode, "nfe": calls})
                curve, grid = f"{kind}, {solver}", ", released grid" if mode == "released" else ""
                name = f"{kind.replace('teacher without guidance', 'unguided')}_{solver}_{calls}"
                found.append(Cell(name, f"{curve}, {calls} calls{grid}", curve, job, networks))
    return found


def main(argv: list[str]) -> None:
    """Train and score what is missing, and write what is finished."""
    args = parse(argv)
    record = read_record(args.model)
    if not (record and "weak" in record["stages"]):
        raise SfdError(f"--model={args.model} is no finished demo: give the work folder of `sfd demo`")
    demo = Demo(ConfigDict(record["config"]), args.model)
    opened = {name: demo.open(name).weights for name in ("diffusion", "weak", "texture_vae")}
    cells = cells_of(demo, len(clocks_of(opened["diffusion"][1]).edges) - 1)
    score, about = scorer_of(demo, cells[0].job)
    about |= {name: params_hash(params) for name, (params, _) in opened.items()}
    configs, students, records = {seed: student_config(args, demo, seed) for seed in args.seeds}, {}, []
    for cell in cells:
        few, sampler = cell.job.solver == "few_step", None
        weak = opened["weak"] if cell.job.guidance == "autoguidance" else None
        for seed, config in configs.items():
            path, what = args.out / f"seed_{seed}" / f"{cell.name}.json", about_cell(cell, config, about)
            found = read_cell(path, what)
            if not found and (cell.name in args.samplers or not args.samplers):
                if few and seed not in students:
                    students[seed] = train_student(config, path.with_name("student"))
                if few or not sampler:
                    model = students[seed] if few else opened["diffusion"]
                    sampler = make_sampler(model, opened["texture_vae"], cell.job, weak=weak)
                sampler.seed = seed
                found = {**measure(cell, sampler, score), "seed": seed, "about": what}
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(path, found)
                print(f"[seed {seed}] {cell.label}: {found['scores']}", flush=True)
            records += [found] if found else []
    finish(args, cells, records)


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.allow_abbrev = False
    flag = parser.add_argument
    flag("--model", type=Path, required=True, help="work folder of a finished demo")
    flag("--out", type=Path, required=True, help="folder of the study")
    flag("--config", default="configs/sfd.py:small,few_step", help="of the students (default: %(default)s)")
    flag("--seeds", default="0,1,2", help="default: %(default)s")
    flag("--samplers", type=lambda names: names.split(","), default=[], help="only these, by the names of their files")
    args = parse_with_config(parser, argv)
    args.guided = ""
    args.model, args.out = args.model.absolute(), args.out.absolute()
    return args


def student_config(args: argparse.Namespace, demo: Demo, seed: int) -> ConfigDict:
    """Return the config of a student: the teacher's guidance is the demo's."""
    sample, path = demo.config.sample, lambda name: demo.workdir / name
    given = [*TRAINING, f"seed={seed}", f"teacher={path('diffusion')}", f"data.path={path('latents')}"]
    given += [f"data.flips={demo.flips}", f"few_step.guidance={sample.guidance}"]
    given += [f"few_step.guidance_scale={sample.guidance_scale}"] if sample.guidance != "none" else []
    given += [f"weak={path('weak')}"] if sample.guidance == "autoguidance" else []
    return load_config(args.config, [*(f"--config.{each}" for each in given), *args.overrides])


def about_cell(cell: Cell, config: ConfigDict, about: dict) -> dict:
    """Return all that decides the scores of a sampler besides the seed of its noise."""
    student = None
    if cell.job.solver == "few_step":
        student = {k: v for k, v in config.to_dict().items() if k not in (*FREE_GROUPS, "data", "teacher", "weak")}
        student["train"] = {name: value for name, value in student["train"].items() if name not in FREE_KEYS}
    return {**about, "sample": dataclasses.asdict(cell.job), "student": student}


def train_student(config: ConfigDict, folder: Path) -> tuple[dict, dict]:
    """Train a student, or what is left of it, and return its weights."""
    train(dataclasses.replace(open_few_step(config), cache=True), str(folder), table=False)
    return open_checkpoint(folder, "lightning_dit").weights


def measure(cell: Cell, sampler: Sampler, score: Score) -> dict:
    """Make a sampler's images and return the record of their scores."""
    start = time.monotonic()
    labels = balanced_labels(cell.job.num, sampler.num_classes)
    images, nfe = sampler(np.arange(len(labels)), labels, cell.job.batch_size)
    scores = score(image_set_of("samples", images), labels)
    record = {"cell": cell.name, "label": cell.label, "curve": cell.curve, "step": 0, "scores": scores}
    return record | {"evaluations": float(nfe.mean()) * cell.networks, "seconds": round(time.monotonic() - start, 1)}


def finish(args: argparse.Namespace, cells: list[Cell], records: list[dict]) -> None:
    """Write table, verdict and plot."""
    teacher = {record["seed"]: record["scores"] for record in records if record["cell"] == REFERENCE}
    for record in records:
        record["scores"]["ratio"] = record["scores"][report.FRECHET] / teacher[record["seed"]][report.FRECHET]
    evaluations = {r["cell"]: f"{r['evaluations']:g}" for r in records}
    labels = {cell.name: f"{cell.label} ({evaluations[cell.name]})" for cell in cells if cell.name in evaluations}
    report.finish(args, "few_step", records, labels, verdict(records))
    draw(args, records)


def verdict(records: list[dict]) -> dict:
    """Say whether the means reach the targets, with what they are."""
    answers, mean = {}, lambda cell, score: statistics.mean(report.scores_of(records, cell, score))
    present = {record["cell"]: record["evaluations"] for record in records}
    yes = lambda met, **values: {"answer": "yes" if met else "no", **values}
    for steps in (steps for steps in STEPS if f"student_{steps}" in present):
        student = f"student_{steps}"
        ratio, half = report.interval(report.scores_of(records, student, "ratio"))
        if most := TARGETS.get(steps):
            at_most = f"NFE {steps}: at most {most:.2f} times the teacher's Frechet distance"
            answers[at_most] = yes(ratio <= most, ratio=ratio, **({"half_interval": half} if half else {}))
        equal = {each: mean(each, report.FRECHET) for each, count in present.items() if count == steps}
        if (ours := equal.pop(student)) and equal:
            best = min(equal, key=equal.get)
            below = f"NFE {steps}: below the teacher's solvers at equal evaluations"
            answers[below] = yes(ours < equal[best], ours=ours, theirs=equal[best], sampler=best)
        for score, margin in (("read_as_label", 0.0), ("recall", 0.05)):
            if report.scores_of(records, student, score):
                ours, theirs = mean(student, score), mean(REFERENCE, score)
                name = f"NFE {steps}: {report.SCORES[score]} at most {margin:g} below the teacher's"
                answers[name] = yes(ours >= theirs - margin, ours=ours, theirs=theirs)
    return answers


def draw(args: argparse.Namespace, records: list[dict]) -> None:
    """Draw scores against network evaluations."""
    with report.figure(args, "few_step", records, (report.FRECHET, "recall")) as axes:
        for score, axis in axes.items():
            for curve in dict.fromkeys(record["curve"] for record in records):
                cells = {r["evaluations"]: r["cell"] for r in records if r["curve"] == curve}
                counts, means, halves = report.points(records, dict(sorted(cells.items())), score)
                style = "--" if "without" in curve else "-"
                axis.errorbar(counts, means, yerr=halves, marker="o", ms=4, capsize=2, linestyle=style, label=curve)
            axis.set(xlabel="network evaluations", ylabel=report.SCORES[score], xscale="log")
            ticks = sorted({record["evaluations"] for record in records})
            axis.set_xticks(ticks, [f"{count:g}" for count in ticks])
            axis.minorticks_off()
        axes[report.FRECHET].set_yscale("log")
        axes[report.FRECHET].legend(fontsize=7)


if __name__ == "__main__":
    sys.exit(run_command(main, "few_step", sys.argv[1:]))
