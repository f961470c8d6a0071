"""Untrusted npz files: headers are compared with the data before memory is allocated."""

import io
import tracemalloc
import zipfile

import numpy as np
import pytest

from sfd_jax.errors import SfdError
from sfd_jax.evaluation.image_sets import open_image_set
from sfd_jax.evaluation.npz import npz_names, read_npz
from sfd_jax.evaluation.reference import open_reference
from sfd_jax.evaluation.statistics import load_statistics

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3), dtype=np.uint8)


def npy(array, **header) -> bytes:
    """Return an npy file with a wrong header."""
    buffer = io.BytesIO()
    true = {"descr": np.lib.format.dtype_to_descr(array.dtype), "fortran_order": False, "shape": array.shape}
    np.lib.format.write_array_header_1_0(buffer, true | header)
    return buffer.getvalue() + array.tobytes()


def write(path, method=zipfile.ZIP_STORED, **members):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return path


@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_are_read(tmp_path, order):
    arrays = {"a": np.asarray(IMAGES, order=order), "b": np.array("text"), "c": np.float64(3), "d": np.zeros((0, 2))}
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "f.npz", **arrays)
        read = read_npz(tmp_path / "f.npz", ("a", "b", "c", "d", "e"))
        assert read.keys() == arrays.keys() and npz_names(tmp_path / "f.npz") == list(arrays)
        for name, array in arrays.items():
            np.testing.assert_array_equal(read[name], array)
            assert read[name].dtype == array.dtype


SHAPES = [(2**40, 4, 5, 3), (3, 4, 2**50, 3), (2, 4, 5, 3), (4, 4, 5, 3), (-3, -4, 5, 3), (3, 4, 5, 3) + (1,) * 61]


@pytest.mark.parametrize("shape", SHAPES)
def test_wrong_headers_are_refused(tmp_path, shape):
    path = write(
        tmp_path / "f.npz", arr_0=npy(IMAGES, shape=shape), mu=npy(np.ones(3), shape=shape), sigma=npy(np.eye(3))
    )
    tracemalloc.start()
    try:
        for read in (open_image_set, load_statistics, open_reference):
            with pytest.raises(SfdError, match="does not match its header|is not an array of numbers"):
                read(path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_arrays_of_objects_and_bombs_are_refused(tmp_path):
    np.savez(tmp_path / "o.npz", mu=np.array([{}], object), sigma=np.eye(1))
    with pytest.raises(SfdError, match="not an array of numbers"):
        load_statistics(tmp_path / "o.npz")
    sigma = npy(np.zeros((4096, 4096)))  # 128 MiB out of 130 KiB
    bomb = write(tmp_path / "b.npz", zipfile.ZIP_DEFLATED, mu=npy(np.zeros(4096)), sigma=sigma)
    images = write(tmp_path / "i.npz", zipfile.ZIP_DEFLATED, arr_0=npy(np.zeros((2, 4096, 4096, 3), np.uint8)))
    with pytest.raises(SfdError, match="memory"):
        load_statistics(bomb)
    with pytest.raises(SfdError, match="memory"):
        next(open_image_set(images).pieces(1))
    packed = write(tmp_path / "l.npz", zipfile.ZIP_LZMA, mu=npy(np.zeros(3)), sigma=npy(np.eye(3)))
    with pytest.raises(SfdError, match="unusual method"):
        load_statistics(packed)


@pytest.mark.parametrize(
    "indices, match",
    [
        (np.array([0, 1, 2**62]), "is missing|are missing"),
        (np.array([0.0, 1.0, 2.0]), "integers"),
        (np.array([[0], [1], [2]]), "integers"),
        (np.zeros(0, int), "integers"),
        (np.array([-1, 0, 1]), "outside"),
        (np.array([0, 2, 3]), "1 of 4 images are missing, the first is 1"),
    ],
)
def test_impossible_indices_of_chunks(tmp_path, indices, match):
    np.savez(tmp_path / "chunk_00000000_00000002.npz", images=IMAGES, indices=indices)
    with pytest.raises(SfdError, match=match):
        open_image_set(tmp_path)


@pytest.mark.parametrize("text", ["[" * 10**5, "[]", '{"num_images": "x"}'])
def test_impossible_recipes(tmp_path, text):
    np.savez(tmp_path / "chunk_00000000_00000002.npz", images=IMAGES, indices=np.arange(3))
    (tmp_path / "recipe.json").write_text(text)
    with pytest.raises(SfdError, match="recipe.json"):
        open_image_set(tmp_path)
