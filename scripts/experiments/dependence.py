"""How much does each group of latents tell about the other: the error of each with and without the other, by time.

  python scripts/experiments/dependence.py --out=study_mnist [--cell=learned_s0]

Reads the probe that a cell with learned clocks has trained (offset.py), whose network knows all pairs of times, and
held-out latents. Where the texture's error is the same with clean and with equally noisy semantics, no offset can help.
Writes OUT/dependence.json, .md and .png.
"""

import argparse
import sys
from pathlib import Path

import report
from held_out import errors_at

from sfd_jax.cli.main import run_command
from sfd_jax.experiment.checkpoints import open_checkpoint
from sfd_jax.files import write_json, write_text

TIMES = (0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95)
# (label, group, times of semantics and texture where the group's own time is t)
CASES = (
    ("texture, semantics as noisy", "texture", lambda t: (t, t)),
    ("texture, semantics clean", "texture", lambda t: (1.0, t)),
    ("semantics, texture as noisy", "semantic", lambda t: (t, t)),
    ("semantics, texture is noise", "semantic", lambda t: (t, 0.0)),
)


def main(argv: list[str]) -> None:
    """Measure the errors of the cell's probe, and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the study")
    parser.add_argument("--cell", default="learned_s0", help="with a probe (default: %(default)s)")
    parser.add_argument("--held_out", help="latents (default: OUT/shared/latents_held_out)")
    args = parser.parse_args(argv)
    probe = open_checkpoint(args.out / "cells" / args.cell / "run" / "probe", "lightning_dit")
    latents = args.held_out or str(args.out / "shared" / "latents_held_out")
    places = sorted({times(t) for _, _, times in CASES for t in TIMES})
    errors = dict(zip(places, errors_at(probe, latents, places), strict=True))
    found = {label: [errors[times(t)][group] for t in TIMES] for label, group, times in CASES}
    rows = [f"| {label} | {' | '.join(f'{value:.3f}' for value in values)} |" for label, values in found.items()]
    head = f"| mean squared error of the velocity, own time | {' | '.join(f'{t:g}' for t in TIMES)} |"
    text = "\n".join([head, "|---" * (len(TIMES) + 1) + "|", *rows]) + "\n"
    write_json(args.out / "dependence.json", {"cell": args.cell, "times": TIMES, "errors": found})
    write_text(args.out / "dependence.md", text)
    with report.drawing(args.out / "dependence.png", 1) as [axis]:
        for label, values in found.items():
            axis.plot(TIMES, values, marker="o", label=label)
        axis.set(xlabel="the group's own time", ylabel="mean squared error", ylim=(0, None))
        axis.legend()
    print(text)


if __name__ == "__main__":
    sys.exit(run_command(main, "dependence", sys.argv[1:]))
