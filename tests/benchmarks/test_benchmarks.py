"""Each benchmark runs in a tiny mode in a process of its own, and its JSON is checked. No time is asserted."""

import importlib.util
import json
import subprocess
import sys

import pytest

# The other scripts of scripts/benchmarks are only run with --help.
TINY = {
    "train_step": ["--size=S", "--depth=2", "--width=96", "--batch=2", "--rounds=1", "--repa", "--no_compile"],
    "sample": ["--depth=1", "--batch=1", "--rounds=1", "--solver=euler", "--nfe=6"],
    "loader": ["--images=40", "--batch=8", "--rounds=1", "--seconds=0.1"],
    "features": ["--manifolds", "--reference=20", "--samples=30", "--features=8"],
}


def run(root, quick, name, *flags):
    return subprocess.run(
        [sys.executable, root / "scripts" / "benchmarks" / f"{name}.py", *flags],
        env=quick,
        capture_output=True,
        text=True,
        timeout=900,
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_tiny_run(root, quick, tmp_path, name):
    # With PyTorch they compare both results first, and stop without a record if these differ.
    both = name in ("train_step", "loader") and importlib.util.find_spec("torch")
    versus = ["--versus=torch"] if both else []
    done = run(root, quick, name, *TINY[name], *versus, f"--json={tmp_path}/out.json")
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["benchmark"] and record["machine"]["versions"]["jax"] and record["machine"]["cores"] > 0
    seconds = record["seconds"]
    if name == "train_step":
        contenders = ["sfd_jax", "torch eager"] if versus else ["sfd_jax"]
        assert set(seconds) == {f"{each}: {call}" for each in contenders for call in ("forward", "step")}
        assert all(each["least"] <= each["median"] <= each["most"] for each in seconds.values())
    if name == "loader":
        assert len(seconds) == (4 if versus else 2) and bool(record["ratios"]) == bool(versus)
        assert record["bytes_per_image"]["sfd_jax, latents alone"] > 2 * 2 * 48 * 256  # two flips in bfloat16
    if name == "sample":
        assert record["nfe"]["sfd_jax"] == sum(record["nfe_by_stage"]) == 6
        assert 0 < record["errors"]["sfd_jax"] < 1
    assert "| " in done.stdout  # the table


def test_every_benchmark_has_help(root, quick):
    scripts = sorted(path.stem for path in (root / "scripts" / "benchmarks").glob("*.py"))
    for name in set(scripts) - {"_common", "torch_dit"}:
        done = run(root, quick, name, "--help")
        assert done.returncode == 0 and "usage" in done.stdout, (name, done.stderr[-500:])
    done = run(root, quick, "train_step", "--versus=jax")
    assert done.returncode != 0 and "torch" in done.stderr
