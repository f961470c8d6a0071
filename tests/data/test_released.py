"""The released shards: read as they are, and repacked; on generated ones and on those of the parity pack."""

import pickle

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sfd_jax.data.checks import check_released
from sfd_jax.data.extract import ExtractConfig, repack
from sfd_jax.data.pipeline import feature_transform, latent_transform, make_batches
from sfd_jax.data.released import ReleasedLatents, open_latents
from sfd_jax.errors import SfdError
from sfd_jax.latents import LatentLayout, LatentStatistics

KINDS = {"latents": 3, "latents_sv": 2, "feats_dino": 7}  # channels


@pytest.fixture
def shards(tmp_path):
    """Three shards of 2, 3 and 5 images of 5x3 latents; returns the folder and all arrays joined."""
    random = np.random.default_rng(0)
    folder, whole = tmp_path / "released", {}
    folder.mkdir()
    # Rank 10 comes after rank 2, though not as text.
    for name, count in (("rank02_shard000", 2), ("rank02_shard001", 3), ("rank10_shard000", 5)):
        part = {"labels": random.integers(0, 1000, count)}
        for kind, channels in KINDS.items():
            for suffix in ("", "_flip"):
                dtype = np.float16 if kind == "feats_dino" else np.float32
                values = random.standard_normal((count, channels, 5, 3)).astype(dtype)
                part[kind + suffix] = values
        save_file(part, folder / f"latents_{name}.safetensors")
        for key, values in part.items():
            whole.setdefault(key, []).append(values)
    return folder, {key: np.concatenate(values) for key, values in whole.items()}


def test_records_are_the_arrays_channels_last(shards):
    folder, whole = shards
    source = ReleasedLatents(folder, repa=True)
    assert len(source) == 10
    for flip in ([False, False, False], [True, False, True]):
        batch = source.read(np.array([9, 0, 4]), np.array(flip))
        suffixes = ["_flip" if flipped else "" for flipped in flip]
        for ours, theirs in (("texture", "latents"), ("semantic", "latents_sv"), ("repa_features", "feats_dino")):
            rows = np.stack([whole[theirs + suffix][row] for suffix, row in zip(suffixes, [9, 0, 4], strict=True)])
            expected = np.moveaxis(rows, 1, -1)
            expected = expected.reshape(3, 15, 7) if ours == "repa_features" else expected
            np.testing.assert_array_equal(batch[ours], expected)
        np.testing.assert_array_equal(batch["label"], whole["labels"][[9, 0, 4]])
    assert source[4]["label"] == whole["labels"][4] and source[4]["index"] == 4
    assert "repa_features" not in ReleasedLatents(folder)[0]


def test_check_names_labels_missing_shards_and_missing_flips(shards, tmp_path):
    folder, whole = shards
    source = ReleasedLatents(folder)
    np.testing.assert_array_equal(source.labels(), whole["labels"])
    assert check_released(source, num_classes=1000, flips=True) == []
    most = int(whole["labels"].max())
    assert [f"outside 0..{most - 1}: [{most}]" in fault for fault in check_released(source, num_classes=most)] == [True]

    alone = {"labels": np.arange(1000), "latents": np.zeros((1000, 3, 1, 1)), "latents_sv": np.zeros((1000, 2, 1, 1))}
    (tmp_path / "part").mkdir()
    save_file(alone, tmp_path / "part" / "latents_rank00_shard000.safetensors")
    faults = check_released(ReleasedLatents(tmp_path / "part"), num_classes=1000, flips=True)
    assert len(faults) == 2 and "1,000 images, not the expected 1,281,167" in faults[0] and "no flipped" in faults[1]


def test_training_reads_released_shards_and_our_store_alike(shards, tmp_path):
    folder, _ = shards
    repack(ReleasedLatents(folder, repa=True), tmp_path / "ours", ExtractConfig(dtype="float32", shard_size=4))
    ours = open_latents(tmp_path / "ours", repa=True)
    for name in ("latents_stats.pt", "latents_sv_stats.pt"):
        (folder / name).touch()
    released = open_latents(folder, repa=True, read_statistics=of(ours.statistics))
    batches = []
    for source in (ours, pickle.loads(pickle.dumps(released))):
        latents = latent_transform(LatentLayout(3, 2), source.statistics, repa=True)
        settings = {"seed": 5, "global_batch_size": 4, "flips": True}
        batch = make_batches(source, transform=latents, **settings).at(3)
        batch |= make_batches(source, transform=feature_transform, **settings).at(3)
        batches.append(batch)
    assert set(batches[0]) == {"latents", "labels", "index", "repa_features", "features"}
    for name, values in batches[0].items():
        np.testing.assert_array_equal(values, batches[1][name])
    with pytest.raises(SfdError, match="no latents in"):
        open_latents(tmp_path)


def of(statistics):
    """Return a stand-in for the reader of `*_stats.pt`."""
    texture, semantic = (
        tuple(getattr(statistics, f"{group}_{name}") for name in ("mean", "std")) for group in ("texture", "semantic")
    )
    return lambda path: {"latents_stats.pt": texture, "latents_sv_stats.pt": semantic}[path.name]


def test_repacking_keeps_every_record(shards, tmp_path):
    folder, whole = shards
    released = LatentStatistics([2.0] * 3, [3.0] * 3, [0.0] * 2, [1.0] * 2)
    source = ReleasedLatents(folder, repa=True)
    store = repack(source, tmp_path / "ours", ExtractConfig(dtype="float32", shard_size=4), statistics=released)
    for flip in (np.zeros(10, bool), np.ones(10, bool)):
        found, expected = store.read(np.arange(10), flip), source.read(np.arange(10), flip)
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            np.testing.assert_array_equal(found[name], values)
            assert found[name].dtype == values.dtype
    assert store.statistics.texture_mean.tolist() == [2, 2, 2]
    measured = store.manifest["measured_statistics"]["texture_mean"]
    # Kept as float32: half an ulp.
    np.testing.assert_allclose(measured, whole["latents"].mean((0, 2, 3), np.float64), rtol=1e-7)


def test_damaged_and_differing_shards_are_named(shards, tmp_path):
    folder, _ = shards
    last = folder / "latents_rank10_shard000.safetensors"
    data = last.read_bytes()
    last.write_bytes(data[:-10])
    with pytest.raises(SfdError, match="rank10_shard000.safetensors is damaged"):
        ReleasedLatents(folder)
    last.write_bytes(data)
    save_file({"latents": np.zeros((1, 3, 5, 3)), "labels": np.zeros(1, int)}, last)
    with pytest.raises(SfdError, match="rank10_shard000.safetensors does not hold the 'latents_sv'"):
        ReleasedLatents(folder)
    with pytest.raises(SfdError, match="no latents_rankRR_shardNNN"):
        ReleasedLatents(tmp_path)


def test_shards_of_the_parity_pack(parity_dir):
    folder = parity_dir / "files" / "latents"
    source = ReleasedLatents(folder)
    parts = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    labels = np.concatenate([part["labels"] for part in parts])
    np.testing.assert_array_equal(source.read(np.arange(len(source)))["label"], labels)
    texture = np.concatenate([part["latents_flip"] for part in parts])
    found = source.read(np.array([len(source) - 1]), np.array([True]))["texture"]
    np.testing.assert_array_equal(found[0], np.moveaxis(texture[-1], 0, -1))


def rewrite(folder, name="rank02_shard001", **changes):
    """Change arrays of one shard, or leave out those that are None."""
    path = folder / f"latents_{name}.safetensors"
    arrays = load_file(path) | changes
    save_file({key: values for key, values in arrays.items() if values is not None}, path)


NUMBERS = np.zeros((3, 2, 5, 3), np.float32)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"labels": np.arange(2)}, "shard001.*'feats_dino|'latents' is F32 .* with N = 2"),
        ({"labels": np.arange(4)}, "is F32 .* with N = 4"),
        ({"labels": np.arange(3) + 0.5}, "'labels' is F64 .*; expected whole numbers"),
        ({"labels": np.arange(3).reshape(3, 1)}, r"'labels' is I64 \[3, 1\]"),
        ({"labels": np.array([0, -1, 2])}, "labels reach from -1 to 2"),
        ({"labels": np.array([0, 2**40, 2])}, "labels reach from 0 to 1099511627776"),
        ({"labels": np.zeros(3, bool)}, "'labels' is BOOL"),
        ({"latents_sv": NUMBERS[:2]}, r"'latents_sv' is F32 \[2, 2, 5, 3\].* with N = 3"),
        ({"latents_sv_flip": NUMBERS[:2]}, "'latents_sv_flip' is F32 .* with N = 3"),
        ({"latents_sv": NUMBERS[:, :1]}, r"'latents_sv' is F32 \(5, 3, 1\).*but F32 \(5, 3, 2\) elsewhere"),
        ({"latents_sv_flip": NUMBERS[:, :1]}, "'latents_sv_flip' is F32 .* elsewhere"),
        ({"latents": np.zeros((3, 3, 3, 5), np.float32)}, r"'latents' is F32 \(3, 5, 3\)"),
        ({"latents": np.zeros((3, 3, 5, 3), np.float16)}, "'latents' is F16 .*but F32"),
        ({"latents": np.zeros((3, 3, 5, 3), np.int32)}, "'latents' is I32 .*expected floating point"),
        ({"latents": np.zeros((3, 45), np.float32)}, r"'latents' is F32 \[3, 45\]; expected .* \(N,C,H,W\)"),
        ({"latents_sv_flip": None}, "does not hold the 'latents_sv_flip'"),
        ({"latents_flip": None, "latents_sv_flip": None}, "does not hold the 'latents_flip'"),
        ({"latents_sv": None, "latents_sv_flip": None, "latents_dino": NUMBERS}, "does not hold the 'latents_sv'"),
    ],
)
def test_a_shard_that_disagrees_is_named_when_it_is_opened(shards, changes, words):
    folder, _ = shards
    rewrite(folder, **changes)
    with pytest.raises(SfdError, match=words) as caught:
        ReleasedLatents(folder)
    assert "latents_rank02_shard001.safetensors" in str(caught.value)


def test_groups_of_two_grids_and_values_that_are_not_finite(shards):
    folder, whole = shards
    rewrite(
        folder,
        "rank10_shard000",
        latents=np.where(np.arange(5)[:, None, None, None] == 2, np.nan, whole["latents"][5:]).astype(np.float32),
    )
    source = ReleasedLatents(folder)
    assert source.read(np.arange(5))["texture"].shape[0] == 5
    with pytest.raises(SfdError, match="rank10_shard000.safetensors: 'latents' of row 2 is not finite"):
        source.read(np.arange(10))
    for name, rows in (("rank02_shard000", 2), ("rank02_shard001", 3), ("rank10_shard000", 5)):
        rewrite(
            folder,
            name,
            latents_sv=np.zeros((rows, 2, 4, 4), np.float32),
            latents_sv_flip=np.zeros((rows, 2, 4, 4), np.float32),
        )
    with pytest.raises(SfdError, match=r"grids of 'latents' \(5, 3\) and 'latents_sv' \(4, 4\) differ"):
        ReleasedLatents(folder)


def test_missing_shards_are_reported_and_copies_refused(shards):
    folder, _ = shards
    assert "rank 0, rank 1, rank 3" in ReleasedLatents(folder).notes[0]
    (folder / "latents_rank02_shard001.safetensors").rename(folder / "latents_rank02_shard004.safetensors")
    assert "rank 2 shard 1, rank 2 shard 2, rank 2 shard 3, " in ReleasedLatents(folder).notes[0]
    (folder / "latents_rank10_shard001 (1).safetensors").write_bytes(b"")
    assert "not read, because not named as shards: latents_rank10_shard001 (1)" in ReleasedLatents(folder).notes[1]
    (folder / "latents_rank2_shard4.safetensors").write_bytes(
        (folder / "latents_rank02_shard004.safetensors").read_bytes()
    )
    with pytest.raises(SfdError, match="two files are shard 4 of rank 2"):
        ReleasedLatents(folder)


@pytest.mark.parametrize(
    ("changed", "statistics", "words"),
    [
        (
            "latents_stats.pt",
            (np.zeros(32), np.ones(32)),
            "latents_stats.pt is of 32 channels, but 'latents' of the shards has 3",
        ),
        (
            "latents_sv_stats.pt",
            (np.zeros(3), np.ones(3)),
            "latents_sv_stats.pt is of 3 channels, but 'latents_sv' .* has 2",
        ),
    ],
)
def test_statistics_of_something_else_are_named(shards, changed, statistics, words):
    folder, _ = shards
    whole = {"latents_stats.pt": (np.zeros(3), np.ones(3)), "latents_sv_stats.pt": (np.zeros(2), np.ones(2))}
    with pytest.raises(SfdError, match="lacks latents_stats.pt"):
        open_latents(folder, read_statistics=lambda path: whole[path.name])
    for name in (*whole, "latents_dino_stats.pt"):  # the last is of the PCA variant, not of these shards
        (folder / name).touch()
    assert (
        open_latents(folder, read_statistics=lambda path: whole[path.name]).statistics.texture_std.tolist() == [1] * 3
    )
    whole[changed] = statistics
    with pytest.raises(SfdError, match=words):
        open_latents(folder, read_statistics=lambda path: whole[path.name])
