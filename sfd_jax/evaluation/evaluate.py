"""From two sets of images to the numbers of the table."""

import dataclasses

import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from sfd_jax.distributed import is_host0
from sfd_jax.errors import SfdError, nearest
from sfd_jax.evaluation.features import Extractor, extract_features
from sfd_jax.evaluation.image_sets import ImageSet
from sfd_jax.evaluation.metrics import (
    RunningInceptionScore,
    frechet_distance,
    kernel_distance,
    precision_recall,
)
from sfd_jax.evaluation.reference import Reference
from sfd_jax.evaluation.statistics import FeatureStatistics, RunningMoments

# Metric -> whether it needs every image's features at once, beside mean and covariance.
METRICS = {"fid": False, "sfid": False, "is": False, "precision": True, "recall": True, "kid": True}
ADM_METRICS = ("fid", "sfid", "is", "precision", "recall")


def evaluate(
    samples: ImageSet,
    reference: Reference,
    extractor: Extractor,
    *,
    metrics: tuple[str, ...] = ADM_METRICS,
    batch_size: int = 64,
    split_size: int = 5000,
    mesh: Mesh | None = None,
    progress: bool = False,
) -> dict[str, float]:
    """Measure samples against a reference.

    Memory grows with the number of images only for precision, recall and KID, which hold the features of
    all images in float32 on the host.

    Args:
      samples: the images to be judged.
      reference: what to compare with; its stored statistics are used where it has some.
      extractor: the features; only Inception's have "sfid" and "is".
      metrics: names out of `METRICS`. "fid" is the Frechet distance in the extractor's main features,
        whatever the extractor; "kid" comes with "kid_std".
      batch_size: images in a batch over all devices.
      split_size: images in a split of the inception score.
      mesh: the devices; all of them by default.
      progress: show bars on stderr.

    Returns:
      Metric name -> value.

    Raises:
      SfdError: an unknown metric, one that the extractor or the reference cannot give, statistics of
        another extractor, or damaged images.
    """
    for metric in metrics:
        if metric not in METRICS:
            raise SfdError(f"unknown metric '{metric}'; {nearest(metric, METRICS)}")
    keep = any(METRICS[metric] for metric in metrics)
    _check_reference(reference, extractor, metrics)
    common = dict(batch_size=batch_size, split_size=split_size, mesh=mesh, progress=progress)
    known = reference.statistics
    wanted = None
    if known is None or (keep and known.features is None):
        wanted, _ = gather(reference.images, extractor, keep_features=keep, label="reference", **common)
        if known is not None:  # its mean and covariance stay those of the file, as in ADM
            wanted = dataclasses.replace(known, features=wanted.features)
    else:
        wanted = known
    ours, score = gather(samples, extractor, keep_features=keep, label="samples", **common)
    return measure(ours, wanted, score, metrics)


def measure(
    samples: FeatureStatistics,
    reference: FeatureStatistics,
    inception_score: float | None,
    metrics: tuple[str, ...],
) -> dict[str, float]:
    """Compute metrics from what `gather` has gathered of both sides."""
    values = {}
    for metric, feature in (("fid", "features"), ("sfid", "spatial")):
        if metric in metrics:
            if feature not in samples.gaussians or feature not in reference.gaussians:
                raise SfdError(f"'{metric}' needs features '{feature}', which one side does not have")
            values[metric] = frechet_distance(*samples.gaussians[feature], *reference.gaussians[feature])
    if "is" in metrics:
        if inception_score is None:
            raise SfdError(f"'is' needs class probabilities, which extractor '{samples.extractor}' does not give")
        values["is"] = inception_score
    if {"precision", "recall"} & set(metrics):
        both = dict(zip(("precision", "recall"), precision_recall(reference.features, samples.features)))
        values.update({name: value for name, value in both.items() if name in metrics})
    if "kid" in metrics:
        values["kid"], values["kid_std"] = kernel_distance(reference.features, samples.features)
    return values


def gather(
    images: ImageSet,
    extractor: Extractor,
    *,
    keep_features: bool,
    batch_size: int = 64,
    split_size: int = 5000,
    mesh: Mesh | None = None,
    progress: bool = False,
    label: str = "images",
) -> tuple[FeatureStatistics, float | None]:
    """Read images once and keep what the metrics need of them.

    Args:
      images: the set.
      extractor: the features.
      keep_features: also keep all images' features, for precision, recall and KID.
      batch_size, split_size, mesh, progress: as for `evaluate`.
      label: what the bar and messages call the set.

    Returns:
      (statistics, inception score); the score is None where the extractor gives no probabilities.

    Raises:
      SfdError: damaged images, or another number of them than the set says.
    """
    moments: dict[str, RunningMoments] = {}
    score, kept, count = None, [], 0
    bar = tqdm(total=images.count, desc=label, unit="img", disable=not (progress and is_host0()))
    with bar:
        for rows in extract_features(extractor, images.pieces(batch_size), batch_size=batch_size, mesh=mesh):
            probabilities = rows.pop("probabilities", None)
            if probabilities is not None:
                score = score or RunningInceptionScore(split_size)
                score.add(probabilities)
            for name, features in rows.items():
                moments.setdefault(name, RunningMoments(features.shape[1])).add(features)
            if keep_features:
                kept.append(rows["features"])
            count += len(rows["features"])
            bar.update(len(rows["features"]))
    if count != images.count:
        raise SfdError(f"{label} {images.name}: expected {images.count} images, read {count}")
    statistics = FeatureStatistics(
        extractor=extractor.name,
        extractor_hash=extractor.hash,
        count=count,
        gaussians={name: (moment.mean, moment.covariance) for name, moment in moments.items()},
        source=images.hash() if images.hash else "",
        features=np.concatenate(kept) if keep_features else None,
    )
    return statistics, score.value if score else None


def _check_reference(reference: Reference, extractor: Extractor, metrics: tuple[str, ...]) -> None:
    """Refuse before an hour of sampling what would fail after it."""
    known = reference.statistics
    if known is None:
        return
    known.check_extractor(extractor.name, extractor.hash, reference.name)
    for metric in metrics:
        if METRICS[metric] and known.features is None and reference.images is None:
            raise SfdError(
                f"{reference.name} has mean and covariance but no images, which '{metric}' needs; leave it out of "
                "--metrics, or give a reference with `arr_0`"
            )
    if "sfid" in metrics and "spatial" not in known.gaussians:
        raise SfdError(f"{reference.name} has no `mu_s` and `sigma_s`, which 'sfid' needs")
