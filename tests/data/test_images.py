"""Image sources: the ADM crop, odd and broken files, and the digits' split."""

import io

import numpy as np
import pytest
from PIL import Image

from sfd_jax.data.digits import digits_8x8
from sfd_jax.data.images import BrokenImage, BrokenImages, center_crop, open_images, to_rgb
from sfd_jax.errors import SfdError


def test_crop_equals_its_steps_done_by_hand():
    """70x46 to 11: halved by numpy where the sizes are even, then Pillow's own resizes, then a cut."""
    pixels = np.random.default_rng(0).integers(0, 256, (46, 70, 3), np.uint8)
    halved = Image.fromarray(halve(pixels)).resize((17, 11), Image.BOX)  # 35x23: 23 >= 22 halves again
    resized = np.asarray(halved.resize((17, 11), Image.BICUBIC))
    np.testing.assert_array_equal(center_crop(Image.fromarray(pixels), 11), resized[:, 3:14])


def test_crop_to_half_is_the_mean_of_blocks():
    pixels = np.random.default_rng(1).integers(0, 256, (14, 26, 3), np.uint8)
    expected = halve(pixels)[:, 3:10]
    np.testing.assert_array_equal(center_crop(Image.fromarray(pixels), 7), expected)


def halve(pixels):
    """Means of 2x2 blocks; rows first and rounded half up between, as an 8-bit box filter does."""
    pixels = pixels.astype(int)
    rows = (pixels[:, ::2] + pixels[:, 1::2] + 1) // 2
    return ((rows[::2] + rows[1::2] + 1) // 2).astype(np.uint8)


@pytest.mark.parametrize("size", [(5, 300), (300, 5), (31, 31), (17, 16), (64, 33)])
def test_crop_of_any_shape_is_square(size):
    crop = center_crop(Image.new("RGB", size, (10, 20, 30)), 16)
    assert crop.shape == (16, 16, 3)
    np.testing.assert_array_equal(crop, np.broadcast_to([10, 20, 30], crop.shape))  # a flat image stays


def test_odd_images_become_rgb():
    grey = np.arange(35, dtype=np.uint8).reshape(5, 7)
    assert (np.asarray(to_rgb(grey)) == grey[..., None]).all()
    deep = Image.fromarray(grey.astype(np.uint16) * 257)  # 16 bits: the high byte counts
    assert (np.asarray(to_rgb(deep)) == grey[..., None]).all()
    cmyk = Image.new("CMYK", (3, 2), (0, 255, 255, 0))
    assert to_rgb(encoded(cmyk, "JPEG")).mode == "RGB"
    red = np.asarray(to_rgb(cmyk))[0, 0]
    np.testing.assert_array_equal(red, [255, 0, 0])
    palette = Image.new("RGB", (3, 2), (255, 0, 0)).convert("P")
    np.testing.assert_array_equal(np.asarray(to_rgb(encoded(palette, "PNG")))[0, 0], [255, 0, 0])


def test_folder_reads_labels_names_and_broken_files(tmp_path):
    for number, name in enumerate(("apple", "pear")):
        (tmp_path / "train" / name).mkdir(parents=True)
        for image in range(3):
            path = tmp_path / "train" / name / f"{image}.png"
            Image.new("RGB", (9 + image, 20), (number, image, 0)).save(path)
    (tmp_path / "train" / "pear" / "1.png").write_bytes(b"not an image")
    whole = (tmp_path / "train" / "pear" / "2.png").read_bytes()
    (tmp_path / "train" / "pear" / "2.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "train" / "pear" / "notes.txt").write_text("passed over")
    source = open_images("folder", str(tmp_path), "train", 8)
    assert len(source) == 6 and source.class_names == ["apple", "pear"]
    assert [source[i]["label"] for i in range(4)] == [0, 0, 0, 1]
    np.testing.assert_array_equal(source[2]["pixels"][0, 0], [0, 2, 0])
    broken = BrokenImages(limit=1)
    with pytest.raises(BrokenImage, match="pear/1.png"):
        source[4]
    with pytest.raises(SfdError, match="2 broken images") as caught:
        for index in (4, 4, 5):
            try:
                source[index]
            except BrokenImage as fault:
                broken.add(fault)
    assert "pear/1.png" in str(caught.value) and "pear/2.png" in str(caught.value)


def test_digits_split_is_fixed_and_stratified():
    images, labels = digits_8x8("train")
    held_out, held_out_labels = digits_8x8("held_out")
    assert images.shape == (1437, 8, 8) and held_out.shape == (360, 8, 8)
    np.testing.assert_array_equal(np.bincount(held_out_labels), [36] * 10)
    # Every digit is in exactly one of the two: their sums add up to the whole set's.
    assert images.sum() + held_out.sum() == digits_8x8("all")[0].sum()
    # The split itself, so that no later change moves it unseen.
    assert (labels[:8].tolist(), held_out_labels[:8].tolist()) == SPLIT


SPLIT = ([0, 1, 2, 4, 5, 6, 8, 9], [3, 7, 3, 9, 0, 8, 7, 0])


def test_digits_as_images():
    source = open_images("digits", "", "held_out", 32)
    levels, labels = digits_8x8("held_out")
    item = source[7]
    assert item["pixels"].shape == (32, 32, 3) and item["pixels"].dtype == np.uint8
    assert item["label"] == labels[7] and item["index"] == 7
    assert source.class_names == [str(d) for d in range(10)]
    grey = Image.fromarray(np.round(levels[7] / 16 * 255).astype(np.uint8))
    expected = np.asarray(grey.resize((32, 32), Image.BICUBIC))
    np.testing.assert_array_equal(item["pixels"], np.repeat(expected[..., None], 3, -1))


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(SfdError, match="did you mean 'digits'"):
        open_images("digit", "", "train", 32)
    with pytest.raises(SfdError, match="did you mean 'held_out'"):
        open_images("digits", "", "heldout", 32)


def encoded(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()
