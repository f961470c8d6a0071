"""Metrics against results known by hand, plain implementations of their definitions, and the released evaluator."""

import warnings

import numpy as np
import pytest

from sfd_jax.errors import SfdError
from sfd_jax.evaluation.metrics import (
    RunningInceptionScore,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)


def gaussian_of(rows):
    rows = rows.astype(np.float64)
    return rows.mean(axis=0), np.cov(rows, rowvar=False)


@pytest.fixture
def released(parity_dir):
    with np.load(parity_dir / "metrics.npz") as file:
        return dict(file)


@pytest.mark.parametrize("case", ["", "_low_rank"])
def test_frechet_distance_of_the_released_evaluator(released, case):
    prefix = "in_low_" if case else "in_"
    ours = frechet_distance(*gaussian_of(released[f"{prefix}reference"]), *gaussian_of(released[f"{prefix}sample"]))
    assert ours == pytest.approx(float(released[f"out_fid{case}"]), rel=1e-6)  # issue 3's bound


@pytest.mark.parametrize("block", [128, 4096])
def test_precision_and_recall_of_the_released_evaluator(released, block):
    # Counts of points must be equal; the block size must not matter, also if it does not divide the sets.
    ours = precision_recall(released["in_reference"], released["in_sample"], block=block)
    assert ours == (released["out_precision"], released["out_recall"])


def test_precision_and_recall_of_the_suites_tensorflow():
    # 350 of 600 and 412 of 700 are the results of TensorFlow 2.21 on CPU to the suite's DistanceBlock on
    # features like Inception's: many, not negative. Without its float16 they are 339 and 398.
    generator = np.random.RandomState(0)
    level = generator.gamma(1.0, 0.4, 2048)
    reference, samples = (
        np.maximum(level + 0.35 * generator.standard_normal((n, 2048)) * np.sqrt(level), 0).astype(np.float32)
        for n in (700, 600)
    )
    assert precision_recall(reference, samples) == (350 / 600, 412 / 700)
    assert precision_recall(reference, samples, distances="float32") == (339 / 600, 398 / 700)


def test_inception_score_of_the_released_evaluator(released):
    probabilities = released["in_probs"]
    expected = float(released["out_inception_score"])
    assert inception_score(probabilities, split_size=500) == pytest.approx(expected, rel=1e-6)
    running = RunningInceptionScore(split_size=500)  # pieces that do not end with splits
    for start in range(0, len(probabilities), 77):
        running.add(probabilities[start : start + 77])
    assert running.value == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_by_hand():
    # Equal covariances leave the squared distance of the means; commuting ones the squared distance of the
    # roots of their eigenvalues.
    root = np.random.default_rng(0).standard_normal((7, 7))
    covariance = root @ root.T
    shift = np.arange(7.0)
    assert frechet_distance(shift, covariance, 0 * shift, covariance) == pytest.approx(91.0, rel=1e-12)
    a, b = np.array([1.0, 4.0, 9.0]), np.array([16.0, 1.0, 0.0])
    expected = ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert frechet_distance(np.zeros(3), np.diag(a), np.zeros(3), np.diag(b)) == pytest.approx(expected, rel=1e-12)


def test_frechet_distance_of_a_singular_covariance_with_itself_is_zero():
    # With roots of near-zero eigenvalues, 60 null directions would leave about 1e-7 here.
    rows = np.random.default_rng(1).standard_normal((5, 64)) * 30
    assert abs(frechet_distance(*gaussian_of(rows), *gaussian_of(rows))) < 1e-9 * np.trace(gaussian_of(rows)[1])


def test_frechet_distance_refuses_other_shapes_and_nan():
    with pytest.raises(SfdError, match="use the same extractor"):
        frechet_distance(np.zeros(3), np.eye(3), np.zeros(2), np.eye(2))
    with pytest.raises(SfdError, match="not finite"):
        frechet_distance(np.full(3, np.nan), np.eye(3), np.zeros(3), np.eye(3))


def test_frechet_distance_refuses_invalid_covariances():
    good = np.zeros(3), np.eye(3)
    for bad, words in ((-np.eye(3), "negative eigenvalues"), (np.triu(np.ones((3, 3))), "not symmetric")):
        for pair in ((*good, good[0], bad), (good[0], bad, *good)):
            with pytest.raises(SfdError, match=words):
                frechet_distance(*pair)
    # Rounding to float32 is accepted, and gives no negative distance.
    rows = np.random.default_rng(0).standard_normal((20, 64)) * 30
    mean, covariance = gaussian_of(rows)
    rounded = covariance.astype(np.float32)
    assert np.linalg.eigvalsh(rounded.astype(np.float64))[0] < 0
    assert 0 <= frechet_distance(mean, rounded, mean, covariance) < 1e-4 * np.trace(covariance)


def test_scores_that_depend_on_the_order_warn():
    classes = np.repeat(np.arange(50), 40)  # 2,000 rows, in splits of 500
    rows = np.eye(50)[classes] * 0.9 + 0.002
    shuffled = np.random.default_rng(0).permutation(rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        good = inception_score(shuffled, split_size=500)
        inception_score(rows[np.arange(2000).reshape(50, 40).T.ravel()], split_size=500)  # classes in turn
        inception_score(rows, split_size=2000)  # one split does not depend on the order
        for seed in range(20):
            inception_score(np.random.default_rng(seed).permutation(rows), split_size=500)
    with pytest.warns(UserWarning, match="sorted by class"):
        assert inception_score(rows, split_size=500) < 0.5 * good
    halves = np.concatenate([shuffled[np.argmax(shuffled, axis=1) < 25], shuffled[np.argmax(shuffled, axis=1) >= 25]])
    with pytest.warns(UserWarning, match="sorted by class"):
        assert inception_score(halves, split_size=500) < 0.8 * good  # no runs of one class, but still sorted
    with pytest.warns(UserWarning, match="5 splits, of which the last has 1 images and the others 499"):
        inception_score(shuffled[:1997], split_size=499)


def test_inception_score_by_hand():
    # Certain and even over K classes scores K; equal rows score 1; zero probabilities are allowed.
    assert inception_score(np.tile(np.eye(5), (4, 1))) == pytest.approx(5.0, rel=1e-12)
    assert inception_score(np.full((11, 3), 1 / 3)) == pytest.approx(1.0, rel=1e-12)
    # The last, shorter split has the same weight: (5 + 1) / 2.
    rows = np.concatenate([np.eye(5), np.eye(5)[:1]])
    assert inception_score(rows, split_size=5) == pytest.approx(3.0, rel=1e-12)


@pytest.mark.parametrize("distances", ["float16", "float32"])
def test_precision_and_recall_on_a_line(distances):
    # References at 0..9, so k = 3 balls reach 2 (inside) or 3 (at the ends): the union is [-3, 12].
    reference = np.stack([np.arange(10.0), np.zeros(10)], axis=1)
    samples = np.array([[-3.0, 0], [4.5, 0], [12.0, 0], [12.5, 0], [5.0, 9.0]])
    precision, _ = precision_recall(reference, samples, distances=distances, block=4)
    assert precision == 3 / 5
    # Samples far away in a tight cloud reach no reference; the same set is its own manifold.
    cloud = reference * 0.01 + 40.0
    assert precision_recall(reference, cloud, distances=distances) == (0.0, 0.0)
    assert precision_recall(reference, reference, distances=distances) == (1.0, 1.0)


def test_float32_distances_are_the_definition():
    generator = np.random.default_rng(2)
    reference, samples = generator.standard_normal((61, 11)), generator.standard_normal((53, 11)) * 0.9 + 0.1
    ours = precision_recall(reference + 100, samples + 100, distances="float32", block=17)

    def distances(a, b):
        return ((a[:, None] - b[None]) ** 2).sum(-1)

    reference_radii = np.sort(distances(reference, reference), axis=1)[:, 3]
    sample_radii = np.sort(distances(samples, samples), axis=1)[:, 3]
    across = distances(samples, reference)
    assert ours[0] == (across <= reference_radii[None]).any(axis=1).mean()
    assert ours[1] == (across <= sample_radii[:, None]).any(axis=0).mean()


def test_features_too_large_for_float16_are_compared_in_float32():
    generator = np.random.default_rng(3)
    reference, samples = generator.standard_normal((2, 40, 5))
    expected = precision_recall(reference, samples, distances="float32")
    assert precision_recall(reference * 1e4, samples * 1e4) == expected  # squares overflow float16's 65504


def test_precision_and_recall_refuse_too_few_and_not_finite():
    with pytest.raises(SfdError, match="more than 3"):
        precision_recall(np.zeros((9, 2)), np.zeros((3, 2)))
    with pytest.raises(SfdError, match="not finite"):
        precision_recall(np.zeros((9, 2)), np.full((9, 2), np.inf))


def test_kernel_distance_is_the_unbiased_estimate():
    generator = np.random.default_rng(4)
    a, b = generator.standard_normal((37, 5)), generator.standard_normal((37, 5)) + 0.5
    ours, spread = kernel_distance(a.astype(np.float32), b.astype(np.float32), subsets=3, subset_size=37)

    def kernel(u, v):
        return (u @ v.T / 5 + 1) ** 3

    within = sum((kernel(x, x).sum() - np.trace(kernel(x, x))) / (37 * 36) for x in (a, b))
    assert ours == pytest.approx(within - 2 * kernel(a, b).mean(), rel=1e-4)  # float32 sums of 37 x 37 terms
    assert spread < 1e-5  # subsets of full size equal the sets
