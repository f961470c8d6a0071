"""`sfd extract` on a folder of odd images, with tiny random networks, end to end."""

import json

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from sfd_jax.cli.main import main
from sfd_jax.data.checks import check_store, check_writable
from sfd_jax.data.latent_store import LatentStore
from sfd_jax.data.released import ReleasedLatents
from sfd_jax.models import Network
from sfd_jax.models.fingerprint import params_hash
from sfd_jax.training.checkpoint import load_params, save_params

NETWORKS = {
    "texture_vae": dict(ch=4, ch_mult=(1, 2), num_res_blocks=1, attention_levels=(), z_channels=3, norm_groups=2),
    "dinov2": dict(width=8, depth=1, num_heads=2, image_size=6, patch_size=3, num_registers=1),
    "semantic_vae": dict(arch="linear", input_dim=8, bottleneck_dim=5),
}
COUNT = 11


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Three checkpoints, and a folder of 11 images of which one is broken."""
    folder = tmp_path_factory.mktemp("extract")
    random = np.random.default_rng(0)
    for name, config in NETWORKS.items():
        network = Network(name, config)
        params = jax.tree.map(
            lambda leaf: random.normal(0, 0.3, leaf.shape).astype(np.float32), network.abstract_params()
        )
        metadata = {"network": name, "network_config": network.config_dict(), "step": 1, "source": "test"}
        save_params(folder / name, params, metadata)
    for label in ("cat", "dog"):
        (folder / "images" / label).mkdir(parents=True)
    modes = ["RGB", "L", "CMYK", "RGB"]
    for index in range(COUNT):
        size = tuple(random.integers(5, 40, 2))
        pixels = random.integers(0, 256, (*size, 3), np.uint8)
        image = Image.fromarray(pixels).convert(modes[index % 4])
        image.save(folder / "images" / ("cat", "dog")[index % 2] / f"{index:02d}.jpg", quality=90)
    (folder / "images" / "dog" / "03.jpg").write_bytes(b"\xff\xd8 not a whole JPEG")
    return folder


def flags(work, out, *more):
    return [
        "extract",
        "--images=folder",
        f"--path={work / 'images'}",
        f"--out={out}",
        "--image_size=16",
        "--tile_size=8",
        f"--texture_vae={work / 'texture_vae'}",
        f"--visual={work / 'dinov2'}",
        "--batch_size=8",
        "--shard_size=4",
        *more,
    ]


@pytest.mark.slow
def test_images_to_shards(work, capsys):
    out, semantic = work / "latents", f"--semantic_vae={work / 'semantic_vae'}"
    assert main(flags(work, out, semantic)) == 2  # the broken image is not tolerated
    assert "dog/03.jpg" in capsys.readouterr().err
    assert main(flags(work, out, semantic, "--max_broken=1", "--repa")) == 2  # another run's folder
    refusal = capsys.readouterr().err
    assert "belongs to another run" in refusal and "config.repa: there false, here true" in refusal
    assert main(flags(work, out, semantic, "--max_broken=1")) == 0
    printed = capsys.readouterr().out
    assert "10 images in 3 shards" in printed and "images has no split 'train': its own folders are taken" in printed
    store = LatentStore(out)
    assert len(store) == COUNT - 1 and store.class_names == ["cat", "dog"]
    assert store.manifest["label_counts"] == {"0": 6, "1": 4}
    assert set(store.manifest["weights"]) == {"texture_vae", "visual", "semantic_vae"}
    record = store[0]
    # 16 px are 2x2 tiles for the visual encoder, 8 by 8 latents for both.
    assert record["texture"].shape == (8, 8, 3) and record["semantic"].shape == (8, 8, 5)
    assert record["texture"].dtype.name == "bfloat16"
    mirror = store.read(np.array([0]), np.array([True]))["texture"][0]
    assert mirror.shape == (8, 8, 3) and not np.array_equal(mirror, record["texture"])
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file() and path.name != ".lock"}
    hashes = {
        name: params_hash(load_params(work / folder)[0])
        for name, folder in (("texture_vae", "texture_vae"), ("visual", "dinov2"), ("semantic_vae", "semantic_vae"))
    }
    # What checkpoints record of it; a tile of 8 px is 4 latents.
    assert store.origin == {"weights": hashes, "image_size": 16, "tile_grid": 4, "labels": [0, 1]}
    (out / "latents-00001.bin").unlink()
    params, metadata = load_params(work / "texture_vae")
    save_params(work / "other", jax.tree.map(lambda leaf: 2 * leaf, params), metadata)
    assert main(flags(work, out, semantic, "--max_broken=1", f"--texture_vae={work / 'other'}")) == 2
    assert f'weights.texture_vae: there "{hashes["texture_vae"][:20]}' in capsys.readouterr().err
    assert main(flags(work, out, semantic, "--max_broken=1")) == 0
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.name in before} == before


def test_pca_is_fitted_by_the_same_command(work, capsys):
    out = work / "pca"
    assert main(flags(work, out, "--pca=2", "--no_flips", "--max_broken=1", "--dtype=float32")) == 0
    assert "2 channels keep" in capsys.readouterr().out
    store = LatentStore(out)
    semantic = store.read(np.arange(len(store)))["semantic"].reshape(-1, 2)
    # Principal components of all images are centred and uncorrelated over these images; float32
    # sums of 640 values of order 1.
    covariance = np.cov(semantic.T)
    np.testing.assert_allclose(semantic.mean(0), 0, atol=1e-4)
    assert abs(covariance[0, 1]) < 1e-4 * covariance[0, 0] and covariance[0, 0] > covariance[1, 1]
    assert "pca" in store.manifest["weights"]


def test_check_names_each_fault_and_writes_nothing(work, capsys):
    out = work / "checked"
    semantic = f"--semantic_vae={work / 'semantic_vae'}"
    assert main(flags(work, out, semantic, "--check", "--expect_count=12")) == 2
    errors = capsys.readouterr().err
    assert "2 faults" in errors and "not the expected 12" in errors and "dog/03.jpg" in errors
    assert not out.exists()
    assert main(flags(work, out, semantic, "--check", "--max_broken=1")) == 0
    assert "no faults found" in capsys.readouterr().out
    assert main(flags(work, out, "--visual=nowhere", "--check")) == 2
    assert check_writable(work / "texture_vae", 10**18)[0].endswith("GB are needed")
    assert "is a file" in check_writable(work / "images" / "dog" / "01.jpg" / "out", 1)[0]


def test_check_store_names_each_fault(work, tmp_path):
    released = work / "released"
    released.mkdir()
    arrays = {"latents": np.random.default_rng(0).standard_normal((6, 3, 2, 2)).astype(np.float32)}
    arrays |= {"latents_sv": arrays["latents"] + 1, "labels": np.array([0, 1, 2, 0, 1, 7])}
    save_file(arrays, released / "latents_rank00_shard000.safetensors")
    repack = ["extract", f"--repack={released}", f"--out={tmp_path / 'ours'}", "--shard_size=2"]
    assert main(repack) == 2  # no statistics beside the shards
    assert main([*repack, "--statistics=measured"]) == 0
    assert check_store(tmp_path / "ours") == []
    faults = check_store(tmp_path / "ours", num_classes=3, flips=True, repa=True)
    expected = [
        "labels outside 0..2: [7]",
        "no 'repa_features'",
        "'texture_flip'",
        "'semantic_flip'",
        "'repa_features_flip'",
    ]
    assert len(faults) == len(expected)
    assert all(any(part in fault for fault in faults) for part in expected)
    path = tmp_path / "ours" / "manifest.json"
    written = path.read_text()
    imagenet = {"label_counts": {str(label): 6 * (label == 0) for label in range(1000)}}
    for changed in (imagenet, {"class_names": [str(i) for i in range(1000)], "config": {"split": "train"}}):
        path.write_text(json.dumps(json.loads(written) | changed))
        assert any("holds 6 images, not the expected 1,281,167" in fault for fault in check_store(path.parent))
    path.write_text(json.dumps({key: value for key, value in json.loads(written).items() if key != "statistics"}))
    assert "manifest.json lacks statistics" in check_store(path.parent)[0]
    path.write_text(written)
    shard = tmp_path / "ours" / "latents-00002.bin"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert "latents-00002.bin does not match" in check_store(tmp_path / "ours")[0]
    assert "no latents in" in check_store(tmp_path)[0]


def test_released_statistics_are_kept(parity_dir, tmp_path, capsys):
    released = parity_dir / "files" / "latents"
    assert main(["extract", f"--repack={released}", f"--out={tmp_path}", "--repa"]) == 0
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["statistics"] != manifest["measured_statistics"]
    assert "repa_features_flip" in manifest["fields"]
    assert main(["extract", f"--repack={released}", f"--out={tmp_path}", "--unknown"]) == 2
    assert "unknown argument" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--out=x"], "--images and --texture_vae"),
        (["--out=x", "--images=digits", "--texture_vae=a", "--visual=b"], "--pca"),
        (["--out=x", "--images=digits", "--texture_vae=a", "--repa"], "--visual"),
    ],
)
def test_impossible_flags_are_refused(arguments, message, capsys):
    assert main(["extract", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_released_statistics_that_do_not_fit_the_latents_are_reported(parity_dir, tmp_path, capsys, monkeypatch):
    """They have the right shapes, so that only the measured statistics show the difference."""
    released = parity_dir / "files" / "latents"
    source, statistics = ReleasedLatents(released), {}
    for group, theirs in source.names.items():
        values = source.read(np.arange(len(source)))[group].astype(np.float32)
        statistics[f"{theirs}_stats.pt"] = values.mean((0, 1, 2)), values.std((0, 1, 2))
    monkeypatch.setattr("sfd_jax.convert.weight_files.read_statistics", lambda path: statistics[path.name])
    assert main(["extract", f"--repack={released}", f"--out={tmp_path / 'right'}"]) == 0
    assert "note:" not in capsys.readouterr().out
    statistics["latents_stats.pt"] = tuple(10 * value for value in statistics["latents_stats.pt"])
    assert main(["extract", f"--repack={released}", f"--out={tmp_path / 'wrong'}"]) == 0
    assert "note: the released texture statistics are not those of these latents" in capsys.readouterr().out


@pytest.mark.slow
def test_encoders_that_do_not_fit_each_other_or_the_images(work, tmp_path, capsys):
    def answer(*more):
        assert main(flags(work, tmp_path / "out", *more, "--check")) == 2
        return capsys.readouterr().err

    semantic = f"--semantic_vae={work / 'semantic_vae'}"
    assert "images of 15 px do not divide by 2, the texture VAE's downsampling: use 14 or 16 px" in answer(
        semantic, "--image_size=15"
    )
    assert "images of 5 px do not divide by 2, the texture VAE's downsampling (tile_size): use 4 or 6" in answer(
        semantic, "--image_size=10", "--tile_size=5"
    )
    assert "images of 20 px do not divide by 8, the tile_size" in answer(semantic, "--image_size=20")
    for flag, holds, expected in (
        ("texture_vae", "dinov2", "texture_vae"),
        ("visual", "semantic_vae", "dinov2"),
        ("semantic_vae", "texture_vae", "semantic_vae"),
    ):
        wrong = f"--{flag}={work / holds}"
        assert f"{wrong} holds '{holds}', expected '{expected}'" in answer(semantic, wrong)
    params, metadata = load_params(work / "semantic_vae")
    encoder = params_hash(load_params(work / "dinov2")[0])
    for name, hash in (("own", encoder), ("other", "4" * 64)):
        save_params(tmp_path / name, params, {**metadata, "latents": {"weights": {"visual": hash}}})
    assert "was trained on features of another visual" in answer(f"--semantic_vae={tmp_path / 'other'}")
    assert main(flags(work, tmp_path / "out", f"--semantic_vae={tmp_path / 'own'}", "--max_broken=1", "--check")) == 0
    small = dict(hidden_dim=4, transformer_heads=2, transformer_blocks=1)
    for name, changes, more in (
        ("wide", {"input_dim": 9}, {}),
        ("long", {"arch": "transformer", **small}, {"latents": {"tokens": 64}}),
    ):
        network = Network("semantic_vae", NETWORKS["semantic_vae"] | changes)
        metadata = {"network": network.name, "network_config": network.config_dict(), **more}
        save_params(tmp_path / name, network.init(jax.random.key(0)), metadata)
    assert "compresses features of 9, but the visual encoder makes features of 8" in answer(
        f"--semantic_vae={tmp_path / 'wide'}"
    )
    long = f"--semantic_vae={tmp_path / 'long'}"
    assert "trained on 64 tokens at once, but a tile of 8 px has 16: --tile_size=16 would do" in answer(long)
    assert main(flags(work, tmp_path / "out", long, "--max_broken=1", "--check", "--tile_size=16")) == 0
