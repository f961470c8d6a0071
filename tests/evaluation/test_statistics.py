"""Streaming moments and files of statistics."""

import numpy as np
import pytest

from sfd_jax.data.moments import RunningMoments
from sfd_jax.errors import SfdError
from sfd_jax.evaluation.statistics import FeatureStatistics, load_statistics, save_statistics


@pytest.mark.parametrize("piece", [1, 7, 64, 300])
def test_moments_do_not_depend_on_the_pieces(piece):
    # A mean far from zero shows an update that cancels (sum of squares less square of sums would lose 1e-6).
    rows = np.random.default_rng(0).standard_normal((300, 11)).astype(np.float32) + 1000
    moments = RunningMoments(11)
    for start in range(0, 300, piece):
        moments.add(rows[start : start + piece])
    assert moments.count == 300
    np.testing.assert_allclose(moments.mean, rows.mean(axis=0, dtype=np.float64), rtol=1e-12)
    # 1e-9 is the bound for float64 statistics of equal features.
    np.testing.assert_allclose(moments.covariance, np.cov(rows.astype(np.float64), rowvar=False), rtol=1e-9, atol=1e-12)


def test_moments_refuse_nan_and_a_single_row():
    moments = RunningMoments(2)
    with pytest.raises(SfdError, match="not finite"):
        moments.add(np.array([[1.0, np.nan]]))
    moments.add(np.ones((1, 2)))
    with pytest.raises(SfdError, match="at least 2"):
        print(moments.covariance)


def test_statistics_survive_the_file_and_keep_their_extractor(tmp_path):
    statistics = FeatureStatistics(
        "inception", "abc", 5, {"features": (np.arange(2.0), np.eye(2)), "spatial": (np.ones(3), np.eye(3))}, "src"
    )
    save_statistics(tmp_path / "new" / "s.npz", statistics)
    read = load_statistics(tmp_path / "new" / "s.npz")
    assert (read.extractor, read.extractor_hash, read.count, read.source) == ("inception", "abc", 5, "src")
    np.testing.assert_array_equal(read.gaussians["spatial"][1], np.eye(3))
    read.check_extractor("inception", "abc", "s.npz")
    with pytest.raises(SfdError, match="make the statistics again"):
        read.check_extractor("inception", "abd", "s.npz")
    with pytest.raises(SfdError, match="'inception'.*'dinov2'"):
        read.check_extractor("dinov2", "abc", "s.npz")
    assert list((tmp_path / "new").iterdir()) == [tmp_path / "new" / "s.npz"]


def test_adm_statistics_count_as_inceptions(tmp_path):
    np.savez(tmp_path / "adm.npz", mu=np.zeros(2), sigma=np.eye(2), mu_s=np.zeros(3), sigma_s=np.eye(3))
    read = load_statistics(tmp_path / "adm.npz")
    read.check_extractor("inception", "any hash", "adm.npz")  # the file does not name the weights
    with pytest.raises(SfdError):
        read.check_extractor("dinov2", "any hash", "adm.npz")


GOOD = {"mu": np.zeros(2), "sigma": np.eye(2)}
FEATURES = np.random.default_rng(0).standard_normal((40, 2)).astype(np.float32)
OWN = {"mu": FEATURES.mean(axis=0), "sigma": np.cov(FEATURES, rowvar=False)}


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_statistics_of_other_tools_are_read(tmp_path, dtype):
    """float32 rounds a singular covariance to one with small negative eigenvalues; float16 is too coarse for that."""
    rows = np.random.default_rng(1).standard_normal((20, 64)) * 3 + 1
    sigma = np.cov(rows, rowvar=False) + (np.eye(64) if dtype == np.float16 else 0)
    assert np.linalg.eigvalsh(sigma.astype(dtype).astype(np.float64))[0] < (2 if dtype == np.float16 else 0)
    np.savez(tmp_path / "s.npz", mu=rows.mean(axis=0).astype(dtype), sigma=sigma.astype(dtype), count=np.array([20]))
    read = load_statistics(tmp_path / "s.npz")
    assert (read.count, read.extractor) == (20, "inception")
    np.testing.assert_array_equal(read.gaussians["features"][1], sigma.astype(dtype).astype(np.float64))


def test_features_beside_the_statistics_are_kept(tmp_path):
    np.savez(tmp_path / "s.npz", **OWN, features=FEATURES, count=40)
    np.testing.assert_array_equal(load_statistics(tmp_path / "s.npz").features, FEATURES)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"feats": np.zeros((5, 2))}, "expected arrays `mu`"),
        ({"mu": np.zeros(2)}, "only one of `mu` and `sigma`"),
        ({"mu": np.zeros(2), "sigma": np.eye(3)}, "found \\(2,\\) and \\(3, 3\\)"),
        ({"mu": np.zeros(2), "sigma": np.full((2, 2), np.nan)}, "not finite"),
        ({"mu": np.array([0, np.inf]), "sigma": np.eye(2)}, "not finite"),
        ({"mu": np.zeros(2), "sigma": -np.eye(2)}, "mu, sigma: the covariance matrix has negative eigenvalues"),
        ({"mu": np.zeros(2), "sigma": np.array([[1, 2], [2, 1.0]])}, "has negative eigenvalues"),
        (
            {"mu": np.zeros(2), "sigma": np.array([[1, 0.5], [0, 1]])},
            "mu, sigma: the covariance matrix is not symmetric",
        ),
        ({"mu": np.zeros(2), "sigma": np.eye(2) * 1j}, "expected real numbers, found float64 and complex128"),
        ({"mu": np.array(["a", "b"]), "sigma": np.eye(2)}, "expected real numbers"),
        ({"mu": np.zeros((1, 2)), "sigma": np.eye(2)}, "expected .D,. and"),
        ({"mu": np.zeros(0), "sigma": np.eye(0)}, "expected .D,. and"),
        ({"sigma": np.eye(2)}, "only one of `mu` and `sigma`"),
        ({**GOOD, "mu_s": np.zeros(2)}, "only one of `mu_s` and `sigma_s`"),
        (
            {**GOOD, "mu_s": np.zeros(2), "sigma_s": -np.eye(2)},
            "mu_s, sigma_s: the covariance matrix has negative eigenvalues",
        ),
        ({**GOOD, "count": np.nan}, "`count` is nan; expected the number of images"),
        ({**GOOD, "count": np.array([4, 5])}, "`count` is .4, 5.;"),
        ({**GOOD, "count": 1}, "`count` is 1;"),
        ({**GOOD, "count": 40.5}, "`count` is 40.5;"),
        ({**GOOD, "count": "many"}, "`count` is many;"),
        ({**GOOD, "extractor": np.array(["inception"])}, "`extractor` is <U9 .1,.; expected a string"),
        (
            {**GOOD, "features": np.zeros((5, 3), np.float32)},
            r"`features` are float32 \(5, 3\); expected floats \(N, 2\)",
        ),
        ({**GOOD, "features": FEATURES, "count": 41}, r"`features` are float32 \(40, 2\); expected floats \(41, 2\)"),
        ({**GOOD, "features": np.full((5, 2), np.nan)}, "not those of the `features`"),
        ({**OWN, "features": FEATURES + np.float32(0.1)}, "not those of the `features`"),
        ({**OWN, "features": FEATURES * np.float32(1.1)}, "not those of the `features`"),
    ],
)
def test_damaged_statistics_are_refused(tmp_path, arrays, words):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(SfdError, match=words):
        load_statistics(tmp_path / "bad.npz")
