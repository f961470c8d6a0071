"""PCA: the fitted directions against numpy's singular vectors."""

import numpy as np
import pytest

from sfd_jax.data.pca import fit_pca, load_pca, save_pca
from sfd_jax.errors import SfdError


def test_components_are_the_singular_vectors():
    random = np.random.default_rng(0)
    tokens = random.standard_normal((5, 37, 7)) @ random.standard_normal((7, 7)) + 100.0
    pca = fit_pca(iter(tokens), 3)  # five pieces of 37 tokens
    flat = tokens.reshape(-1, 7)
    _, values, rows = np.linalg.svd(flat - flat.mean(0), full_matrices=False)
    # Kept as float32: a few ulp; signs are fixed by the largest entry.
    np.testing.assert_allclose(pca["mean"], flat.mean(0), rtol=1e-6)
    signs = np.sign(rows[np.arange(7), np.abs(rows).argmax(1)])
    np.testing.assert_allclose(pca["components"], (rows * signs[:, None])[:3].T, atol=1e-6)
    np.testing.assert_allclose(pca["explained"], (values**2 / (values**2).sum())[:3], rtol=1e-6)


def test_saving_and_impossible_fits(tmp_path):
    pca = fit_pca([np.random.default_rng(1).standard_normal((11, 3))], 2)
    save_pca(tmp_path / "pca.npz", pca)
    for name, values in load_pca(tmp_path / "pca.npz").items():
        np.testing.assert_array_equal(values, pca[name])
    (tmp_path / "pca.npz").write_bytes(b"half")
    with pytest.raises(SfdError, match="delete it to fit it again"):
        load_pca(tmp_path / "pca.npz")
    with pytest.raises(SfdError, match="4 principal components of features of width 3"):
        fit_pca([np.zeros((5, 3))], 4)
