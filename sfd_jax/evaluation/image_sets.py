"""Sets of images to evaluate: an npz, a folder of image files, or the folder of a sampling job.

A set is read in order in pieces, so it need not fit into memory. All its images have one size.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from sfd_jax.budget import Budget
from sfd_jax.data.class_folders import EXTENSIONS, walk
from sfd_jax.data.decoding import center_crop, load_image, read_bytes, to_rgb
from sfd_jax.errors import SfdError
from sfd_jax.evaluation.npz import npz_names, open_array, read_npz
from sfd_jax.files import file_sha256

JOB_NPZ = "samples.npz"  # the npz of a sampling job, beside its recipe


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """Images that can be read in order.

    Attributes:
      name: its name in messages and recipes.
      count: number of images.
      pieces: function from n to an iterator of uint8 arrays (<= n, H, W, 3), all images in order.
      hash: function that returns a hex digest of the files; None if there are no files.
      recipe: of the sampling job that made the images, or None.
      size: (H, W); None if unknown before reading.
    """

    name: str
    count: int
    pieces: Callable[[int], Iterator[np.ndarray]]
    hash: Callable[[], str] | None = None
    recipe: dict | None = None
    size: tuple[int, int] | None = None


def image_set_of(name: str, images: np.ndarray) -> ImageSet:
    """Return the set of images in memory, uint8 (N, H, W, 3)."""
    cut = lambda n: (images[start : start + n] for start in range(0, len(images), n))
    digest = lambda: hashlib.sha256(np.ascontiguousarray(images).data).hexdigest()
    return ImageSet(name, len(images), cut, digest, size=images.shape[1:3])


def open_image_set(path: str | Path, image_size: int | None = None) -> ImageSet:
    """Open a set of images.

    Args:
      path: an npz with `arr_0` uint8 (N, H, W, 3), as the ADM suite reads and writes; the folder of a
        sampling job, or of its chunks; or a folder of RGB image files, also in subfolders.
      image_size: crop and resize image files to squares of this size, as the ADM suite does with its
        references; by default the files must all be RGB of one size.

    Returns:
      The set, checked without reading all of it.

    Raises:
      SfdError: images are missing, damaged, incomplete, or not uint8 RGB; the message names the file.
    """
    path = Path(path)
    if path.is_dir():
        images = _open_directory(path, image_size)
    elif path.is_file():
        images = _open_npz(path)
    else:
        raise SfdError(f"no images at {path}: give an npz, or a folder of PNGs or chunks")
    expected = (images.recipe or {}).get("num_images", images.count)
    if images.count != expected:
        raise SfdError(f"{path} holds {images.count} images, but its recipe.json is of {expected}: {_UNFINISHED}")
    return images


_UNFINISHED = "finish sampling (the same `sfd sample` command resumes), or sample again into an empty folder"


def _open_directory(path: Path, image_size: int | None) -> ImageSet:
    if (path / JOB_NPZ).is_file():  # it was written atomically, so it is complete; the chunks may have been removed
        return _open_npz(path / JOB_NPZ)
    for folder in (path, path / "chunks"):
        if chunks := sorted(folder.glob("chunk_*.npz")):
            return _open_chunks(path, chunks)
    expected = (read_recipe(path) or {}).get("num_images")
    if expected is None:
        return _open_folder(path, image_size)
    if not (path / "images").is_dir():
        raise SfdError(f"{path} is a sampling job without any of its {expected} images: {_UNFINISHED}")
    return _open_folder(path / "images", image_size)  # not `path`, since grid.png is not a sample


# --- One npz ----------------------------------------------------------------------------------------


def _open_npz(path: Path) -> ImageSet:
    shape = _images_shape(path, "arr_0")
    return ImageSet(
        str(path),
        shape[0],
        lambda n: _stream_npy(path, "arr_0", n),
        lambda: hash_files([path]),
        read_recipe(path.parent) if path.name == JOB_NPZ else None,
        shape[1:3],
    )


def _stream_npy(path: Path, name: str, n: int) -> Iterator[np.ndarray]:
    """Read an array inside an npz in pieces, since 50,000 images take 10 GB."""
    with open_array(path, name) as (shape, dtype, fortran, file):
        if fortran:
            raise SfdError(f"{path}: {name} is stored in Fortran order; save it again with numpy.savez in C order")
        row = math.prod(shape[1:]) * dtype.itemsize
        Budget(path).take(min(n, shape[0]) * row)
        for start in range(0, shape[0], n):
            count = min(n, shape[0] - start)
            data = file.read(count * row)
            if len(data) != count * row:
                raise SfdError(f"{path} is damaged: {name} ends after {start} of {shape[0]} images")
            yield np.frombuffer(data, dtype).reshape(count, *shape[1:])


def _images_shape(path: Path, name: str) -> tuple[int, ...]:
    names = npz_names(path)
    if name not in names:
        found = ", ".join(names[:8]) or "nothing"
        raise SfdError(f"{path} has no array '{name}' of uint8 images (N, H, W, 3); it holds {found}")
    with open_array(path, name) as (shape, dtype, _, _):
        if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or 0 in shape:
            raise SfdError(f"{path}: {name} is {dtype} {shape}; expected uint8 (N, H, W, 3) of bytes 0..255, N > 0")
        return shape


# --- Chunks of a sampling job -----------------------------------------------------------------------


def _open_chunks(folder: Path, chunks: list[Path]) -> ImageSet:
    """Open the chunks of a job, which must hold each of the images 0..N-1 once."""
    found = []
    for chunk in chunks:
        try:
            rows = read_npz(chunk, ("indices",)).get("indices", np.zeros(0))
        except SfdError as error:
            raise SfdError(f"{error}; remove it and sample again") from error
        if rows.dtype.kind not in "iu" or rows.ndim != 1 or not rows.size:
            raise SfdError(f"{chunk} has no array 'indices' of integers (N,); remove it and sample again")
        found.append(rows)
    recipe = read_recipe(folder) or read_recipe(folder.parent)
    indices = np.concatenate(found)
    count = recipe["num_images"] if recipe and "num_images" in recipe else int(indices.max()) + 1
    _check_indices(indices, count, f"{folder}: chunks")
    if (np.diff(indices) < 0).any():
        raise SfdError(f"{folder}: the images in the chunks are not in order; restore the names of the files")

    size = _images_shape(chunks[0], "images")[1:3]

    def pieces(n):
        for chunk, expected in zip(chunks, found, strict=True):
            shape = _images_shape(chunk, "images")
            if shape[0] != len(expected) or shape[1:3] != size:
                raise SfdError(
                    f"{chunk} holds {shape[0]} images of {shape[2]}x{shape[1]}; expected {len(expected)} of "
                    f"{size[1]}x{size[0]}"
                )
            yield from _stream_npy(chunk, "images", n)

    return ImageSet(str(folder), count, pieces, lambda: hash_files(chunks), recipe, size)


def _check_indices(indices: np.ndarray, count: int, where: str) -> None:
    present, times = np.unique(indices, return_counts=True)
    faults = []
    inside = present[(present >= 0) & (present < count)]
    if len(inside) < count:
        first = np.flatnonzero(np.append(inside, -1) != np.arange(len(inside) + 1))[0]
        faults.append(f"{count - len(inside)} of {count} images are missing, the first is {first}")
    if (times > 1).any():
        faults.append(f"{int((times > 1).sum())} indices are duplicated, the first is {present[times > 1][0]}")
    if strange := [index for index in present.tolist() if not 0 <= index < count]:
        faults.append(f"index {strange[0]} is outside 0..{count - 1}")
    if faults:
        raise SfdError(f"{where}: {'; '.join(faults)}: {_UNFINISHED}")


def read_recipe(folder: Path) -> dict | None:
    """Return the `recipe.json` of a sampling job, None if there is none."""
    try:
        recipe = json.loads((folder / "recipe.json").read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise SfdError(f"cannot read {folder / 'recipe.json'}: {error}") from error
    if not isinstance(recipe, dict) or not isinstance(recipe.get("num_images", 0), int):
        raise SfdError(f"{folder / 'recipe.json'} is not a recipe of `sfd sample`; remove it or copy it again")
    return recipe


# --- Image files ------------------------------------------------------------------------------------


def _open_folder(folder: Path, image_size: int | None) -> ImageSet:
    files = sorted(folder / name for name in walk(folder)[0])
    if not files:
        raise SfdError(f"{folder} holds no image files ({', '.join(EXTENSIONS)}) and no chunks")
    in_one_folder = len({file.parent for file in files}) == 1
    if image_size is None and in_one_folder and all(file.stem.isdecimal() for file in files):
        # Numbered files are from a sampler: a gap means that it was not finished.
        numbers = np.array([int(file.stem) for file in files])
        files = [files[i] for i in np.argsort(numbers, kind="stable")]
        where = f"{folder}: files numbered like samples (give an image size if they are references)"
        _check_indices(numbers - min(1, int(numbers.min())), len(np.unique(numbers)), where)

    def pieces(n):
        first, read = None, lambda file: read_image(file, image_size)
        with ThreadPoolExecutor() as pool:
            ahead = pool.map(read, files[:n])
            for start in range(0, len(files), n):
                now, ahead = ahead, pool.map(read, files[start + n : start + 2 * n])
                images = list(now)
                first = images[0].shape if first is None else first
                for file, image in zip(files[start : start + n], images, strict=True):
                    if image.shape != first:
                        raise SfdError(
                            f"{file} is {image.shape[1]}x{image.shape[0]}, {files[0].name} is "
                            f"{first[1]}x{first[0]}: all images must have one size (or give an image size to "
                            "crop references to)"
                        )
                yield np.stack(images)

    return ImageSet(
        str(folder),
        len(files),
        pieces,
        lambda: hash_files(files, folder),
        read_recipe(folder) or read_recipe(folder.parent),
        read_image(files[0], image_size).shape[:2],
    )


def read_image(file: Path, image_size: int | None = None) -> np.ndarray:
    """Read one image file as uint8 (H, W, 3).

    Args:
      file: its path.
      image_size: side of the centre crop, as in the ADM suite; None: no crop, and the file must be RGB.

    Raises:
      SfdError: the file is not an image, or without `image_size` not 8-bit RGB.
    """
    try:
        image = load_image(read_bytes(file))
        if image_size is not None:
            return center_crop(to_rgb(image), image_size)
    except (OSError, ValueError) as error:
        raise SfdError(f"cannot read image {file}: {error}") from error
    if image.mode != "RGB":
        raise SfdError(f"{file} is of mode {image.mode}; expected 8-bit RGB, as samples are saved")
    return np.asarray(image)


def hash_files(files: list[Path], folder: Path | None = None) -> str:
    """Return a hex digest: the sha256 of one file, or a hash of the names and contents of several.

    Raises:
      SfdError: a file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        if len(files) == 1 and folder is None:
            return file_sha256(files[0])
        for file in files:
            name = file.relative_to(folder).as_posix() if folder else file.name
            digest.update(f"{name} {file_sha256(file)}\n".encode())
    except OSError as error:
        raise SfdError(f"cannot read {error.filename}: {error}") from error
    return digest.hexdigest()
