"""From two sets of images to the metrics of the paper's table."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from sfd_jax.data.moments import RunningMoments
from sfd_jax.distributed import is_host0
from sfd_jax.errors import SfdError, nearest
from sfd_jax.evaluation.features import Extractor, extract_features
from sfd_jax.evaluation.image_sets import ImageSet
from sfd_jax.evaluation.metrics import RunningInceptionScore, frechet_distance, kernel_distance, precision_recall
from sfd_jax.evaluation.reference import Reference
from sfd_jax.evaluation.statistics import FeatureStatistics
from sfd_jax.progress import ProgressBar
from sfd_jax.ranges import check

# Metric -> whether it needs the features of all images, besides mean and covariance.
METRICS = {"fid": False, "sfid": False, "is": False, "precision": True, "recall": True, "kid": True}
ADM_METRICS = ("fid", "sfid", "is", "precision", "recall")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A reference, an extractor of features, and the metrics to compute in them.

    Attributes:
      reference: the reference; its stored statistics are used if it has some.
      extractor: the feature extractor; only Inception has "sfid" and "is".
      metrics: names from `METRICS`. "fid" is the Frechet distance in the main features of any
        extractor; "kid" comes with "kid_std".
    """

    reference: Reference
    extractor: Extractor
    metrics: tuple[str, ...] = ADM_METRICS

    @property
    def keeps_features(self) -> bool:
        return any(METRICS[metric] for metric in self.metrics)


def evaluate(
    samples: ImageSet,
    reference: Reference,
    extractor: Extractor,
    *,
    metrics: tuple[str, ...] = ADM_METRICS,
    **options,
) -> dict[str, float]:
    """Compare samples with one reference; arguments as for `Comparison` and `compare`."""
    return compare(samples, [Comparison(reference, extractor, metrics)], **options)[0]


def compare(
    samples: ImageSet,
    comparisons: Sequence[Comparison],
    *,
    batch_size: int = 64,
    split_size: int = 5000,
    mesh: Mesh | None = None,
    progress: bool = False,
) -> list[dict[str, float]]:
    """Make several comparisons of samples, reading (or sampling) them once.

    Memory grows with the number of images only for precision, recall and KID, which hold the features of
    all images in float32 on the host.

    Args:
      samples: the images to evaluate.
      comparisons: the comparisons.
      batch_size: images per batch over all devices.
      split_size: images per split of the inception score.
      mesh: the devices; all of them by default.
      progress: show bars on stderr.

    Returns:
      For each comparison, metric name -> value, and "notes": remarks on the values, if there are any.

    Raises:
      SfdError: a metric is unknown or not possible with the extractor or the reference, the statistics
        are of another extractor, or images are damaged.
    """
    check(batch_size=batch_size)
    for comparison in comparisons:  # before sampling, which may take hours
        _check(samples, comparison)
    options = dict(batch_size=batch_size, split_size=split_size, mesh=mesh, progress=progress)
    references = [_reference_statistics(comparison, options) for comparison in comparisons]
    score_notes = []
    gathered = gather(
        samples,
        [comparison.extractor for comparison in comparisons],
        keep_features=[comparison.keeps_features for comparison in comparisons],
        label="samples",
        notes=score_notes,
        **options,
    )
    results = []
    for comparison, reference, (ours, score) in zip(comparisons, references, gathered, strict=True):
        results.append(measure(ours, reference, score, comparison.metrics))
        notes = [*comparison.reference.notes, *(score_notes if "is" in comparison.metrics else ())]
        if notes:
            results[-1]["notes"] = notes
    return results


def _check(samples: ImageSet, comparison: Comparison) -> None:
    reference, extractor, metrics = comparison.reference, comparison.extractor, comparison.metrics
    sizes = (samples.size, reference.images and reference.images.size)
    if None not in sizes and sizes[0] != sizes[1]:
        ours, theirs = ("x".join(map(str, size[::-1])) for size in sizes)
        raise SfdError(
            f"images of {samples.name} are {ours}, those of {reference.name} {theirs}: both must have one size"
        )
    for metric in metrics:
        if metric not in METRICS:
            raise SfdError(f"unknown metric '{metric}'; {nearest(metric, METRICS)}")
    known = reference.statistics
    if known is not None:
        known.check_extractor(extractor.name, extractor.hash, reference.name)
    _check_features(samples, comparison)
    computes_reference = known is None or (comparison.keeps_features and known.features is None)
    least = 4 if {"precision", "recall"} & set(metrics) else 2  # neighbours at k = 3; a covariance
    for images in (samples, reference.images if computes_reference else None):
        if images is not None and images.count < least:
            raise SfdError(f"{images.name} holds {images.count} images, but {', '.join(metrics)} need at least {least}")
    if known is None:
        return
    if comparison.keeps_features and known.features is None and reference.images is None:
        raise SfdError(
            f"{reference.name} has mean and covariance but no images, which {', '.join(_of_features(metrics))} need; "
            "leave out these metrics, or give a reference with `arr_0`"
        )
    if "sfid" in metrics and "spatial" not in known.gaussians:
        raise SfdError(f"{reference.name} has no `mu_s` and `sigma_s`, which 'sfid' needs")


def _check_features(samples: ImageSet, comparison: Comparison) -> None:
    """Refuse metrics that the extractor does not support, and stored statistics of another width.

    Traces the extractor instead of computing features.
    """
    reference, extractor = comparison.reference, comparison.extractor
    size = samples.size or (reference.images and reference.images.size) or (256, 256)
    answers = jax.eval_shape(extractor.apply, extractor.params, jax.ShapeDtypeStruct((1, *size, 3), np.float32))
    for metric, name in (("sfid", "spatial"), ("is", "probabilities")):
        if metric in comparison.metrics and name not in answers:
            raise SfdError(f"'{metric}' needs '{name}', which extractor '{extractor.name}' does not return")
    known = reference.statistics
    for name, (mean, _) in (known.gaussians if known else {}).items():
        if name in answers and answers[name].shape[1] != len(mean):
            raise SfdError(
                f"{reference.name} holds statistics of {len(mean)} features, but extractor '{extractor.name}' has "
                f"{answers[name].shape[1]} ('{name}'); give statistics of this network and layer"
            )


def _of_features(metrics: tuple[str, ...]) -> list[str]:
    return [metric for metric in metrics if METRICS[metric]]


def _reference_statistics(comparison: Comparison, options: dict) -> FeatureStatistics:
    """Return a reference's stored statistics, and compute what they lack."""
    known, keep = comparison.reference.statistics, comparison.keeps_features
    if known is not None and not (keep and known.features is None):
        return known
    [(found, _)] = gather(
        comparison.reference.images, [comparison.extractor], keep_features=[keep], label="reference", **options
    )
    # Stored mean and covariance are used, as in ADM.
    return found if known is None else dataclasses.replace(known, features=found.features)


def measure(
    samples: FeatureStatistics,
    reference: FeatureStatistics,
    inception_score: float | None,
    metrics: tuple[str, ...],
) -> dict[str, float]:
    """Compute metrics from the statistics of both sides, see `gather`."""
    values = {}
    for metric, feature in (("fid", "features"), ("sfid", "spatial")):
        if metric in metrics:
            if feature not in samples.gaussians or feature not in reference.gaussians:
                raise SfdError(f"'{metric}' needs features '{feature}', which one side lacks")
            values[metric] = frechet_distance(*samples.gaussians[feature], *reference.gaussians[feature])
    if "is" in metrics:
        if inception_score is None:
            raise SfdError(f"'is' needs class probabilities, which extractor '{samples.extractor}' does not return")
        values["is"] = inception_score
    if {"precision", "recall"} & set(metrics):
        precision, recall = precision_recall(reference.features, samples.features)
        both = {"precision": precision, "recall": recall}
        values |= {name: value for name, value in both.items() if name in metrics}
    if "kid" in metrics:
        values["kid"], values["kid_std"] = kernel_distance(reference.features, samples.features)
    return values


def gather(
    images: ImageSet,
    extractors: Sequence[Extractor],
    *,
    keep_features: Sequence[bool],
    batch_size: int = 64,
    split_size: int = 5000,
    mesh: Mesh | None = None,
    progress: bool = False,
    label: str = "images",
    notes: list[str] | None = None,
) -> list[tuple[FeatureStatistics, float | None]]:
    """Read images once and compute what the metrics need.

    Args:
      images: the set.
      extractors: the feature extractors.
      keep_features: for each extractor, whether to keep the features of all images too.
      batch_size, split_size, mesh, progress: as for `compare`.
      label: name of the set in the progress bar and messages.
      notes: receives the remarks on the inception score.

    Returns:
      For each extractor (statistics, inception score); the score is None if it returns no probabilities.

    Raises:
      SfdError: images are damaged, or their number is not that of the set.
    """
    collected = [_Collected(split_size, keep) for keep in keep_features]
    batch_size = min(batch_size, images.count)  # do not pad a small set to a large batch
    count = 0
    bar = ProgressBar(total=images.count, desc=label, unit="img", disable=not (progress and is_host0()))
    with bar:
        pieces = images.pieces(batch_size)
        for answers in extract_features(extractors, pieces, batch_size=batch_size, mesh=mesh):
            for part, answer in zip(collected, answers, strict=True):
                part.add(answer)
            count += len(answers[0]["features"])
            bar.update(len(answers[0]["features"]))
    if count != images.count:
        raise SfdError(f"{label} {images.name}: expected {images.count} images, read {count}")
    if notes is not None:
        notes.extend(dict.fromkeys(note for part in collected if part.score.count for note in part.score.notes()))
    source = images.hash() if images.hash else ""
    return [part.finish(extractor, source) for part, extractor in zip(collected, extractors, strict=True)]


class _Collected:
    """Running statistics of one extractor's features."""

    def __init__(self, split_size: int, keep_features: bool):
        self.moments: dict[str, RunningMoments] = {}
        self.score = RunningInceptionScore(split_size)
        self.features = [] if keep_features else None

    def add(self, answer: dict[str, np.ndarray]) -> None:
        for name, rows in answer.items():
            if name == "probabilities":
                self.score.add(rows)
            else:
                self.moments.setdefault(name, RunningMoments(rows.shape[1])).add(rows)
        if self.features is not None:
            self.features.append(answer["features"])

    def finish(self, extractor: Extractor, source: str) -> tuple[FeatureStatistics, float | None]:
        statistics = FeatureStatistics(
            extractor=extractor.name,
            extractor_hash=extractor.hash,
            count=self.moments["features"].count,
            gaussians={name: (moment.mean, moment.covariance) for name, moment in self.moments.items()},
            source=source,
            features=None if self.features is None else np.concatenate(self.features),
        )
        return statistics, self.score.value if self.score.count else None
