"""The job that makes exactly N images, in chunks that are written atomically, and can be resumed.

The folder of a job:

    recipe.json                          what determines the images: checkpoints, sampler, labels, seed, N
    chunks/chunk_<first>_<last>.npz      images uint8 (n,H,W,3), labels, indices, nfe (n,)
    samples.npz                          all of them: arr_0 images, arr_1 labels (the ADM suite's form)
    images/<index>.png, grid.png         if requested

A killed job continues with the indices that no chunk holds; a folder with another recipe is refused. Since sample i
depends on the recipe and i alone, batch size, chunk size and devices may change in between (unless the recipe holds
the batch size: then batch and chunk sizes must stay the same).
"""

import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from sfd_jax.diffusion.sample_config import SampleConfig
from sfd_jax.distributed import is_host0
from sfd_jax.errors import SfdError
from sfd_jax.files import PART, atomic_write, differences, write_json
from sfd_jax.progress import ProgressBar
from sfd_jax.ranges import RULES, check, useless
from sfd_jax.settings import over_defaults

# make(indices (n,), labels (n,)) -> (images uint8 (n,H,W,3), network evaluations (n,))
Make = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def make_images(
    make: Make,
    labels: np.ndarray,
    folder: str | Path,
    *,
    recipe: dict[str, Any],
    batch_size: int = 64,
    chunk_size: int | None = None,
    progress: bool = True,
) -> None:
    """Make sample i with labels[i] for every i, or continue a job that was killed.

    All hosts must call this; host 0 reads and writes the folder.

    Args:
      make: makes images, e.g. `partial(sampler, batch_size=batch_size)`, which pads smaller batches.
      labels: (N,) int32.
      folder: the folder of the job.
      recipe: JSON-able description of everything that determines the images; `num_images` is added.
      batch_size: images per call of `make`.
      chunk_size: images in a chunk, the most that a kill can lose; by default about 1,000. It is added to the recipe
        if `batch_size` is in it.
      progress: show a bar with images per second and remaining time on stderr.

    Raises:
      SfdError: the folder holds samples of another recipe or a damaged chunk, or cannot be written.
    """
    check(num=len(labels), batch_size=batch_size, chunk_size=chunk_size)
    folder = Path(folder)
    num = len(labels)
    chunk_size = chunk_size or _default_chunk(batch_size)
    recipe = {**recipe, "num_images": num}
    if "batch_size" in recipe:  # samples of a batch depend on each other, and chunks determine where batches start
        recipe["chunk_size"] = chunk_size
    missing = _on_host0(lambda: _prepare(folder, recipe, labels), num)
    bar = ProgressBar(
        total=num,
        initial=num - int(missing.sum()),
        desc="sampling",
        unit="img",
        disable=not (progress and is_host0()),
    )
    with bar:
        for first, stop in _runs(missing, chunk_size):
            images, nfe = [], []
            for start in range(first, stop, batch_size):
                indices = np.arange(start, min(start + batch_size, stop))
                made, made_nfe = make(indices, labels[indices])
                images.append(made)
                nfe.append(made_nfe)
                bar.update(len(indices))
            if is_host0():
                if not (folder / "recipe.json").exists():  # only now: a job that made nothing must not fix the recipe
                    _write_recipe(folder / "recipe.json", recipe)
                write_npz(
                    folder / "chunks" / f"chunk_{first:08d}_{stop - 1:08d}.npz",
                    images=np.concatenate(images),
                    labels=labels[first:stop],
                    indices=np.arange(first, stop),
                    nfe=np.concatenate(nfe),
                )
    if is_host0():
        _finish_recipe(folder, recipe)


def _default_chunk(batch_size: int) -> int:
    """Return about 1,000, a multiple of the batch size."""
    return batch_size * -(-1000 // batch_size)


def _on_host0(prepare: Callable[[], np.ndarray], num: int) -> np.ndarray:
    """Return host 0's result, (num,) bool, on every host; if host 0 raises SfdError, every host does."""
    if jax.process_count() == 1:
        return prepare()
    answer, refusal = np.zeros(num + 1, np.uint8), None
    if is_host0():
        try:
            answer[:num] = prepare()
        except SfdError as error:
            answer[num], refusal = 1, error
    answer = multihost_utils.broadcast_one_to_all(answer)
    if answer[num]:
        raise refusal or SfdError("host 0 refused the job; see its message")
    return answer[:num].astype(bool)


def _prepare(folder: Path, recipe: dict, labels: np.ndarray) -> np.ndarray:
    """Check the folder and return which indices are missing, (N,) bool."""
    chunks = folder / "chunks"
    path = folder / "recipe.json"
    try:
        chunks.mkdir(parents=True, exist_ok=True)
        for leftover in chunks.glob(f"*{PART}"):  # a chunk that was being written when the job was killed
            leftover.unlink()
    except OSError as error:
        raise SfdError(f"cannot write to {folder}: {error}") from error
    if path.exists():
        _check_same_recipe(path, recipe)
    elif present := [file for file in (folder / "samples.npz", *chunks.glob("*.npz")) if file.exists()]:
        raise SfdError(f"{folder} holds {present[0].name} but no recipe.json; choose an empty folder")
    missing = np.ones(len(labels), bool)
    for file in sorted(chunks.glob("chunk_*.npz")):
        indices = _check_chunk(file, labels)
        if not missing[indices].all():
            raise SfdError(f"{file} holds samples that are in another chunk too; remove one of them")
        missing[indices] = False
    return missing


def _check_same_recipe(path: Path, recipe: dict) -> None:
    try:
        old = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SfdError(f"cannot read {path}: {error}; choose another folder") from error
    if "batch_size" in old:
        old.setdefault("chunk_size", _default_chunk(old["batch_size"]))  # old recipes lack it
    # The file of a finished job also holds its results.
    old = {key: value for key, value in old.items() if key in recipe}
    differing = differences(_decisive(_upgraded(old)), _decisive(_upgraded(recipe)))
    if differing:
        lines = "\n  ".join(differing.values())
        raise SfdError(f"{path.parent} holds samples of another recipe; choose another folder:\n  {lines}")


def _upgraded(recipe: dict) -> dict:
    """Return a recipe in today's form: old ones describe clocks by class, end and breakpoints, and lack settings."""
    clocks = recipe.get("clocks") or {}
    sampler = over_defaults(SampleConfig, recipe.get("sampler") or {})
    if "tau_end" in clocks:
        name = {"FixedOffset": "fixed_offset"}.get(clocks["name"], clocks["name"].lower())
        clocks = {"name": name} | ({"delta_t": clocks["breakpoints"][0]} if name == "fixed_offset" else {})
    return recipe | {key: value for key, value in {"clocks": clocks, "sampler": sampler}.items() if key in recipe}


def _decisive(recipe: dict) -> dict:
    """Leave out what does not change the images: notes, and settings of the sampler without effect."""
    sampler = recipe.get("sampler", {})
    idle = useless(RULES["sample"], sampler, sampler)
    kept = {name: value for name, value in recipe.items() if name != "notes"}
    return kept | {"sampler": {name: value for name, value in sampler.items() if name not in idle}}


def _check_chunk(file: Path, labels: np.ndarray) -> np.ndarray:
    """Check that a finished chunk is undamaged and has these labels, and return its indices."""
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
        with np.load(file) as chunk:
            indices, stored = chunk["indices"], chunk["labels"]
    except Exception as error:  # zipfile and numpy raise many types for damaged files
        damaged = str(error) or type(error).__name__
    if damaged:
        raise SfdError(f"{file} is damaged ({damaged}); remove it and run again to remake it")
    if indices.max() >= len(labels) or not np.array_equal(labels[indices], stored):
        raise SfdError(f"{file} holds other labels than this job; choose another folder")
    return indices


def _runs(missing: np.ndarray, chunk_size: int) -> Iterator[tuple[int, int]]:
    """Yield (first, stop) of consecutive missing indices, at most chunk_size at a time."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], missing.astype(np.int8), [0]])))
    for begin, end in edges.reshape(-1, 2).tolist():
        for first in range(begin, end, chunk_size):
            yield first, min(first + chunk_size, end)


def _finish_recipe(folder: Path, recipe: dict) -> None:
    """Add the network evaluations per sample, known only when the job is finished."""
    nfe = []
    for file in chunk_files(folder):
        with np.load(file) as chunk:
            nfe.append(chunk["nfe"])
    nfe = np.concatenate(nfe)
    summary = {"mean": float(nfe.mean()), "min": int(nfe.min()), "max": int(nfe.max())}
    _write_recipe(folder / "recipe.json", {**recipe, "nfe": summary, "complete": True})


def chunk_files(folder: Path) -> list[Path]:
    """Return a job's chunks in order of their images."""
    return sorted((folder / "chunks").glob("chunk_*.npz"))


def write_npz(path: Path, **arrays: np.ndarray) -> None:
    """Write an npz atomically.

    Raises:
      SfdError: it cannot be written; no partial file is left.
    """
    try:
        with atomic_write(path) as part, open(part, "wb") as file:
            np.savez(file, **arrays)
    except OSError as error:
        raise SfdError(f"cannot write {path}: {error}; finished chunks are kept, run again to continue") from error


def _write_recipe(path: Path, recipe: dict) -> None:
    try:
        write_json(path, recipe)
    except OSError as error:
        raise SfdError(f"cannot write {path}: {error}") from error
