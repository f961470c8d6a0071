"""The notebook of scripts/colab: stored without outputs, and run to the end on the digits."""

import base64
import importlib.util
import io
import sys

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def stored(root):
    nbformat = pytest.importorskip("nbformat", reason="nbformat comes with the extra `dev`: bash scripts/setup.sh dev")
    return nbformat.read(root / "scripts/colab/sfd_demo.ipynb", as_version=4)


def test_the_notebook_is_stored_without_outputs(stored):
    cells = [cell for cell in stored.cells if cell.cell_type == "code"]
    assert cells and not any(cell.outputs or cell.execution_count for cell in cells)
    assert all(len(cell.source.splitlines()) <= 30 for cell in cells), "logic belongs in the library"


@pytest.mark.slow
def test_the_notebook_trains_and_draws_digits(stored, root, quick, tmp_path, monkeypatch):
    from nbclient import NotebookClient

    monkeypatch.setenv("SFD_NOTEBOOK_CONFIG", "configs/digits.py:tiny")
    monkeypatch.setenv("SFD_NOTEBOOK_FOLDER", str(tmp_path / "demo_out"))
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
    where = {"metadata": {"path": str(root / "scripts/colab")}}  # where a user opens it
    NotebookClient(stored, timeout=600, kernel_name="python3", resources=where).execute()  # raises where a cell fails

    pictures = {}
    for cell in stored.cells:
        for output in cell.get("outputs", []):
            assert output.output_type != "error"
            if "image/png" in output.get("data", {}):
                bytes_ = base64.b64decode(output.data["image/png"])
                pictures[cell.id] = np.asarray(Image.open(io.BytesIO(bytes_)).convert("RGB"))
    assert set(pictures) == {"samples"}
    (stages,) = (cell for cell in stored.cells if cell.id == "clocks")
    assert stages.outputs[0].data["text/html"].count("data:image/png;base64,") == 2 * 8
    height, width, _ = pictures["samples"].shape
    assert height == 10 * 132 and width > 4 * 132, "ten classes, four digits each, enlarged four times"
    # Each of the forty tiles has a picture that is not flat.
    tiles = pictures["samples"][:, -4 * 132 :].reshape(10, 132, 4, 132, 3)
    assert (tiles.std(axis=(1, 3, 4)) > 2).all()
    assert not (root / "scripts/colab/demo_out").exists()
    text = "".join(output.get("text", "") for cell in stored.cells for output in cell.get("outputs", []))
    assert "the pinned packages are installed" in text and "40 pictures, 24 network evaluations each" in text


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
