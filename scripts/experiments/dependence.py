"""How much does each group of latents tell about the other: the error of each with and without the other, by time.

  python scripts/experiments/dependence.py --out=study_mnist [--cell=learned_s0]

Reads the probe that a cell with learned clocks has trained (offset.py), whose network knows all pairs of times, and
held-out latents. Where the texture's error is the same with clean and with equally noisy semantics, no offset can help.
The same network's corrected loss of fixed offsets and of the curve that it has learned says whether that curve is its
minimum, up to the probe's small weight of the kinetic energy. Writes OUT/dependence.json, .md and .png.
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

import report
from held_out import errors_at, held_out_loss
from offset import OFFSETS

from sfd_jax.cli.main import run_command
from sfd_jax.diffusion.clocks import make_clocks
from sfd_jax.diffusion.learned_clocks import Learned
from sfd_jax.experiment.checkpoints import open_checkpoint
from sfd_jax.experiment.learned_clocks import read_learned_clocks
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
    run = args.out / "cells" / args.cell / "run"
    probe = open_checkpoint(run / "probe", "lightning_dit")
    latents = args.held_out or str(args.out / "shared" / "latents_held_out")
    places = sorted({times(t) for _, _, times in CASES for t in TIMES})
    errors = dict(zip(places, errors_at(probe, latents, places), strict=True))
    found = {label: [errors[times(t)][group] for t in TIMES] for label, group, times in CASES}
    learned = make_clocks(read_learned_clocks(str(run))["clocks"])
    curves = {f"offset {d:g}": Learned(d, d, energy_ratio=learned.energy_ratio) for d in OFFSETS} | {"learned": learned}
    energies = [float(each.curve.kinetic_energy(each.energy_ratio)) for each in curves.values()]
    losses = [held_out_loss(probe, latents, 500, each) for each in curves.values()]
    curves = {
        "corrected loss": dict(zip(curves, losses, strict=True)),
        "kinetic energy": dict(zip(curves, energies, strict=True)),
    }
    text = table("mean squared error of the velocity, own time", TIMES, found)
    text += "\n" + table("curve", curves["corrected loss"], {name: each.values() for name, each in curves.items()})
    write_json(args.out / "dependence.json", {"cell": args.cell, "times": TIMES, "errors": found, "curves": curves})
    write_text(args.out / "dependence.md", text)
    with report.drawing(args.out / "dependence.png", 1) as [axis]:
        for label, values in found.items():
            axis.plot(TIMES, values, marker="o", label=label)
        axis.set(xlabel="the group's own time", ylabel="mean squared error", ylim=(0, None))
        axis.legend()
    print(text)


def table(name: str, columns: Iterable, rows: dict[str, Iterable[float]]) -> str:
    """Return a Markdown table of numbers."""
    lines = [f"| {label} | {' | '.join(f'{value:.3f}' for value in values)} |" for label, values in rows.items()]
    head = f"| {name} | {' | '.join(f'{each}' for each in columns)} |"
    return "\n".join([head, "|---" * head.count(" | ") + "|---|", *lines]) + "\n"


if __name__ == "__main__":
    sys.exit(run_command(main, "dependence", sys.argv[1:]))
