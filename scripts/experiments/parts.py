"""Does each part of SFD add: scores of the texture alone, with REPA, with semantic latents, with semantics first.

  python scripts/experiments/parts.py --data=mnist --out=study_mnist [--seeds=0,1,2]

The rows of the paper's ablation, each with the study's config: plain; + REPA; + semantic latents, synchronous;
semantics first, delta_t = 0.3 (a cell of offset.py too); the last with principal components instead of the Semantic
VAE. Flags as for offset.py; a folder of latents also needs --pca_data.
"""

import sys

import report
import study

from sfd_jax.cli.main import run_command

SYSTEMS = [
    study.Cell("plain", "plain", ("plain",)),
    study.Cell("repa", "+ REPA", ("repa",)),
    study.Cell("synchronous", "+ semantic latents", ("synchronous",)),
    study.Cell("offset_0.3", "+ semantics first", delta_t=0.3),
]
PCA = study.Cell("pca", "PCA, semantics first", ("pca",), delta_t=0.3)


def main(argv: list[str]) -> None:
    """Run the systems, and write what is finished."""
    args = study.parse(__doc__, argv)
    cells = [*SYSTEMS, PCA]
    if records := study.run(args, cells):
        report.finish(args, "parts", records, {cell.name: cell.label for cell in cells}, verdict(records))
        draw(args, records)


def verdict(records: list[dict]) -> dict:
    """Compare each system with the one before it, and PCA with the Semantic VAE."""
    pairs = [*zip(SYSTEMS[1:], SYSTEMS, strict=False), (SYSTEMS[-1], PCA)]
    of = {cell: report.scores_of(records, cell.name) for cell in (*SYSTEMS, PCA)}
    return {
        f"'{ours.label}' beats '{theirs.label}' by two standard errors": report.lower(of[ours], of[theirs])
        for ours, theirs in pairs
        if of[ours] and of[theirs]
    }


def draw(args, records: list[dict]) -> None:
    """Draw a bar for each system."""
    with report.figure(args, "parts", records, (report.FRECHET, "read_as_label")) as axes:
        for score, axis in axes.items():
            labels, means, halves = report.points(records, {cell.label: cell.name for cell in (*SYSTEMS, PCA)}, score)
            axis.barh(labels, means, xerr=halves, capsize=3)
            axis.invert_yaxis()
            axis.set(xlabel=report.SCORES[score])


if __name__ == "__main__":
    sys.exit(run_command(main, "parts", sys.argv[1:]))
