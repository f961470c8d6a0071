"""The metrics: Frechet distance, inception score, precision and recall."""

import re
from collections.abc import Iterator

import numpy as np

from sfd_jax.errors import SfdError
from sfd_jax.evaluation.metrics import RunningInceptionScore, frechet_distance, precision_recall
from sfd_jax.parity.check import Check, relative_error
from sfd_jax.parity.pack import Case

BOUND = 1e-6


def check_metrics(case: Case, dtype: str) -> Iterator[Check]:
    """Compare the metrics on given features; they are float64 on the host for every `dtype`."""
    reference, sample = case.array("in_reference"), case.array("in_sample")
    low_reference, low_sample = case.array("in_low_reference"), case.array("in_low_sample")
    precision, recall = precision_recall(reference, sample, k=_setting_in_note(case, r"k=(\d+)"))
    score = RunningInceptionScore(split_size=_setting_in_note(case, r"splits of (\d+)"))
    score.add(case.array("in_probs"))
    for quantity, answer, ours in (
        ("FID", "out_fid", _frechet(reference, sample)),
        ("FID, fewer images than features", "out_fid_low_rank", _frechet(low_reference, low_sample)),
        ("precision", "out_precision", precision),
        ("recall", "out_recall", recall),
        ("inception score", "out_inception_score", score.value),
    ):
        yield Check(case.name, quantity, relative_error(ours, case.array(answer)), BOUND)


def _setting_in_note(case: Case, pattern: str) -> int:
    """Return a setting from the text of the JSON's note."""
    match = re.search(pattern, case.get("note"))
    if match is None:
        raise SfdError(f"parity case {case.name}: its note does not say '{pattern}'")
    return int(match[1])


def _frechet(reference: np.ndarray, sample: np.ndarray) -> float:
    a, b = reference.astype(np.float64), sample.astype(np.float64)
    return frechet_distance(a.mean(axis=0), np.cov(a, rowvar=False), b.mean(axis=0), np.cov(b, rowvar=False))
