"""Images on disk: all forms give the same pixels, and each kind of damage has its message."""

import json

import numpy as np
import pytest
from PIL import Image

from sfd_jax.errors import SfdError
from sfd_jax.evaluation.image_sets import open_image_set

IMAGES = np.random.default_rng(0).integers(0, 256, (11, 5, 7, 3), dtype=np.uint8)


def read(image_set, n=4):
    pieces = list(image_set.pieces(n))
    assert all(len(piece) <= n for piece in pieces)
    return np.concatenate(pieces)


def write_pngs(folder, images=IMAGES, names=None):
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{names[i] if names else i}.png")
    return folder


def write_chunks(folder, ranges, recipe=None):
    (folder / "chunks").mkdir(parents=True)
    for first, stop in ranges:
        np.savez(
            folder / "chunks" / f"chunk_{first:08d}_{stop - 1:08d}.npz",
            images=IMAGES[first:stop],
            indices=np.arange(first, stop),
        )
    if recipe:
        (folder / "recipe.json").write_text(json.dumps(recipe))
    return folder


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_is_read_in_pieces(tmp_path, save):
    save(tmp_path / "a.npz", arr_0=IMAGES, arr_1=np.arange(11))
    image_set = open_image_set(tmp_path / "a.npz")
    assert image_set.count == 11
    np.testing.assert_array_equal(read(image_set), IMAGES)


def test_numbered_pngs_are_read_in_the_order_of_their_numbers(tmp_path):
    # 10.png sorts before 2.png as text.
    np.testing.assert_array_equal(read(open_image_set(write_pngs(tmp_path / "png"))), IMAGES)


def test_chunks_are_read_in_order(tmp_path):
    folder = write_chunks(tmp_path / "job", [(0, 4), (4, 11)], {"num_images": 11, "seed": 3})
    image_set = open_image_set(folder)
    np.testing.assert_array_equal(read(image_set, 3), IMAGES)
    assert image_set.count == 11 and image_set.recipe["seed"] == 3


@pytest.mark.parametrize("with_chunks", [False, True])
def test_a_job_without_all_its_chunks_is_its_npz(tmp_path, with_chunks):
    folder = write_chunks(tmp_path / "job", [(0, 4)] if with_chunks else [], {"num_images": 11, "seed": 3})
    np.savez(folder / "samples.npz", arr_0=IMAGES, arr_1=np.zeros(11, int))
    Image.new("RGB", (50, 50)).save(folder / "grid.png")
    image_set = open_image_set(folder)
    np.testing.assert_array_equal(read(image_set), IMAGES)
    assert image_set.recipe["seed"] == 3
    assert image_set.hash() == open_image_set(folder / "samples.npz").hash()


def test_a_job_of_pngs_alone_is_its_images(tmp_path):
    folder = write_chunks(tmp_path / "job", [], {"num_images": 11})
    Image.new("RGB", (50, 50)).save(folder / "grid.png")
    write_pngs(folder / "images")
    np.testing.assert_array_equal(read(open_image_set(folder)), IMAGES)


def short_npz(path):
    folder = write_chunks(path / "j", [], {"num_images": 12})
    np.savez(folder / "samples.npz", arr_0=IMAGES)
    return folder


def short_pngs(path):
    folder = write_chunks(path / "j", [], {"num_images": 13})
    return write_pngs(folder / "images")


def test_hash_follows_the_content(tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=IMAGES)
    np.savez(tmp_path / "b.npz", arr_0=IMAGES + 1)
    a, b = (open_image_set(tmp_path / name).hash() for name in ("a.npz", "b.npz"))
    assert a != b and a == open_image_set(tmp_path / "a.npz").hash()


def test_references_are_cropped_to_a_given_size(tmp_path):
    folder = tmp_path / "photos" / "class"
    folder.mkdir(parents=True)
    Image.new("L", (40, 23), 200).save(folder / "grey.png")
    Image.new("RGB", (9, 31), (1, 2, 3)).save(folder / "tall.jpg")
    images = read(open_image_set(tmp_path / "photos", image_size=8))
    assert images.shape == (2, 8, 8, 3) and (images[0] == 200).all()


def broken_npz(path, **arrays):
    np.savez(path / "x.npz", **arrays)
    return path / "x.npz"


def cut_npz(path):
    file = broken_npz(path, arr_0=IMAGES)
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    return file


def flipped_npz(path):
    file = broken_npz(path, arr_0=IMAGES)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 255
    file.write_bytes(data)
    return file


@pytest.mark.parametrize("chunked", [False, True])
def test_a_changed_byte_of_a_compressed_npz_is_damage_or_changes_nothing(tmp_path, chunked):
    file = tmp_path / ("chunk_00000000_00000010.npz" if chunked else "x.npz")
    arrays = {"images": IMAGES, "indices": np.arange(11)} if chunked else {"arr_0": IMAGES}
    np.savez_compressed(file, **arrays)
    whole, random, named = file.read_bytes(), np.random.default_rng(0), 0
    for place in random.integers(0, len(whole), 200):
        data = bytearray(whole)
        data[place] ^= 1 << random.integers(8)
        file.write_bytes(data)
        try:
            np.testing.assert_array_equal(read(open_image_set(tmp_path if chunked else file)), IMAGES)
        except SfdError as error:
            assert file.name in str(error)
            named += 1
    assert named > 100


def grey_png(path):
    folder = write_pngs(path / "p")
    Image.new("L", (7, 5)).save(folder / "3.png")
    return folder


def odd_size(path):
    folder = write_pngs(path / "p")
    Image.new("RGB", (6, 5)).save(folder / "3.png")
    return folder


def empty(path):
    (path / "empty").mkdir()
    return path / "empty"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: broken_npz(path, images=IMAGES), "x.npz has no array 'arr_0'.*it holds images"),
        (lambda path: broken_npz(path, arr_0=IMAGES / 255.0), "x.npz: arr_0 is float64.*expected uint8"),
        (lambda path: broken_npz(path, arr_0=IMAGES[..., 0]), r"x.npz: arr_0 is uint8 \(11, 5, 7\)"),
        (cut_npz, "cannot read .*x.npz"),
        (flipped_npz, "x.npz.*Bad CRC-32"),
        (grey_png, "3.png is of mode L"),
        (odd_size, "3.png is 6x5, 0.png is 7x5"),
        (empty, "empty holds no image files"),
        (
            lambda path: write_pngs(path / "p", names=[0, 1, 2, 3, 4, 5, 6, 8, 9, 10, 11]),
            "give an image size.*1 of 11 images are missing, the first is 7",
        ),
        (
            lambda path: write_pngs(path / "p", names=[0, 1, 2, 3, 4, 5, "05", 6, 7, 8, 9]),
            "1 indices are duplicated, the first is 5",
        ),
        (lambda path: write_chunks(path / "j", [(0, 4), (6, 11)]), "2 of 11 images are missing, the first is 4"),
        (lambda path: write_chunks(path / "j", [(0, 4), (3, 11)]), "1 indices are duplicated, the first is 3"),
        (lambda path: write_chunks(path / "j", [(0, 9)], {"num_images": 11}), "2 of 11 images are missing"),
        (
            lambda path: write_chunks(path / "j", [], {"num_images": 11}),
            "j is a sampling job without any of its 11 images",
        ),
        (short_npz, "j holds 11 images, but its recipe.json is of 12: finish sampling"),
        (short_pngs, "images holds 11 images, but its recipe.json is of 13: finish sampling"),
        (lambda path: broken_npz(path, arr_0=np.moveaxis(IMAGES, -1, 1)), r"x.npz: arr_0 is uint8 \(11, 3, 5, 7\)"),
        (
            lambda path: broken_npz(path, arr_0=IMAGES / np.float32(127.5) - 1),
            "x.npz: arr_0 is float32.*of bytes 0..255",
        ),
        (lambda path: path / "nowhere", "no images at .*nowhere"),
    ],
)
def test_damage_is_named(tmp_path, make, words):
    with pytest.raises(SfdError, match=words):
        read(open_image_set(make(tmp_path)))
