"""How many steps does each system need: scores against training steps, for the first four systems of parts.py.

  python scripts/experiments/convergence.py --data=mnist --out=study_mnist [--seeds=0,1,2]

Scores every checkpoint that the config keeps (train.keep_every) of the same runs that parts.py trains. The learning
rate should be constant, so that a checkpoint is what a shorter run would have ended with. Flags as for offset.py.
"""

import sys

import numpy as np
import report
import study
from parts import SYSTEMS

from sfd_jax.cli.main import run_command


def main(argv: list[str]) -> None:
    """Run the systems, score their checkpoints, and write what is finished."""
    args = study.parse(__doc__, argv)
    if records := study.run(args, SYSTEMS, every=True):
        cells = {cell.name: cell.label for cell in SYSTEMS}
        report.finish(args, "convergence", records, cells, verdict(records))
        draw(args, records)


def curve(records: list[dict], cell: study.Cell) -> dict[int, tuple[float, float | None]]:
    """Return step -> mean and half-width of the Frechet distance."""
    steps = sorted({record["step"] for record in records})
    of = {step: report.scores_of(records, cell.name, step=step) for step in steps}
    return {step: report.interval(values) for step, values in of.items() if values}


def steps_to(points: dict[int, tuple[float, float | None]], score: float) -> float | None:
    """Return at how many steps the mean first reaches a score, between two checkpoints by straight lines."""
    steps, means = list(points), [mean for mean, _ in points.values()]
    for i, mean in enumerate(means):
        if mean <= score:
            return float(steps[i]) if i == 0 else float(np.interp(-score, [-means[i - 1], -mean], steps[i - 1 : i + 1]))
    return None


def verdict(records: list[dict]) -> dict:
    """Say how many steps each system needs to reach what each ends with; None: more than it was trained."""
    curves = {cell.label: points for cell in SYSTEMS if (points := curve(records, cell))}
    ends = {label: list(points.values())[-1][0] for label, points in curves.items()}
    return {
        f"steps to the Frechet distance {end:.2f}, where '{label}' ends": {
            name: steps_to(points, end) for name, points in curves.items()
        }
        for label, end in ends.items()
    }


def draw(args, records: list[dict]) -> None:
    """Draw the Frechet distance against steps."""
    with report.figure(args, "convergence", records, (report.FRECHET,)) as axes:
        axis = axes[report.FRECHET]
        for cell in SYSTEMS:
            if points := curve(records, cell):
                means, halves = [mean for mean, _ in points.values()], [half or 0 for _, half in points.values()]
                axis.errorbar(list(points), means, yerr=halves, marker="o", capsize=3, label=cell.label)
        axis.set(xlabel="training steps", ylabel="Frechet distance", yscale="log")
        axis.legend()


if __name__ == "__main__":
    sys.exit(run_command(main, "convergence", sys.argv[1:]))
