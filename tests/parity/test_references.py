"""References that need no pack: SciPy for distances, so that a clone checks more than shapes.

Solvers are compared with torchdiffeq in tests/diffusion, networks with torch's own layers and with
transformers in tests/convert.
"""

import numpy as np
import scipy.linalg
import scipy.spatial.distance

from sfd_jax.evaluation.metrics import frechet_distance, precision_recall


def test_frechet_distance_against_scipys_matrix_root():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((40, 7)), 0.5 + rng.standard_normal((30, 7)) @ rng.standard_normal((7, 7))
    means, covariances = [x.mean(axis=0) for x in (a, b)], [np.cov(x, rowvar=False) for x in (a, b)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = np.sum((means[0] - means[1]) ** 2) + np.trace(covariances[0] + covariances[1] - 2 * root)
    ours = frechet_distance(means[0], covariances[0], means[1], covariances[1])
    # float64 on both sides; the root of an asymmetric product loses some digits.
    np.testing.assert_allclose(ours, expected, rtol=1e-9)


def test_precision_and_recall_against_scipys_distances():
    rng = np.random.default_rng(1)
    reference, samples = rng.standard_normal((53, 5)), 0.4 + 0.8 * rng.standard_normal((47, 5))
    reference, samples = reference.astype(np.float32), samples.astype(np.float32)
    cdist = scipy.spatial.distance.cdist

    def coverage(covered, by, k=3):
        """The fraction of `covered` inside the k-nearest-neighbour balls around `by`."""
        radii = np.sort(cdist(by, by), axis=1)[:, k]
        return np.mean((cdist(covered, by) <= radii[None]).any(axis=1))

    expected = coverage(samples, reference), coverage(reference, samples)
    assert precision_recall(reference, samples, k=3, distances="float32") == expected
    assert 0 < expected[0] < 1 and 0 < expected[1] < 1
