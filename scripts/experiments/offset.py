"""Does it help that semantics lead, and by how much: scores against the offset delta_t.

  python scripts/experiments/offset.py --data=mnist --out=study_mnist [--seeds=0,1,2]
  python scripts/experiments/offset.py --data=latents/train --config=configs/sfd.py:b,lr2e4 --out=study_b \\
      --texture_vae=sd_vae --inception=inception --reference=reference.npz

The same command continues after a kill. With --cell or --cells=K/N it runs a part, for instance one cell a slice; every
command writes the results of all cells that are finished.
"""

import sys

import report
import study

from sfd_jax.cli.main import run_command

OFFSETS = (0, 0.1, 0.2, 0.3, 0.5, 0.7, 1)
CELLS = [study.Cell(f"offset_{offset:g}", f"{offset:g}", delta_t=float(offset)) for offset in OFFSETS]
CELLS += [study.Cell("learned", "learned", ("learned_clocks",))]


def main(argv: list[str]) -> None:
    """Run the sweep, and write what is finished."""
    args = study.parse(__doc__, argv)
    if records := study.run(args, CELLS):
        cells = {cell.name: cell.label for cell in CELLS}
        report.finish(args, "offset", records, cells, verdict(records))
        draw(args, records)


def verdict(records: list[dict]) -> dict:
    """Compare interior offsets with both ends."""
    of = {offset: report.scores_of(records, f"offset_{offset:g}") for offset in OFFSETS}
    found = {offset: values for offset, values in of.items() if values}
    interior = [offset for offset in found if 0 < offset < 1]
    if not (0 in found and 1 in found and interior):
        return {}
    best, answers = min(interior, key=lambda offset: report.interval(found[offset])[0]), {}
    for name, offset in (("the best interior offset", best), ("the paper's offset", 0.3)):
        if offset in found:
            against = {f"than {end}": report.lower(found[offset], found[end]) for end in (0, 1)}
            yes = {each["lower"] for each in against.values()}
            beats = "yes" if yes == {"yes"} else "no" if "no" in yes else yes.pop()
            answers[f"{name}, {offset:g}, beats both ends by two standard errors"] = {"answer": beats, **against}
    for score in (report.FRECHET, "corrected_loss"):
        if learned := report.scores_of(records, "learned", score):
            values = {
                f"than offset {offset:g}'s": report.scores_of(records, f"offset_{offset:g}", score) for offset in found
            }
            answers[f"{report.SCORES[score]} of learned clocks is lower by two standard errors"] = {
                name: report.lower(learned, each) for name, each in values.items() if each
            }
    return answers


def draw(args, records: list[dict]) -> None:
    """Draw the scores against the offset, as the paper does."""
    with report.figure(args, "offset", records, (report.FRECHET, "read_as_label")) as axes:
        for score, axis in axes.items():
            offsets, means, halves = report.points(records, {x: f"offset_{x:g}" for x in OFFSETS}, score)
            axis.errorbar(offsets, means, yerr=halves, marker="o", capsize=3)
            if learned := report.scores_of(records, "learned", score):
                axis.axhline(report.interval(learned)[0], linestyle="--", color="C1", label="learned")
                axis.legend()
            axis.set(xlabel="offset delta_t", ylabel=report.SCORES[score])


if __name__ == "__main__":
    sys.exit(run_command(main, "offset", sys.argv[1:]))
