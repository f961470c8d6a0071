"""The notebooks of scripts/colab: stored without outputs, and run to the end on the digits."""

import base64
import importlib.util
import io
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from sfd_jax.training.logging import read_metrics

NOTEBOOKS = ("sfd_demo", "sfd_train")


def read_notebook(root, name):
    nbformat = pytest.importorskip("nbformat", reason="nbformat comes with the extra `dev`: bash scripts/setup.sh dev")
    return nbformat.read(root / f"scripts/colab/{name}.ipynb", as_version=4)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_notebooks_are_stored_without_outputs(root, name):
    cells = [cell for cell in read_notebook(root, name).cells if cell.cell_type == "code"]
    assert cells and not any(cell.outputs or cell.execution_count for cell in cells)
    assert all(len(cell.source.splitlines()) <= 30 for cell in cells), "logic belongs in the library"


@pytest.fixture
def execute(root, quick, tiny_demo, tmp_path, monkeypatch):
    """Return a function that runs a notebook with settings, on a copy of a finished demo.

    The function returns all that was printed, and the pictures by cell.
    """
    from nbclient import NotebookClient

    for name, value in quick.items():
        monkeypatch.setenv(name, value)
    # Use this Python as the kernel.
    kernel = tmp_path / "kernels/kernels/python3"
    kernel.mkdir(parents=True)
    kernel.joinpath("kernel.json").write_text(
        f'{{"argv": ["{sys.executable}", "-m", "ipykernel_launcher", "-f", "{{connection_file}}"], '
        '"display_name": "Python 3", "language": "python"}'
    )
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "kernels"))
    shutil.copytree(tiny_demo.folder, tmp_path / "demo_out")

    def run(notebook, **settings):
        settings |= {"DIGITS_CONFIG": "configs/digits.py:tiny", "DIGITS_FOLDER": str(tmp_path / "demo_out")}
        [cell] = (cell for cell in notebook.cells if cell.id == "settings")
        assert all(f"\n{name} = " in cell.source for name in settings)
        cell.source += "".join(f"\n{name} = {value!r}" for name, value in settings.items())
        where = {"metadata": {"path": str(root / "scripts/colab")}}  # where a user opens it
        NotebookClient(notebook, timeout=600, kernel_name="python3", resources=where).execute()  # raises a cell's error
        pictures, text = {}, ""
        for cell in notebook.cells:
            for output in cell.get("outputs", []):
                assert output.output_type != "error"
                text += output.get("text", "")
                if "image/png" in output.get("data", {}):
                    bytes_ = base64.b64decode(output.data["image/png"])
                    picture = np.asarray(Image.open(io.BytesIO(bytes_)).convert("RGB"))
                    pictures.setdefault(cell.id, []).append(picture)
        assert "the pinned packages are installed" in text and text.count("already done") == 9
        return text, pictures

    return run


def stages_of(notebook):
    (cell,) = (cell for cell in notebook.cells if cell.source == "pipeline.stages(images.labels[0])")
    return cell.outputs[0].data["text/html"]


@pytest.mark.slow
def test_the_demo_notebook_draws_digits(root, execute):
    notebook = read_notebook(root, "sfd_demo")
    text, pictures = execute(notebook)
    assert "40 pictures, 24 network evaluations each" in text
    assert stages_of(notebook).count("data:image/png;base64,") == 2 * 8
    [samples] = pictures.pop("samples")
    assert not pictures
    height, width, _ = samples.shape
    assert height == 10 * 132 and width > 4 * 132, "ten classes, four digits each, enlarged four times"
    # Each of the forty tiles has a picture that is not flat.
    tiles = samples[:, -4 * 132 :].reshape(10, 132, 4, 132, 3)
    assert (tiles.std(axis=(1, 3, 4)) > 2).all()


@pytest.mark.slow
def test_the_training_notebook_shows_previews_and_samples_the_best_checkpoint(root, execute, tmp_path):
    notebook, run = read_notebook(root, "sfd_train"), tmp_path / "run"
    small = [f"model.{name}=1" for name in ("depth", "repa_depth")] + ["model.repa_features=32", "model.repa_width=32"]
    small += ["train.global_batch_size=8", "optimizer.learning_rate=0.1", "train.ema_decay=0.5"]
    flags = " ".join(f"--config.{flag}" for flag in small)
    text, pictures = execute(notebook, RUN=str(run), STEPS=4, EVERY=2, SCORED=40, FLAGS=flags)
    assert f"{run}/previews/step_00000004.png" in text
    history = {row["step"]: row["fd_encoder_w32_d1_p8_reg4"] for row in read_metrics(run)}
    best = min(history, key=history.get)
    assert list(history) == [2, 4] and text.count("<- best") == 1
    for step, score in history.items():
        assert f"{step}  fd_encoder_w32_d1_p8_reg4 {score:8.2f}{'  <- best' * (step == best)}\n" in text
    assert f"kept: {' '.join(map(str, sorted({best, 4})))}\n" in text
    preview, plot = pictures.pop("watch")  # of the last preview; earlier ones were replaced
    np.testing.assert_array_equal(preview, np.asarray(Image.open(run / "previews/step_00000004.png").convert("RGB")))
    np.testing.assert_array_equal(plot, np.asarray(Image.open(run / "convergence.png").convert("RGB")))
    assert set(pictures) == {"compare", "samples"} and pictures["samples"][0].shape[0] == 10 * 66
    assert stages_of(notebook).count("data:image/png;base64,") == 2 * 8


@pytest.fixture
def install(root):
    spec = importlib.util.spec_from_file_location("colab_install", root / "scripts/colab/install.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("accelerator", ["tpu", "cuda", ""])
def test_the_installed_extra_depends_on_the_accelerator(install, monkeypatch, accelerator):
    calls = []
    monkeypatch.setattr(install, "extra", lambda: accelerator)
    monkeypatch.setattr(install, "missing", lambda wanted: ["jax"])
    monkeypatch.setattr(
        install.subprocess, "run", lambda command: calls.append(command) or type("", (), {"returncode": 1})
    )
    with pytest.raises(RuntimeError, match="run this cell again"):
        install.main()
    assert calls[0][-3].endswith("constraints.txt")
    assert calls[0][-1] == f"{install.ROOT}[{'demo,' + accelerator if accelerator else 'demo'}]"


def test_versions_other_than_the_pins_are_noticed(install, monkeypatch, tmp_path):
    assert install.missing("") == [] and install.missing("tpu") in ([], ["libtpu"])
    old = "flax==0.0.1 ; python_full_version < '3'"  # for another Python than this one
    (tmp_path / "constraints.txt").write_text(f"# pins\njax==0.0.1 ; python_full_version >= '3'\n{old}\n")
    monkeypatch.setattr(install, "ROOT", tmp_path)
    assert install.missing("") == ["jax"]
