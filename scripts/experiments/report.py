"""Intervals over seeds, comparisons, tables and plots of the studies."""

import argparse
import contextlib
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sfd_jax.errors import needs_extra
from sfd_jax.experiment import figures
from sfd_jax.files import write_json, write_text

FRECHET = "frechet_distance"
SCORES = {FRECHET: "Frechet distance", "ratio": "ratio to the teacher's", "read_as_label": "classified as label"}
SCORES |= {"precision": "precision", "recall": "recall", "corrected_loss": "corrected loss, held out"}
ABOUT = ("data", "config", "overrides", "guidance_scale")  # flags in the results


def interval(values: list[float]) -> tuple[float, float | None]:
    """Return the mean and half the width of its 95 % interval by Student's t; None for one value."""
    from scipy.stats import t

    error = standard_error(values)
    return statistics.mean(values), error and float(t.ppf(0.975, len(values) - 1)) * error


def standard_error(values: list[float]) -> float | None:
    """Return the standard error of the mean; None for one value."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def lower(ours: list[float], theirs: list[float]) -> dict[str, Any]:
    """Say whether the mean of `ours` is lower than that of `theirs` by more than two standard errors.

    Returns:
      "difference", of the means; "standard_error", of the difference; "lower": yes, no or unknown (one seed).
    """
    difference, errors = statistics.mean(ours) - statistics.mean(theirs), [standard_error(v) for v in (ours, theirs)]
    if None in errors:
        return {"difference": difference, "standard_error": None, "lower": "unknown"}
    error = (errors[0] ** 2 + errors[1] ** 2) ** 0.5
    return {"difference": difference, "standard_error": error, "lower": "yes" if difference < -2 * error else "no"}


def scores_of(records: list[dict], cell: str, score: str = FRECHET, step: int | None = None) -> list[float]:
    """Return a score of a cell, one value a seed, at a step or the last."""
    step = step or max(record["step"] for record in records)
    return [r["scores"][score] for r in records if r["cell"] == cell and r["step"] == step and score in r["scores"]]


def points(records: list[dict], cells: dict[Any, str], score: str = FRECHET) -> tuple[list, list, list]:
    """Return places, means and half-widths to plot, of the cells (place -> name) that have scores."""
    found = {x: interval(values) for x, cell in cells.items() if (values := scores_of(records, cell, score))}
    return list(found), [mean for mean, _ in found.values()], [half or 0 for _, half in found.values()]


def said(answer: Any) -> str:
    """Return an answer of a verdict in words."""
    if not isinstance(answer, dict):
        return f"{answer:.4g}" if isinstance(answer, float) else "not reached" if answer is None else str(answer)
    if "lower" in answer:
        error = answer["standard_error"]
        return f"{answer['lower']} ({answer['difference']:+.3f}" + (f", standard error {error:.3f})" if error else ")")
    return "; ".join(f"{name}: {said(each)}" if name != "answer" else said(each) for name, each in answer.items())


def finish(args: argparse.Namespace, name: str, records: list[dict], cells: dict[str, str], verdict: dict) -> None:
    """Write NAME.json and NAME.md, a table of the last step's scores and the verdict, and print them.

    Args:
      args: the flags.
      name: of the study.
      records: of all finished cells.
      cells: name -> label.
      verdict: question -> answer.
    """
    rows, path = [], args.out / f"{name}{args.guided}"
    for cell, label in cells.items():
        if seeds := len(scores_of(records, cell)):
            values = {score: scores_of(records, cell, score) for score in SCORES}
            rows.append(
                {"cell": label, "seeds": seeds, **{key: interval(each) for key, each in values.items() if each}}
            )
    shown = [score for score in SCORES if any(score in row for row in rows)]
    lines = [f"| cell | seeds | {' | '.join(SCORES[score] for score in shown)} |", "|---" * (len(shown) + 2) + "|"]
    text = lambda mean, half: f"{mean:.3f}" + (f" ± {half:.3f}" if half is not None else "")
    for row in rows:
        values = [text(*row[score]) if score in row else "" for score in shown]
        lines.append(f"| {row['cell']} | {row['seeds']} | {' | '.join(values)} |")
    lines += ["", *(f"- {question}: {said(answer)}" for question, answer in verdict.items())]
    about = {key: value for key, value in vars(args).items() if key in ABOUT}
    write_json(f"{path}.json", {**about, "table": rows, "verdict": verdict, "cells": records})
    write_text(f"{path}.md", "\n".join(lines) + "\n")
    print("\n".join(["", *lines, "", f"{path}.json, .md, .png"]))


@contextlib.contextmanager
def figure(args: argparse.Namespace, name: str, records: list[dict], scores: tuple[str, ...]) -> Iterator[dict]:
    """Yield score -> axes to draw on, of the scores that were measured; write them as NAME.png."""
    scores = [score for score in scores if any(score in record["scores"] for record in records)]
    with drawing(args.out / f"{name}{args.guided}.png", len(scores)) as axes:
        yield dict(zip(scores, axes, strict=True))


@contextlib.contextmanager
def drawing(path: Path, count: int) -> Iterator[Sequence]:
    """Yield `count` axes beside each other; write them as a PNG."""
    with needs_extra("experiments", "drawing a study"):
        import matplotlib  # noqa: F401
    with figures.figure(path, 5.2 * count, 3.8) as drawn:
        yield drawn.subplots(1, count, squeeze=False)[0]
