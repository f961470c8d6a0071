"""Decode an image file to a square of pixels, in the same way for training, extraction and evaluation.

The first frame of an animation or page of several is taken, transparency is dropped (the colours below it
stay), and EXIF orientation is ignored, as the ADM suite does with Pillow's `convert("RGB")`. Grey of more
than 8 bits keeps its high byte, as Pillow does with 16-bit colour.

Memory: a file of more than MAX_BYTES or an image of more than MAX_PIXELS is refused before it is decoded, and a crop
allocates, besides the decoded image, less than 4 * THIN times the target square.
"""

import io
import logging
import os
import warnings

import numpy as np
import PIL
from PIL import Image, UnidentifiedImageError

MAX_PIXELS = 89_478_485  # Pillow's own limit, beyond which it warns of a decompression bomb; 1,365 squares of 256 px
MAX_BYTES = 4 * MAX_PIXELS  # of a file
PILLOW = int(PIL.__version__.partition(".")[0])
THIN = 16  # ratio of the sides beyond which a crop computes only the pixels that it keeps
# Not all of Pillow's: it passes EPS to another program.
FORMATS = ("BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")

# Pillow warns of odd metadata and of large images; what matters is reported as a broken image.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)


def read_bytes(path: str | os.PathLike) -> bytes:
    """Read an image file, up to the size that `load_image` refuses.

    Raises:
      OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        return file.read(MAX_BYTES + 1)


def load_image(data: bytes) -> Image.Image:
    """Decode an image file.

    Raises:
      ValueError: not a complete image of a known format, or larger than the limits of this module; with the reason.
    """
    too_large = f"larger than the limits of {MAX_PIXELS:,} pixels and {MAX_BYTES:,} bytes; make it smaller"
    if len(data) > MAX_BYTES:
        raise ValueError(too_large)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height <= MAX_PIXELS:
            image.load()
            return image
    except MemoryError:
        raise
    except UnidentifiedImageError as error:  # its message contains a memory address
        raise ValueError("not an image of a known format") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(too_large) from error
    except Exception as error:  # Pillow raises a dozen types for broken files, depending on the format
        raise ValueError(str(error) or type(error).__name__) from error
    raise ValueError(too_large)


def to_rgb(image: bytes | np.ndarray | Image.Image) -> Image.Image:
    """Return an image of any kind as a Pillow image in RGB.

    Args:
      image: encoded bytes, an array (H,W), (H,W,1) or (H,W,3) of uint8 (or grey uint16), or a Pillow image.

    Raises:
      ValueError: the bytes are not a complete image, or grey of more than 8 bits whose range is unclear.
    """
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image[..., 0] if image.ndim == 3 and image.shape[-1] == 1 else image)
    elif not isinstance(image, Image.Image):
        image = load_image(image)
    image.load()
    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(_eight_bits(image))
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> np.ndarray:
    """Return grey of more than 8 bits as uint8 (H,W)."""
    values = np.asarray(image)
    low, high = values.min(), values.max()
    tags = image.tag_v2 if image.format == "TIFF" else {}
    if tags.get(262) == 0:
        raise ValueError("grey of more than 8 bits in which 0 is white; save it with 0 as black")
    if image.mode == "F":
        if not (low >= 0 and high <= 1):  # also where one is NaN
            raise ValueError(f"floating-point grey from {low:g} to {high:g}; expected 0 to 1")
        values = np.round(values * np.float32(65535)).astype(np.uint16)
    bits = 12 if tags.get(258) == (12,) else 16
    # PGM declares its range and Pillow scales it to 16 bits. Other 32-bit files hold numbers of any range, and a 16-bit
    # image that would be all black is probably one of 8 bits.
    if image.mode != "F" and (low < 0 or high > 65535 or (0 < high < 2 ** (bits - 8) and image.format != "PPM")):
        size = 32 if image.mode == "I" else bits
        raise ValueError(f"{size}-bit grey from {low} to {high}, whose range is not clear; save it with 8 or 16 bits")
    return (values >> (bits - 8)).astype(np.uint8)


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """Crop the central square the way the ADM suite does.

    Args:
      image: RGB, any size.
      size: side of the result, in pixels.

    Returns:
      uint8 (size, size, 3).

    Source: `center_crop_arr` of guided-diffusion: halve with a box filter while the shorter side is
      at least twice the target, resize it to the target bicubic, cut out the middle.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    left, top = (width - size) // 2, (height - size) // 2
    if max(width, height) <= THIN * size:
        pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
        return np.ascontiguousarray(pixels[top : top + size, left : left + size])
    tall = image.height > image.width * (1 if PILLOW >= 13 else 100)
    rows_first = tall and height < image.height
    (x, columns), (y, rows) = _taps(image.width, width, left, size), _taps(image.height, height, top, size)
    image = image.crop((x.min(), y.min(), x.max() + 1, y.max() + 1))  # before the conversion to an array
    axes = [(1, x - x.min(), columns), (0, y - y.min(), rows)]
    # Pillow rounds between its two passes, and begins with the rows when it shrinks a tall image; before version 13 a
    # hundred times taller than wide.
    pixels = np.asarray(image)
    for axis, places, weights in reversed(axes) if rows_first else axes:
        pixels = _weighted(pixels.swapaxes(0, axis), places, weights).swapaxes(0, axis)
    return np.ascontiguousarray(pixels)


def _taps(source: int, target: int, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the taps of Pillow's bicubic resize of one axis for the pixels [first, first + count) of `target`.

    Returns:
      Indices in the source and their weights in units of 2^-22, int64 (count, taps).

    Source: `precompute_coeffs` and `normalize_coeffs_8bpc` of Pillow's Resample.c.
    """
    scale = source / target
    stretch = max(scale, 1.0)
    centers = (np.arange(first, first + count)[:, None] + 0.5) * scale
    start = np.maximum((centers - 2 * stretch + 0.5).astype(np.int64), 0)
    stop = np.minimum((centers + 2 * stretch + 0.5).astype(np.int64), source)
    places = start + np.arange((stop - start).max())[None]
    x = np.abs((places - centers + 0.5) * (1 / stretch))
    a = -0.5
    near, far = ((a + 2) * x - (a + 3)) * x * x + 1, (((x - 5) * x + 8) * x - 4) * a
    weights = np.where(x < 1, near, np.where(x < 2, far, 0.0)) * (places < stop)
    weights /= np.cumsum(weights, axis=1)[:, -1:]  # summed one by one, as in Pillow
    return np.minimum(places, source - 1), np.trunc(weights * 2**22 + np.copysign(0.5, weights)).astype(np.int64)


def _weighted(pixels: np.ndarray, places: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the weighted sums of rows of pixels uint8 (H,W,3), one for each row of places (N, taps)."""
    total = np.full((len(places), *pixels.shape[1:]), 1 << 21, np.int64)
    for tap in range(places.shape[1]):
        total += pixels[places[:, tap]] * weights[:, tap, None, None]
    return np.clip(total >> 22, 0, 255).astype(np.uint8)
