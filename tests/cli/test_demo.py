"""The whole demo at tiny size: it ends with what it promises, and kills do not change its samples."""

import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from sfd_jax import Pipeline

pytestmark = pytest.mark.slow

PROMISED = ("samples.npz", "samples.png", "stages.png", "losses.png", "metrics.json", "recipe.json")
PROMISED += ("report.md", "report.html", "stages.npz")


def command(workdir, *flags):
    config = "--config=configs/digits.py:tiny"
    return [sys.executable, "-m", "sfd_jax", "demo", config, f"--workdir={workdir}", *flags]


@pytest.fixture(scope="module")
def surroundings(root, quick):
    return {"cwd": root, "env": quick, "text": True}


def test_ends_with_what_it_promises(tiny_demo):
    workdir, printed = tiny_demo
    assert not [name for name in PROMISED if not (workdir / name).exists()]
    with np.load(workdir / "samples.npz") as file:
        images, labels = file["arr_0"], file["arr_1"]
    assert images.shape == (40, 32, 32, 3) and images.dtype == np.uint8
    assert np.bincount(labels).tolist() == [4] * 10
    assert labels.tolist() != sorted(labels.tolist())
    metrics = json.loads((workdir / "metrics.json").read_text())
    # Real digits are read by the judge, whatever four training steps gave.
    assert metrics["real training digits"]["read_as_label"] > 0.98
    assert "classified as their label" in printed
    page = (workdir / "report.html").read_text()  # nothing outside of the file
    assert page.count('src="data:image/png;base64,') == 3 and 'src="samples.png"' not in page and "http" not in page
    frames = json.loads(re.search(r"const frames = (.*), all", page)[1])
    assert len(frames) == 8 and frames[0]["t_texture"] == 0 and frames[-1]["t_texture"] == 1
    pipeline = Pipeline.from_pretrained(workdir)  # the lines of the README
    assert len(pipeline.generate("3")) == 1
    assert [pipeline.sampler.recipe["sampler"][name] for name in ("solver", "guidance_scale")] == ["euler", 1.5]


def test_the_same_command_again_changes_nothing(tiny_demo, surroundings):
    workdir, _ = tiny_demo
    before = (workdir / "samples.npz").read_bytes()
    done = subprocess.run(command(workdir), capture_output=True, **surroundings)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("already done") == 9
    assert (workdir / "samples.npz").read_bytes() == before


def test_another_seed_in_the_same_folder_is_refused(tiny_demo, surroundings):
    workdir, _ = tiny_demo
    done = subprocess.run(command(workdir, "--seed=7"), capture_output=True, **surroundings)
    assert done.returncode == 2
    assert "seed: there 0, here 7" in done.stderr and "Traceback" not in done.stderr


def test_killed_in_several_stages_it_ends_with_the_same_samples(tiny_demo, surroundings, tmp_path):
    reference, _ = tiny_demo
    workdir, moments, log = tmp_path / "killed", random.Random(0), tmp_path / "log"
    for stage in ("semantic_vae", "sample"):
        with open(log, "w") as out:
            process = subprocess.Popen(command(workdir), stdout=out, stderr=subprocess.STDOUT, **surroundings)
            deadline = time.monotonic() + 300
            while f"[{stage}]" not in log.read_text() and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.05)
            time.sleep(moments.uniform(0, 3))  # in this stage, or in one that comes soon after it
            process.kill()
        assert process.wait() == -signal.SIGKILL, log.read_text()[-3000:]
    done = subprocess.run(command(workdir), capture_output=True, **surroundings)
    assert done.returncode == 0, done.stderr[-3000:]
    with np.load(reference / "samples.npz") as ours, np.load(workdir / "samples.npz") as killed:
        assert np.array_equal(ours["arr_1"], killed["arr_1"])
        assert np.array_equal(ours["arr_0"], killed["arr_0"])


def test_damaged_shard_is_named(tiny_demo, surroundings, tmp_path):
    workdir = tmp_path / "damaged"
    shutil.copytree(tiny_demo.folder, workdir)
    record = json.loads((workdir / "demo.json").read_text())
    for stage in ("diffusion", "weak", "sample", "metrics", "pictures"):
        record["stages"].pop(stage)
        shutil.rmtree(workdir / stage, ignore_errors=True)
    (workdir / "demo.json").write_text(json.dumps(record))
    shard = sorted((workdir / "latents").glob("*.bin"))[0]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 0xFF
    shard.write_bytes(content)
    done = subprocess.run(command(workdir), capture_output=True, **surroundings)
    assert done.returncode == 2, done.stdout[-2000:] + done.stderr[-2000:]
    assert shard.name in done.stderr and "Traceback" not in done.stderr


def test_a_study_that_is_killed_continues(tiny_demo, surroundings, tmp_path, root):
    """Learned clocks on the demo's stages; the first process is killed while it trains."""
    workdir, out = tiny_demo.folder, tmp_path / "study"
    stages = ("texture_vae", "encoder", "semantic_vae", "latents")
    for stage in stages:
        shutil.copytree(workdir / stage, out / "shared" / stage)
    record = json.loads((workdir / "demo.json").read_text())
    record["config"] = {name: record["config"][name] for name in (*stages[:3], "seed", "data", "extract")}
    record["stages"] = {stage: record["stages"][stage] for stage in stages}
    (out / "shared" / "demo.json").write_text(json.dumps(record))

    config, script = "--config=configs/digits.py:study,tiny", root / "scripts" / "experiments" / "offset.py"
    command = [sys.executable, script, "--data=digits", config, f"--out={out}", "--seeds=0", "--cell=learned_s0"]
    surroundings = {**surroundings, "env": {**surroundings["env"], "PYTHONPATH": str(root)}}
    kept, deadline = out / "cells" / "learned_s0" / "run" / "checkpoints" / "2", time.monotonic() + 600
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, **surroundings)
        while not kept.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert kept.exists(), (tmp_path / "log").read_text()[-3000:]
    assert not list(out.glob("cells/*/*.json"))

    done = subprocess.run(command, capture_output=True, **surroundings)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "[texture_vae]" not in done.stdout and "[learned_s0]" in done.stdout
    cells = json.loads((out / "offset.json").read_text())["cells"]
    assert [(each["cell"], each["step"]) for each in cells] == [("learned", 4)]
    scores = ["frechet_distance", "precision", "recall", "read_as_label", "corrected_loss"]
    assert all(list(each["scores"]) == scores and np.isfinite(list(each["scores"].values())).all() for each in cells)
    assert "\n| learned | 1 | " in (out / "offset.md").read_text() and (out / "offset.png").stat().st_size > 5000

    done = subprocess.run(
        [sys.executable, script.with_name("dependence.py"), f"--out={out}"], capture_output=True, **surroundings
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((out / "dependence.json").read_text())
    assert all(np.isfinite(values).all() for values in found["errors"].values())
    losses, energies = found["curves"].values()
    assert list(losses) == list(energies) and np.isfinite(list(losses.values())).all()
    assert energies["offset 0"] == pytest.approx(1) and energies["offset 1"] == pytest.approx(2, rel=0.01)
