"""Two processes extract, train, sample and evaluate with the results of one, on four devices in both cases."""

import json
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from job_testing import launch
from PIL import Image

from sfd_jax.cli.main import main
from sfd_jax.data.latent_store import LatentStore
from sfd_jax.models import Network
from sfd_jax.training import load_params, save_params

NETWORKS = {
    "texture_vae": (
        "texture_vae",
        dict(ch=4, ch_mult=(1, 1, 1), num_res_blocks=1, attention_levels=(), z_channels=8, norm_groups=2),
    ),
    "visual": ("dinov2", dict(width=24, depth=1, num_heads=2, image_size=56, patch_size=14, num_registers=1)),
    "semantic_vae": ("semantic_vae", dict(arch="linear", input_dim=24, bottleneck_dim=4)),
}


NAME = "fd_encoder_w24_d1_p14_reg1"  # of the visual encoder, which is not a released DINOv2


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Three checkpoints, 20 images in ten classes, and 12 images to evaluate."""
    folder, random = tmp_path_factory.mktemp("commands"), np.random.default_rng(0)
    for directory, (name, config) in NETWORKS.items():
        network = Network(name, config)
        draw = lambda leaf: random.normal(0, 0.3, leaf.shape).astype(np.float32)
        metadata = {"network": name, "network_config": network.config_dict(), "step": 1, "source": "test"}
        save_params(folder / directory, jax.tree.map(draw, network.abstract_params()), metadata)
    for index in range(32):
        target = folder / "images" / f"class{index % 10}" if index < 20 else folder / "judged"
        target.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256 if index < 20 else 128, (16, 16, 3), np.uint8)).save(
            target / f"{index % 20:02d}.png"
        )
    return folder


@pytest.mark.slow
def test_two_hosts_do_what_one_does(work, tmp_path):
    jobs = {}
    for count in (1, 2):
        out = tmp_path / str(count)
        out.mkdir()
        expect = {"SFD_EXPECT_PROCESSES": str(count), "SFD_EXPECT_DEVICES": "4"}
        jobs[out] = launch([Path(__file__).with_name("commands.py"), work, out], count, variables=lambda _, e=expect: e)
    (one, two), processes = jobs, [process for job in jobs.values() for process in job.values()]
    ends = [process.communicate(timeout=600) for process in processes]
    assert [process.returncode for process in processes] == [0] * 3, ends
    # Gloo, used here instead of the network between chips, prints from several threads: the number at the end of its
    # message may be on a line by itself, and so may the text after the number at its beginning.
    of_gloo = lambda line: "[Gloo]" in line or "connected peer ranks" in line or line.strip().isdigit()
    alone, first, second = [[line for line in printed.splitlines() if not of_gloo(line)] for printed, _ in ends]

    stores = [LatentStore(folder / "latents") for folder in (one, two)]
    records = [store.read(np.arange(20)) for store in stores]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), *records
    )  # other devices, other tiles
    assert len(stores[1].shards) == 5

    # Sums over the batch cross the processes in another order.
    (params, stored), (params_of_two, _) = (load_params(folder / "run", which="raw") for folder in (one, two))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), params, params_of_two)
    moved = np.abs(params["final"]["linear"]["kernel"]).max()
    assert stored["step"] == 3 and moved > 1e-3  # it starts at zero

    with np.load(one / "samples" / "samples.npz") as a, np.load(two / "samples" / "samples.npz") as b:
        difference = np.abs(a["arr_0"].astype(int) - b["arr_0"])
        assert difference.max() <= 1 and (difference > 0).mean() < 0.01  # truncation to bytes
        np.testing.assert_array_equal(a["arr_1"], b["arr_1"])
        assert a["arr_0"].std() > 5

    scores = [json.loads((folder / "scores.json").read_text())["scores"][NAME] for folder in (one, two)]
    assert scores[0] > 1e-3 and scores[1] == pytest.approx(scores[0], rel=1e-4)

    # Only host 0 prints; the paths differ.
    assert [line.replace(str(two), str(one)) for line in first[-3:]] == alone[-3:]
    assert NAME in "".join(first) and not second
    beats = sorted(path.relative_to(two).as_posix() for path in two.rglob("heartbeats/*"))
    assert (
        beats
        == [f"{job}/heartbeats/process_0000{i}.json" for job in ("latents", "run", "samples") for i in (0, 1)][:-1]
    )


@pytest.mark.slow
def test_broken_images_are_counted_over_all_hosts(work, tmp_path):
    """One broken image on each of two hosts is two in the job; finished shards are kept for the next start."""
    shutil.copytree(work / "images", tmp_path / "images")
    for name in ("class0/10.png", "class2/12.png"):  # numbers 1 and 5, in the first shard of each host
        (tmp_path / "images" / name).write_bytes(b"no image")
    flags = [
        "--images=folder",
        f"--path={tmp_path / 'images'}",
        f"--out={tmp_path / 'latents'}",
        "--image_size=16",
        f"--texture_vae={work / 'texture_vae'}",
        "--batch_size=8",
        "--shard_size=4",
    ]
    processes = launch(["-m", "sfd_jax.cli.main", "extract", *flags, "--max_broken=1"], 2).values()
    ends = [process.communicate(timeout=300) for process in processes]
    # The process that counts both first ends; the other may be waiting for it.
    errors, statuses = "".join(error for _, error in ends), [process.returncode for process in processes]
    assert 2 in statuses and {*statuses} <= {2, 75, -signal.SIGABRT}, ends
    assert "2 broken images, more than the 1 allowed" in errors
    assert "class0/10.png" in errors and "class2/12.png" in errors
    assert not (tmp_path / "latents" / "manifest.json").exists()
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "latents").glob("*.bin")}
    assert main(["extract", *flags, "--max_broken=2"]) == 0
    store = LatentStore(tmp_path / "latents")
    assert [len({fault["index"] // 4 % 2 for fault in store.manifest["skipped"]}), len(store)] == [2, 18]
    assert written and all(path.stat().st_mtime_ns == time for path, time in written.items())
