"""The job makes exactly N samples in spite of kills, and keeps one recipe per folder."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from sfd_jax.diffusion.sample_config import SampleConfig
from sfd_jax.errors import SfdError
from sfd_jax.generation import job
from sfd_jax.generation.job import make_images
from sfd_jax.generation.outputs import write_grid, write_pngs, write_samples_npz
from sfd_jax.settings import to_dict

LABELS = np.arange(53, dtype=np.int32) % 5
RECIPE = {"seed": 1, "model": {"hash": "abc", "step": 7}}


def make(indices, labels):
    """Stand in for a sampler: an image that holds its index and label."""
    images = np.zeros((len(indices), 4, 6, 3), np.uint8)
    images[..., 0], images[..., 1] = indices[:, None, None], labels[:, None, None]
    return images, np.full(len(indices), 9)


def run(folder, make=make, recipe=RECIPE, labels=LABELS, batch_size=7, chunk_size=20):
    make_images(make, labels, folder, recipe=recipe, batch_size=batch_size, chunk_size=chunk_size, progress=False)


def check_complete(folder):
    with np.load(write_samples_npz(folder)) as file:
        np.testing.assert_array_equal(file["arr_0"][:, 0, 0, 0], np.arange(53))
        np.testing.assert_array_equal(file["arr_0"][:, 0, 0, 1], LABELS)
        np.testing.assert_array_equal(file["arr_1"], LABELS)
        assert file["arr_0"].dtype == np.uint8


def test_exactly_n_in_order(tmp_path):
    run(tmp_path)
    check_complete(tmp_path)
    recipe = json.loads((tmp_path / "recipe.json").read_text())
    assert recipe["num_images"] == 53 and recipe["model"]["step"] == 7
    assert recipe["nfe"] == {"mean": 9.0, "min": 9, "max": 9}


def test_an_interrupted_job_makes_only_what_is_missing(tmp_path):
    asked = []

    def failing(indices, labels):
        asked.extend(indices.tolist())
        if indices[0] >= 34:
            raise KeyboardInterrupt
        return make(indices, labels)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, failing)
    assert max(asked) >= 34 and [f.name for f in job.chunk_files(tmp_path)] == ["chunk_00000000_00000019.npz"]
    asked.clear()

    def counting(indices, labels):
        asked.extend(indices.tolist())
        return make(indices, labels)

    run(tmp_path, counting, batch_size=5, chunk_size=11)  # other sizes than before the kill
    assert asked == list(range(20, 53))
    check_complete(tmp_path)
    asked.clear()
    run(tmp_path, counting)
    assert not asked  # a finished job makes nothing


KILLED = """
import sys, time, numpy as np
sys.path[:0] = {paths!r}
import test_job
def slow(indices, labels):
    time.sleep(0.05)
    return test_job.make(indices, labels)
test_job.run({folder!r}, slow, batch_size=2, chunk_size=4)
"""


def test_sigkill_leaves_only_whole_chunks(tmp_path, root):
    paths = [str(root / "tests" / "generation"), str(root)]
    code = KILLED.format(paths=paths, folder=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ})
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("chunks/chunk_*.npz"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert 2 <= len(job.chunk_files(tmp_path)) < 14
    run(tmp_path)
    check_complete(tmp_path)


def test_a_half_written_chunk_is_remade(tmp_path):
    (tmp_path / "chunks").mkdir()
    (tmp_path / "chunks" / "chunk_00000000_00000019.npz.part").write_bytes(b"half")
    run(tmp_path)
    check_complete(tmp_path)
    assert not list(tmp_path.glob("chunks/*.part"))


def test_another_recipe_is_refused_and_nothing_lost(tmp_path):
    run(tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    other = {"seed": 2, "model": {"hash": "abd", "step": 7}}
    with pytest.raises(SfdError, match=r'model.hash: there "abc", here "abd"\n  seed: there 1, here 2'):
        run(tmp_path, recipe=other)
    with pytest.raises(SfdError, match="num_images: there 53, here 5"):
        run(tmp_path, labels=LABELS[:5])
    run(tmp_path, recipe={**RECIPE, "notes": ["notes do not change images"]})
    before[tmp_path / "recipe.json"] = (tmp_path / "recipe.json").read_bytes()
    assert before == {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}


def test_a_job_that_made_nothing_does_not_fix_the_recipe(tmp_path):
    def refuses(indices, labels):
        raise SfdError("nfe = 1: too few")

    with pytest.raises(SfdError, match="too few"):
        run(tmp_path, make=refuses, recipe={**RECIPE, "seed": 2})
    run(tmp_path)
    check_complete(tmp_path)


def test_damaged_and_foreign_chunks_are_named(tmp_path):
    run(tmp_path)
    chunk = job.chunk_files(tmp_path)[1]
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[:300] + b"x" + whole[301:])
    with pytest.raises(SfdError, match=f"{chunk.name} is damaged"):
        run(tmp_path)
    chunk.unlink()
    run(tmp_path)  # the advice of the message works
    check_complete(tmp_path)
    with pytest.raises(SfdError, match="other labels"):
        run(tmp_path, labels=LABELS[::-1].copy())
    (tmp_path / "recipe.json").unlink()
    with pytest.raises(SfdError, match="no recipe.json"):
        run(tmp_path)


def test_pngs_and_grid(tmp_path):
    run(tmp_path)
    folder = write_pngs(tmp_path)
    files = sorted(folder.iterdir())
    assert len(files) == 53
    assert np.asarray(Image.open(files[52]))[0, 0].tolist() == [52, 2, 0]
    grid = np.asarray(Image.open(write_grid(tmp_path, ["a", "b", "c", "d", "e"], columns=3)))
    # Row 2 shows class 2, whose first samples are 2, 7 and 12, in this order.
    shown = grid[2 * 5 + 2, :, 0][grid[2 * 5 + 2, :, 1] == 2]
    assert [v for i, v in enumerate(shown) if i == 0 or v != shown[i - 1]] == [2, 7, 12]


@pytest.mark.parametrize("sizes", [dict(chunk_size=-1), dict(chunk_size=0), dict(batch_size=0), dict(batch_size=2.5)])
def test_invalid_sizes_are_refused(tmp_path, sizes):
    [name] = sizes
    with pytest.raises(SfdError, match=f"{name}={sizes[name]}: give an integer from 1"):
        run(tmp_path / "job", **sizes)
    assert not (tmp_path / "job").exists()


def test_a_recipe_with_a_batch_size_has_a_chunk_size(tmp_path):
    """As in released mode, where dopri5 has one step size per batch, and chunks determine where batches start."""
    recipe = {**RECIPE, "batch_size": 7}
    run(tmp_path, recipe=recipe, chunk_size=20)
    assert json.loads((tmp_path / "recipe.json").read_text())["chunk_size"] == 20
    with pytest.raises(SfdError, match="chunk_size: there 20, here 14"):
        run(tmp_path, recipe=recipe, chunk_size=14)
    run(tmp_path, recipe=recipe, chunk_size=20)


def test_folders_of_older_versions_are_continued(tmp_path):
    """Old recipes lack the chunk size, have -1 or 0 for "not given", and name clocks by their class."""
    sampler = to_dict(SampleConfig(guidance="autoguidance", guidance_scale=1.5))
    clocks = {"name": "fixed_offset", "delta_t": 0.3}
    recipe = {**RECIPE, "batch_size": 7, "sampler": sampler, "clocks": clocks}
    run(tmp_path, recipe=recipe, chunk_size=None)
    old = json.loads((tmp_path / "recipe.json").read_text())
    del old["chunk_size"]
    old["sampler"] |= {
        "guidance_scale_semantic": -1.0,
        "guidance_scale_texture": -1.0,
        "calls": 0,
        "timestep_shift": 0.0,
        "num_steps": 50,  # dopri5 has none
    }
    del old["sampler"]["max_nfe"]
    old["clocks"] = {"name": "FixedOffset", "tau_end": 1.3, "breakpoints": [0.3, 1.0]}
    (tmp_path / "recipe.json").write_text(json.dumps(old))
    run(tmp_path, recipe=recipe, chunk_size=None)
    with pytest.raises(SfdError, match="sampler.guidance_scale: there 1.5, here 2.0"):
        run(tmp_path, recipe=recipe | {"sampler": sampler | {"guidance_scale": 2.0}}, chunk_size=None)
    with pytest.raises(SfdError, match="clocks.delta_t: there 0.3, here 0.4"):
        run(tmp_path, recipe=recipe | {"clocks": clocks | {"delta_t": 0.4}}, chunk_size=None)
    with pytest.raises(SfdError, match="chunk_size: there 1001, here 20"):
        run(tmp_path, recipe=recipe, chunk_size=20)
