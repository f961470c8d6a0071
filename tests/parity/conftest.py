"""One test per case of the pack, collected from its file names."""

import json
import os
from pathlib import Path

import pytest

PACK = Path(os.environ.get("SFD_PARITY_DIR", Path(__file__).resolve().parents[3] / "shared" / "parity"))


def pytest_generate_tests(metafunc):
    if "case_name" not in metafunc.fixturenames:
        return
    names = sorted({path.stem for path in PACK.glob("*.json")} | {path.stem for path in PACK.glob("*.npz")})
    large = [name for name in names if _millions(name) > 300]
    if metafunc.function.__name__ == "test_large_case":
        params = [pytest.param(name, marks=pytest.mark.slow) for name in large]
    else:
        params = [name for name in names if name not in large]
    # Without a pack there is one test, which `parity_dir` skips with a message.
    metafunc.parametrize("case_name", params or ["none"])


def _millions(name: str) -> float:
    """Parameters of a full-size case, in millions."""
    try:
        return json.loads((PACK / f"{name}.json").read_text()).get("num_params", 0) / 1e6
    except (OSError, ValueError, AttributeError):
        return 0.0  # its test reports a damaged case
