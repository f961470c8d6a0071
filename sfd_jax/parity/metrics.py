"""The evaluation's numbers: Frechet distance, inception score, precision and recall."""

from collections.abc import Iterator

import numpy as np

from sfd_jax.evaluation.metrics import frechet_distance, inception_score, precision_recall
from sfd_jax.parity.check import Check, relative_error
from sfd_jax.parity.pack import Case

BOUND = 1e-6


def check_metrics(case: Case, dtype: str) -> Iterator[Check]:
    """Compare the metrics on given features; they are float64 on the host whatever `dtype` says."""
    reference, sample = case.array("in_reference"), case.array("in_sample")
    low_reference, low_sample = case.array("in_low_reference"), case.array("in_low_sample")
    precision, recall = precision_recall(reference, sample, k=3)
    # The pack's score is over splits of 500; its JSON says so in words.
    score = inception_score(case.array("in_probs"), split_size=500)
    for quantity, answer, ours in (
        ("FID", "out_fid", _frechet(reference, sample)),
        ("FID, fewer images than features", "out_fid_low_rank", _frechet(low_reference, low_sample)),
        ("precision", "out_precision", precision),
        ("recall", "out_recall", recall),
        ("inception score", "out_inception_score", score),
    ):
        yield Check(case.name, quantity, relative_error(ours, case.array(answer)), BOUND)


def _frechet(reference: np.ndarray, sample: np.ndarray) -> float:
    a, b = reference.astype(np.float64), sample.astype(np.float64)
    return frechet_distance(
        a.mean(axis=0), np.cov(a, rowvar=False), b.mean(axis=0), np.cov(b, rowvar=False)
    )
