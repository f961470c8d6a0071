"""From images to scores: features, their statistics, and the ADM suite's metrics.

    reference = open_reference("VIRTUAL_imagenet256_labeled.npz")
    scores = evaluate(open_image_set("samples.npz"), reference, inception_extractor(load_params("inception")))

Images are uint8 (N, H, W, 3); each is read once, in order. Features are float32 (N, D). Statistics are float64 and
belong to the extractor that made them. To add a metric, write a pure function in `metrics.py` and a line in
`evaluate.py`. To add an extractor, write a function in `features.py`.
"""

from sfd_jax.data.moments import RunningMoments
from sfd_jax.evaluation.evaluate import ADM_METRICS, METRICS, Comparison, compare, evaluate, gather, measure
from sfd_jax.evaluation.features import (
    Extractor,
    class_token,
    encoder_extractor,
    extract_features,
    images_at_once,
    inception_extractor,
)
from sfd_jax.evaluation.image_sets import ImageSet, image_set_of, open_image_set
from sfd_jax.evaluation.metrics import frechet_distance, inception_score, kernel_distance, precision_recall
from sfd_jax.evaluation.reference import Reference, open_reference
from sfd_jax.evaluation.statistics import FeatureStatistics, load_statistics, save_statistics

__all__ = [
    "ADM_METRICS",
    "METRICS",
    "Comparison",
    "Extractor",
    "FeatureStatistics",
    "ImageSet",
    "Reference",
    "RunningMoments",
    "class_token",
    "compare",
    "encoder_extractor",
    "evaluate",
    "extract_features",
    "frechet_distance",
    "gather",
    "image_set_of",
    "images_at_once",
    "inception_extractor",
    "inception_score",
    "kernel_distance",
    "load_statistics",
    "measure",
    "open_image_set",
    "open_reference",
    "precision_recall",
    "save_statistics",
]
