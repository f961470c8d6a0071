"""The day on a GPU: what was measured is kept whatever happens to the other parts, and a dry run runs them."""

import argparse
import importlib
import json
import subprocess
import sys
import time

import pytest

RECORD = {
    "benchmark": "train_step",
    "settings": {"size": "XL", "batch": 64},
    "seconds": {"sfd_jax: step": {"median": 0.1}, "torch eager: step": {"median": 0.2}},
    "ratios": {"torch eager: step": 2.0},
    "details": {"sfd_jax: step": "46 %"},
}
WRITES = f"import sys; open(sys.argv[1].partition('=')[2], 'w').write('''{json.dumps(RECORD)}''')"
SCRIPTS = {
    "good": WRITES,
    "broken": "print('what went wrong'); raise SystemExit(3)",
    # The comparison breaks after nothing was written: it is run again without it.
    "alone": f"import sys; '--versus=torch' in sys.argv and sys.exit('no torch'); {WRITES}",
    "slow": f"{WRITES}; import time; time.sleep(100)",
    "late": WRITES,
}
CHECKS = """backend cpu
dit_sfd            AutoGuidance, two scales            3.88e-07  5.00e-06 ok
full_b             released keys and shapes                 inf  0.00e+00 BROKEN a note
full_b             cut off in the mid"""


@pytest.fixture
def gpu_day(root, monkeypatch):
    monkeypatch.syspath_prepend(str(root / "scripts" / "benchmarks"))
    return importlib.import_module("gpu_day")


def test_parts_do_not_cost_each_other(gpu_day, tmp_path, monkeypatch):
    parts = {}
    for name, text in SCRIPTS.items():
        (tmp_path / f"{name}.py").write_text(text)
        parts[name] = (30, "torch" if name == "alone" else "", f"{tmp_path}/{name}.py", "", "")
    options = {"out": tmp_path, "wheels": tmp_path, "pack": None, "commit": "abc", "dry_run": False}
    args = argparse.Namespace(budget=100, spent=0, **options)
    day = gpu_day.Day(args, tmp_path)
    where = {"backend": "gpu", "device": "H100", "cores": 16, "date": "today", "versions": {"jax": "1"}}
    found = where | {"missing": [], "torch_works": True}
    run = day.run

    def probed(name, *rest):
        return {"status": "done", "log": json.dumps(found)} if name == "probe" else run(name, *rest)

    monkeypatch.setattr(day, "run", probed)
    monkeypatch.setattr(gpu_day, "PARTS", parts)
    monkeypatch.setattr(gpu_day, "LEAST_SECONDS", 1)
    day.measure(["good", "broken", "alone"])
    day.deadline = time.monotonic() + 10
    day.measure(["slow", "late"])
    done = json.loads((tmp_path / "gpu_day.json").read_text())["parts"]
    assert list(done) == ["good", "broken", "alone", "alone_alone", "slow", "late"]
    assert done["good"]["status"] == "done" and done["good"]["numbers"] == RECORD
    assert done["broken"]["status"] == "failed with exit status 3" and "what went wrong" in done["broken"]["log"]
    assert "numbers" not in done["alone"] and done["alone_alone"]["numbers"] == RECORD
    assert done["slow"]["status"].startswith("out of time") and done["slow"]["numbers"] == RECORD
    assert done["late"]["status"] == "not started: no time was left"
    table = (tmp_path / "gpu_day.md").read_text()
    assert "H100, 16 cores, today, commit abc; jax 1." in table
    rows = [line for line in table.splitlines() if line.startswith("| good")]
    assert "what went wrong" in table
    assert [cell.strip() for cell in rows[1].split("|")[2:5]] == ["torch eager: step", "0.2", "2"]
    assert "46 %" in rows[0] and "what went wrong" in (tmp_path / "gpu_day.log").read_text()


def test_checks_are_counted_to_where_they_were_cut_off(gpu_day):
    found = gpu_day.read_checks(CHECKS)
    assert found == {"comparisons": 2, "broken": ["full_b released keys and shapes"]}
    assert gpu_day.read_checks("nothing") is None


@pytest.mark.slow
def test_a_dry_run(root, quick, tmp_path, parity_dir):
    script = root / "scripts" / "benchmarks" / "gpu_day.sh"
    flags = ["--dry_run", f"--out={tmp_path}", "--parts=verify_float32,choices", "--budget=900"]
    env = quick | {"PYTHON": sys.executable, "SFD_PARITY_DIR": str(parity_dir)}
    done = subprocess.run(["bash", script, *flags], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = json.loads((tmp_path / "gpu_day.json").read_text())["parts"]
    assert parts["verify_float32"]["numbers"]["comparisons"] == 9 and not parts["verify_float32"]["numbers"]["broken"]
    assert parts["choices"]["status"] == "done", parts["choices"]["log"]
    seconds, details = parts["choices"]["numbers"]["seconds"], parts["choices"]["numbers"]["details"]
    forms = [f"attention {what}, {form}" for what in ("forward", "with gradient") for form in ("plain", "tuned")]
    assert list(seconds) == [*forms, "step 0: unrolled, none, tuned"]
    assert all("GiB" in detail for detail in details.values())
    assert "no measurement" in (tmp_path / "gpu_day.md").read_text()


def test_without_a_gpu_it_says_so(root, quick, tmp_path):
    command = [sys.executable, root / "scripts" / "benchmarks" / "gpu_day.py", f"--out={tmp_path}"]
    done = subprocess.run(command, env=quick, capture_output=True, text=True)
    assert done.returncode != 0 and "no GPU" in done.stderr and "--dry_run" in done.stderr
