"""From bytes to pixels: the exact ADM crop, grey of many bits, decompression bombs, and memory."""

import io
import struct
import subprocess
import sys
import warnings

import numpy as np
import pytest
from PIL import Image

from sfd_jax.data import decoding
from sfd_jax.data.decoding import MAX_PIXELS, THIN, center_crop, to_rgb
from sfd_jax.data.images import BrokenImage, open_images
from sfd_jax.errors import SfdError
from sfd_jax.evaluation.image_sets import read_image

RAMP = np.linspace(0, 65535, 1024).reshape(32, 32)  # its high bytes have the mean 127.5


def adm_crop(image: Image.Image, size: int) -> np.ndarray:
    """Crop by the original's steps, which make the whole resized image."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    pixels = np.asarray(image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC))
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


def test_thin_images_are_cropped_exactly(monkeypatch):
    """Sides up to 2,000, both ways up, halved or not, made larger or smaller."""
    monkeypatch.setattr(decoding, "THIN", 3)
    random, thin = np.random.default_rng(0), 0
    for trial in range(600):
        short, long, size = (int(random.integers(*span)) for span in ((1, 60), (60, 2000), (1, 33)))
        width, height = (short, long) if trial % 2 else (long, short)
        image = Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8))
        thin += long > 3 * short
        np.testing.assert_array_equal(center_crop(image, size), adm_crop(image, size), str((width, height, size)))
    assert thin > 400


@pytest.mark.parametrize("size", [(1, 40), (40, 1), (3, 40), (7, 1000), (1000, 40)])
def test_crop_is_the_original_on_both_sides_of_the_limit(size):
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (*size, 3), np.uint8))
    assert THIN == 16
    np.testing.assert_array_equal(center_crop(image, 8), adm_crop(image, 8))


def test_memory_of_a_crop_is_bounded():
    """In a process of its own, for its peak memory: 64 target squares of 3 x 256 x 256 bytes are 12.6 MB."""
    code = (
        "import resource; from PIL import Image; from sfd_jax.data.decoding import center_crop\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "for size in (1, 4000), (4000, 1), (1, 1_000_000), (300, 10_000), (16 * 256, 256):\n"
        "    image = Image.new('RGB', size); before = peak(); crop = center_crop(image, 256)\n"
        "    assert crop.shape == (256, 256, 3) and peak() - before < 64 * crop.nbytes, (size, peak() - before)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def image_file(tmp_path, name: str, *images: Image.Image, **settings):
    """Write an image into a class folder of its own; return its path."""
    path = tmp_path / "net" / "class" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    images[0].save(path, **({"save_all": True, "append_images": images[1:]} if len(images) > 1 else {}), **settings)
    return path


def both_ways(path, size: int = 32) -> np.ndarray:
    """Return the pixels after checking that extraction and evaluation read the same."""
    source = open_images("folder", str(path.parents[1]), "", size)
    [place] = [i for i in range(len(source)) if source.name(i) == str(path)]
    extracted = source[place]["pixels"]
    np.testing.assert_array_equal(extracted, read_image(path, size))
    return extracted


def broken_both_ways(path, reason: str, size: int = 32) -> None:
    source = open_images("folder", str(path.parents[1]), "", size)
    with pytest.raises(BrokenImage, match=reason):
        source[0]
    with pytest.raises(SfdError, match=f"{path.name}.*{reason}"):
        read_image(path, size)


def test_grey_of_many_bits_has_one_brightness(tmp_path):
    expected = (RAMP.astype(np.uint16) >> 8).astype(np.uint8)
    sixteen = Image.fromarray(RAMP.astype(np.uint16))
    big_endian = tmp_path / "net" / "class" / "e.tif"
    for name, image in {
        "a.png": sixteen,
        "b.pgm": sixteen,
        "c.tif": Image.fromarray(RAMP.astype(np.int32)),
        "d.tif": sixteen,
        "f.tif": Image.fromarray((RAMP / 65535).astype(np.float32)),
    }.items():
        image_file(tmp_path, name, image)
    big_endian.write_bytes(tiff(RAMP.astype(">u2").tobytes(), 16))
    twelve = RAMP.astype(np.uint16) >> 4
    pairs = twelve.reshape(-1, 2).astype(int)
    packed = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], 1).astype(
        np.uint8
    )
    (big_endian.parent / "g.tif").write_bytes(tiff(packed.tobytes(), 12, order="<"))
    for path in sorted(big_endian.parent.iterdir()):
        for channel in range(3):
            np.testing.assert_array_equal(both_ways(path)[..., channel], expected, path.name)


def tiff(data: bytes, bits: int, order: str = ">", photometric: int = 1) -> bytes:
    """Return a grey TIFF of 32 x 32 pixels, uncompressed, 16-bit numbers in the order given."""
    fields = [
        (256, 32),
        (257, 32),
        (258, bits),
        (259, 1),
        (262, photometric),
        (273, 8),
        (277, 1),
        (278, 32),
        (279, len(data)),
    ]
    entries = b"".join(struct.pack(f"{order}HHIHH", tag, 3, 1, value, 0) for tag, value in fields)
    magic = {">": b"MM", "<": b"II"}[order]
    return (
        struct.pack(f"{order}2sHI", magic, 42, 8 + len(data))
        + data
        + struct.pack(f"{order}H", len(fields))
        + entries
        + bytes(4)
    )


def test_dark_pgm_is_dark_but_a_unclear_range_is_refused(tmp_path):
    dark = np.full((32, 32), 255)
    assert (both_ways(image_file(tmp_path / "a", "a.pgm", Image.fromarray(dark.astype(np.uint16)))) == 0).all()
    for place, (values, reason) in enumerate(
        {
            "eight bits": (dark.astype(np.int32), "32-bit grey from 255 to 255"),
            "eight of sixteen bits": (dark.astype(np.uint16), "16-bit grey from 255 to 255"),
            "all bits": (np.full((32, 32), 2**30, np.int32), "32-bit grey from 1073741824"),
            "negative": (-dark.astype(np.int32), "32-bit grey from -255"),
            "bytes as floats": (dark.astype(np.float32), "floating-point grey from 255 to 255; expected 0 to 1"),
            "not a number": (np.full((32, 32), np.nan, np.float32), "floating-point grey from nan"),
        }.values()
    ):
        broken_both_ways(image_file(tmp_path / f"b{place}", "a.tif", Image.fromarray(values)), reason)
    assert (both_ways(image_file(tmp_path / "c", "a.tif", Image.fromarray(0 * dark.astype(np.int32)))) == 0).all()
    inverted = tmp_path / "d" / "class" / "a.tif"
    inverted.parent.mkdir(parents=True)
    inverted.write_bytes(tiff(RAMP.astype("<u2").tobytes(), 16, "<", photometric=0))
    broken_both_ways(inverted, "in which 0 is white")


def test_every_mode_gives_the_same_pixels_both_ways(tmp_path):
    """Transparency is dropped, what it hides is shown, as by Pillow's convert; the first frame is taken."""
    red = Image.new("RGB", (32, 32), (255, 0, 0))
    clear = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    palette = red.convert("P", palette=Image.Palette.ADAPTIVE)
    for name, image, settings in [
        ("a.png", clear, {}),
        ("b.png", palette, {"transparency": b"\x00\x80"}),
        ("c.gif", palette, {"transparency": 0}),
        ("d.webp", clear, {"lossless": True, "exact": True}),
        ("e.tif", red.convert("CMYK"), {}),
        ("f.bmp", red, {}),
    ]:
        np.testing.assert_array_equal(both_ways(image_file(tmp_path, name, image, **settings))[0, 0], [255, 0, 0], name)
    blue = Image.new("RGB", (32, 32), (0, 0, 255))
    for name in ("g.gif", "h.tif", "i.png"):
        np.testing.assert_array_equal(both_ways(image_file(tmp_path, name, red, blue))[0, 0], [255, 0, 0], name)
    bits = image_file(tmp_path, "j.png", Image.fromarray(RAMP > 32767))
    assert set(np.unique(both_ways(bits))) == {0, 255}
    grey = image_file(tmp_path, "k.png", Image.new("LA", (32, 32), (200, 0)))
    assert (both_ways(grey) == 200).all()
    turned = Image.fromarray(np.arange(32 * 32, dtype=np.uint8).reshape(32, 32))
    exif = turned.getexif()
    exif[0x0112] = 6  # "turn by 90 degrees", which is ignored
    np.testing.assert_array_equal(
        both_ways(image_file(tmp_path, "l.png", turned, exif=exif))[..., 0], np.asarray(turned)
    )


@pytest.mark.parametrize("filters", ["ignore", "error"])  # Pillow itself only warns of the first one
def test_bombs_are_broken_both_ways(tmp_path, filters):
    side = int(MAX_PIXELS**0.5) + 1
    with warnings.catch_warnings():
        warnings.simplefilter(filters)
        for place, size in enumerate([(side, side), (2 * side, side), (20_000, 20_000)]):
            path = image_file(tmp_path / str(place), "bomb.png", Image.new("1", size))
            assert path.stat().st_size < 100_000
            broken_both_ways(path, "larger than the limits of 89,478,485 pixels")


def test_pillows_warnings_are_not_printed(tmp_path):
    """In a process of its own: pytest has its own filters of warnings."""
    path = image_file(tmp_path, "bomb.png", Image.new("1", (10_000, 10_000)))
    code = (
        f"from sfd_jax.data.images import open_images\ntry: open_images('folder', {str(path.parents[1])!r}, '', 8)[0]\n"
        "except Exception as e: print(e)"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True, text=True)
    assert "larger than the limits of 89,478,485 pixels" in run.stdout and run.stderr == ""


def test_a_huge_file_is_read_up_to_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "MAX_BYTES", 1000)
    path = image_file(tmp_path, "a.bmp", Image.new("RGB", (100, 100)))
    assert len(decoding.read_bytes(path)) == 1001
    broken_both_ways(path, "1,000 bytes; make it smaller")


@pytest.mark.filterwarnings("ignore")
def test_any_damage_is_a_broken_image(tmp_path):
    """Bytes changed at random: pixels or a reason, never another exception; and no program is started for EPS."""
    random = np.random.default_rng(0)
    picture = Image.fromarray(random.integers(0, 256, (24, 24, 3), np.uint8))
    for kind in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM"):
        buffer = io.BytesIO()
        picture.save(buffer, kind)
        for _ in range(60):
            data = bytearray(buffer.getvalue())
            for place in random.integers(0, min(len(data), 200), 3):
                data[place] = random.integers(256)
            try:
                assert center_crop(to_rgb(bytes(data)), 8).shape == (8, 8, 3)
            except ValueError as error:
                assert str(error) and "0x" not in str(error)
    with pytest.raises(ValueError, match="known format"):
        to_rgb(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
