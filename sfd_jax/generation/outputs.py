"""Outputs of a finished sampling job: one npz, PNGs, a labelled grid."""

import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sfd_jax.class_names import short_names
from sfd_jax.errors import SfdError
from sfd_jax.files import atomic_write
from sfd_jax.generation.job import chunk_files


def write_samples_npz(folder: str | Path) -> Path:
    """Write `samples.npz` with `arr_0` uint8 (N,H,W,3) and `arr_1` int32 (N,), with one chunk in memory at a time.

    Returns:
      Its path. An existing file is kept: files are written atomically, so it is complete.
    """
    folder = Path(folder)
    path = folder / "samples.npz"
    if path.exists():
        return path
    count, size, labels = 0, None, []
    for _, images, chunk_labels in read_chunks(folder):
        count, size = count + len(images), images.shape[1:]
        labels.append(chunk_labels)
    try:
        with atomic_write(path) as part, zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                header = {"descr": "|u1", "fortran_order": False, "shape": (count, *size)}
                np.lib.format.write_array_header_2_0(file, header)
                for _, images, _ in read_chunks(folder):
                    file.write(np.ascontiguousarray(images).data)
            with archive.open("arr_1.npy", "w") as file:
                np.lib.format.write_array(file, np.concatenate(labels).astype(np.int32))
    except OSError as error:
        raise SfdError(f"cannot write {path}: {error}; the chunks are kept, free disk space and run again") from error
    return path


def write_pngs(folder: str | Path) -> Path:
    """Write each sample as `images/<index>.png`, except existing files.

    Returns:
      The folder of the images.
    """
    target = Path(folder) / "images"

    def write(index: int, image: np.ndarray) -> None:
        path = target / f"{index:06d}.png"
        if not path.exists():
            with atomic_write(path) as part:
                Image.fromarray(image).save(part, format="PNG")

    try:
        target.mkdir(exist_ok=True)
        with ThreadPoolExecutor() as pool:
            for indices, images, _ in read_chunks(Path(folder)):
                list(pool.map(write, indices.tolist(), images))
    except OSError as error:
        raise SfdError(f"cannot write PNGs to {target}: {error}") from error
    return target


def write_grid(folder: str | Path, class_names: list[str] | None = None, rows: int = 10, columns: int = 8) -> Path:
    """Write `grid.png`: one row per class, with its name on the left and its first samples.

    Args:
      folder: of a finished job.
      class_names: names of the classes; their numbers by default.
      rows: the most classes to show, evenly spaced among those sampled.
      columns: samples per class.

    Returns:
      The picture's path.
    """
    folder = Path(folder)
    labels = np.concatenate([labels for _, _, labels in read_chunks(folder)])
    present = np.unique(labels)
    shown = present[np.linspace(0, len(present) - 1, min(rows, len(present))).round().astype(int)].tolist()
    found: dict[int, list[np.ndarray]] = {label: [] for label in shown}
    for _, images, chunk_labels in read_chunks(folder):
        for label in shown:
            missing = columns - len(found[label])
            found[label].extend(images[chunk_labels == label][:missing])
        if all(len(samples) == columns for samples in found.values()):
            break
    path = folder / "grid.png"
    short = short_names(class_names) if class_names else None
    names = [short[label] if short else str(label) for label in shown]
    try:
        with atomic_write(path) as part:
            draw_grid(list(found.values()), names).save(part, format="PNG")
    except OSError as error:
        raise SfdError(f"cannot write {path}: {error}") from error
    return path


def draw_grid(rows: list[list[np.ndarray]], names: list[str]) -> Image.Image:
    """Return a picture with a row of images for each name.

    Args:
      rows: the images of each row, uint8 (H,W,3) of one size.
      names: the text of each row.
    """
    height, width = rows[0][0].shape[:2]
    font = ImageFont.load_default(size=max(10, min(20, height // 3)))
    names = [name.split(",")[0] for name in names]  # the first of ImageNet's synonyms
    margin = 8 + int(max(font.getlength(name) for name in names))
    gap = max(1, height // 32)
    grid = Image.new("RGB", (margin + max(map(len, rows)) * (width + gap), len(rows) * (height + gap)), "white")
    draw = ImageDraw.Draw(grid)
    for y, (name, images) in enumerate(zip(names, rows, strict=True)):
        top = y * (height + gap)
        draw.text((4, top + height // 2), name, fill="black", font=font, anchor="lm")
        for x, image in enumerate(images):
            grid.paste(Image.fromarray(image), (margin + x * (width + gap), top))
    return grid


def read_chunks(folder: Path) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield (indices, images, labels) of a finished job, chunk by chunk in order.

    Raises:
      SfdError: there are no chunks, or one is damaged.
    """
    files = chunk_files(folder)
    if not files:
        raise SfdError(f"{folder} holds no chunks; run `sfd sample` first")
    for file in files:
        try:
            with np.load(file) as chunk:
                yield chunk["indices"], chunk["images"], chunk["labels"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise SfdError(f"{file} is damaged ({error}); remove it and sample again") from error
