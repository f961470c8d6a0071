"""One test per case of the pack, collected from its file names."""

import json
import os
from pathlib import Path

import pytest

from sfd_jax.parity import case_names
from sfd_jax.parity.pack import pack_folders


def pytest_generate_tests(metafunc):
    if "place" not in metafunc.fixturenames:
        return
    folders = [folder for folder in pack_folders(os.environ["SFD_PARITY_DIR"]) if list(folder.glob("*.npz"))]
    places = [(folder, name) for folder in folders for name in case_names(folder)]
    large = [place for place in places if _millions(*place) > 300]
    if metafunc.function.__name__ == "test_large_case":
        params = [pytest.param(place, id=place[1], marks=pytest.mark.slow) for place in large]
    else:
        params = [pytest.param(place, id=place[1]) for place in places if place not in large]
    # Without a pack there is one test, which `parity_dir` skips with a message.
    metafunc.parametrize("place", params or [pytest.param(None, id="none")])


def _millions(folder: Path, name: str) -> float:
    """Parameters of a full-size case, in millions."""
    try:
        return json.loads((folder / f"{name}.json").read_text()).get("num_params", 0) / 1e6
    except (OSError, ValueError, AttributeError):
        return 0.0  # its test reports a damaged case
