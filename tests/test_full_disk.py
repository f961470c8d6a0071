"""A full disk ends a command with one sentence and status 2, whichever write fails first.

A limit on the size of files stands in for the disk: every write fails, in Python and in the C++ of Orbax.
"""

import errno
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from sfd_jax.cli.main import run_command
from sfd_jax.data.latent_store import LatentStoreWriter, Plan, latent_fields
from sfd_jax.data.pca import save_pca
from sfd_jax.distributed.heartbeat import Heartbeat
from sfd_jax.evaluation.statistics import FeatureStatistics, save_statistics
from sfd_jax.files import disk_fault, write_json, write_new
from sfd_jax.generation.job import _write_recipe, write_npz
from sfd_jax.generation.outputs import write_grid, write_pngs, write_samples_npz
from sfd_jax.training import save_params
from sfd_jax.training.logging import MetricsLog
from sfd_jax.training.record import claim_workdir

resource = pytest.importorskip("resource")


@pytest.fixture
def full():
    """A function that runs another one while all writes fail."""

    def run(writer):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
        try:
            return writer()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    return run


def chunks(folder):
    (folder / "chunks").mkdir()
    write_npz(
        folder / "chunks" / "chunk_00000000_00000001.npz",
        images=np.zeros((2, 8, 8, 3), np.uint8),
        labels=np.arange(2),
        indices=np.arange(2),
        nfe=np.ones(2),
    )


def metrics_row(folder):
    log = MetricsLog(folder)
    return lambda: log.write(1, {"loss": 1.0})


def events(folder):
    log = MetricsLog(folder)
    log._path = log._path.with_name("elsewhere")  # as if the row had still been written
    os.symlink("/dev/null", log._path)
    return lambda: (log.write(1, {"loss": 1.0}), log.close())


def beat(folder):
    beats = Heartbeat(folder, "train")
    return lambda: (beats._write(), beats.at(1))


def shard(folder):
    fields = latent_fields((4, 4, 8), (4, 4, 4), dtype="float32", flips=False)
    writer = LatentStoreWriter(folder, Plan(20, 16, fields, {}, {}, None))

    def write():
        with writer.open_shard(0) as records:
            for index in writer.plan.span(0):
                records.add(
                    {name: np.ones(field["shape"]) for name, field in fields.items()} | {"label": 0, "index": index}
                )

    return write


def outputs(write):
    def prepare(folder):
        chunks(folder)
        return lambda: write(folder)

    return prepare


PARAMS = {"w": np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)}
STATISTICS = FeatureStatistics("inception", "hash", 3, {"features": (np.ones(2), np.eye(2))}, "here", None)
PIXELS = np.zeros((4, 4, 3), np.uint8)
WRITERS = {
    "run.json": lambda folder: lambda: claim_workdir(folder, {"seed": 1}, False),
    "metrics.jsonl": metrics_row,
    "tensorboard": events,
    "heartbeat": beat,
    "checkpoint": lambda folder: lambda: save_params(folder, PARAMS, {}),
    "chunk": lambda folder: lambda: chunks(folder),
    "recipe": lambda folder: lambda: _write_recipe(folder / "recipe.json", {"seed": 1}),
    "samples.npz": outputs(write_samples_npz),
    "images": outputs(write_pngs),
    "grid.png": outputs(write_grid),
    "scores": lambda folder: lambda: write_new(folder / "scores.json", "{}"),
    "record": lambda folder: lambda: write_json(folder / "record.json", {}),
    "latent plan": lambda folder: lambda: shard(folder),
    "latent shard": shard,
    "pca": lambda folder: lambda: save_pca(folder / "pca.npz", {"mean": np.ones(3)}),
    "statistics": lambda folder: lambda: save_statistics(folder / "s.npz", STATISTICS),
    "picture": lambda folder: lambda: Image.fromarray(PIXELS).save(folder / "picture.png"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_writer_reports_it(name, full, tmp_path, capsys):
    write = WRITERS[name](tmp_path)
    status = full(lambda: run_command(lambda _: bool(write()) and None, "sample", []))
    error = capsys.readouterr().err
    assert status == 2 and error.startswith("sfd sample: ") and "Traceback" not in error
    assert "File too large" in error and (str(tmp_path) in error or name == "picture"), error
    assert error.strip().count("\n") == 0
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and file.name.endswith(".part")]


def test_standard_output_on_a_full_disk():
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full on this system")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "sfd_jax.cli.main"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 2 and done.stderr.startswith("sfd help: cannot write") and "Traceback" not in done.stderr


def test_only_a_closed_standard_output_ends_quietly():
    script = "import sys; from sfd_jax.cli.main import run_command; sys.exit(run_command(lambda _: {}, 'convert', []))"
    printing = "[print('x' * 70) for _ in range(9999)] and 0"
    other = "__import__('os').write(PIPE, b'x')"  # a socket, or a loader's pipe
    closed = "r, PIPE = __import__('os').pipe(); __import__('os').close(r);"
    run = lambda code, **more: subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, **more)
    reader = run(script.format(printing), stdout=subprocess.PIPE)
    reader.stdout.readline()
    reader.stdout.close()
    assert (reader.stderr.read(), reader.wait()) == ("", 0)
    fault = run(closed + script.format(other), stdout=subprocess.PIPE)
    _, error = fault.communicate()
    assert fault.returncode == 1 and "BrokenPipeError" in error


def test_a_score_file_needs_no_hard_links_and_overwrites_nothing(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "link")
    write_new(tmp_path / "scores.json", "first")
    with pytest.raises(FileExistsError):
        write_new(tmp_path / "scores.json", "second")
    assert (tmp_path / "scores.json").read_text() == "first" and os.listdir(tmp_path) == ["scores.json"]


def test_other_faults_are_not_of_the_disk():
    assert disk_fault(FileNotFoundError(errno.ENOENT, "no", "x")) is None and disk_fault(None) is None
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG):
        error = RuntimeError("elsewhere")
        error.__cause__ = OSError(code, "as the system calls it", "there")
        assert "cannot write there" in disk_fault(error)
