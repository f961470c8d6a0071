"""The store: round trip, kills, damage, statistics; and the extraction engine that fills it."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from sfd_jax.data.extract import ExtractConfig, Share, extract
from sfd_jax.data.images import BrokenImage
from sfd_jax.data.latent_store import LatentStore, LatentStoreWriter, Plan, latent_fields
from sfd_jax.data.moments import Moments
from sfd_jax.errors import SfdError

COUNT, SIZE = 23, 7


class Noise:
    """Images of noise; `broken` ones fail, and reading `bomb` stands for the end of the process."""

    image_size = SIZE
    class_names = ["a", "b"]

    def __init__(self, broken=(), bomb=None):
        self.broken, self.bomb = broken, bomb

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        if index == self.bomb:
            raise KeyboardInterrupt
        if index in self.broken:
            raise BrokenImage(f"noise/{index}.jpg", "truncated")
        pixels = np.random.default_rng(index).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
        return {"pixels": pixels, "label": index % 2, "index": index}


@jax.jit
def encode(pixels, index):
    pixels = pixels.astype(jnp.float32) / 255
    noise = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(jax.random.key(0), i), (SIZE, SIZE, 2)))(index)
    return {
        "texture": pixels * 3 + 1,
        "texture_flip": pixels[:, :, ::-1] * 3 + 1,
        "semantic": noise,
        "semantic_flip": -noise,
        "repa_features": pixels.reshape(-1, SIZE, SIZE * 3).astype(jnp.float16),
        "repa_features_flip": pixels[:, ::-1].reshape(-1, SIZE, SIZE * 3).astype(jnp.float16),
    }


def run(directory, source=None, **settings):
    how = {"about": {}, "weights": {"vae": "abc"}}
    how |= {name: settings.pop(name) for name in ("about", "weights", "sharding", "share") if name in settings}
    config = ExtractConfig(**{"batch_size": 4, "shard_size": 5, **settings})
    return extract(source or Noise(), encode, directory, config, **how)


def contents(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_round_trip(tmp_path, dtype):
    store = run(tmp_path, dtype=dtype)
    assert len(store) == COUNT and store.class_names == ["a", "b"]
    assert store.manifest["weights"] == {"vae": "abc"}
    expected = encode(np.stack([Noise()[i]["pixels"] for i in range(COUNT)]), np.arange(COUNT))
    batch = store.read(np.array([17, 2, 22, 2]))  # several shards, unordered, one twice
    mirror = store.read(np.array([17, 2, 22, 2]), np.array([True, False, True, True]))
    for name in ("texture", "semantic", "repa_features"):
        kind = np.float16 if name == "repa_features" else dtype
        plain, flipped = (np.asarray(expected[name + suffix]).astype(kind) for suffix in ("", "_flip"))
        np.testing.assert_array_equal(batch[name], plain[[17, 2, 22, 2]])
        np.testing.assert_array_equal(store[9][name], plain[9])
        # One image in both orientations, and neighbours of both in one batch.
        np.testing.assert_array_equal(mirror[name], np.stack([flipped[17], plain[2], flipped[22], flipped[2]]))
    assert mirror["index"].tolist() == batch["index"].tolist() and mirror["label"].tolist() == [1, 0, 0, 0]
    assert batch["label"].tolist() == [1, 0, 0, 0] and batch["index"].tolist() == [17, 2, 22, 2]
    store.verify()


def test_statistics_are_those_of_the_stored_values(tmp_path):
    store = run(tmp_path)
    records = store.read(np.arange(COUNT))
    for group in ("texture", "semantic"):
        values = records[group].astype(np.float64)
        mean = getattr(store.statistics, f"{group}_mean")
        # Kept as float32: half an ulp.
        np.testing.assert_allclose(mean, values.mean((0, 1, 2)), rtol=1e-7, atol=1e-9)
        std = getattr(store.statistics, f"{group}_std")
        np.testing.assert_allclose(std, values.std((0, 1, 2)), rtol=1e-7)


def test_moments_survive_a_large_offset():
    """A plain sum of squares would lose all digits here."""
    values = 1e8 + np.random.default_rng(0).standard_normal((31, 5, 3))
    merged = Moments.merge([Moments.of(part) for part in values])
    # float64 resolves 1.5e-8 at 1e8, which is the error that the means carry.
    np.testing.assert_allclose(merged.std, values.std((0, 1)), rtol=1.5e-8)


def test_batch_size_and_hosts_change_no_byte(tmp_path):
    run(tmp_path / "one")
    run(tmp_path / "two", batch_size=7)
    waits = []
    for host in (1, 0):  # host 1 first: its barrier records the name instead of waiting
        if host == 0:
            run(tmp_path / "three", share=Share(0, 2, waits.append))
            continue
        with pytest.raises(SfdError, match="not finished"):
            run(tmp_path / "three", share=Share(1, 2, waits.append))
    assert len(waits) == 4
    assert contents(tmp_path / "one") == contents(tmp_path / "two") == contents(tmp_path / "three")


def test_devices_change_no_byte(tmp_path):
    """Latents of an image do not depend on how the batch is split over devices."""
    run(tmp_path / "one", batch_size=8)
    mesh = jax.make_mesh((len(jax.devices()),), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    run(tmp_path / "all", batch_size=8, sharding=sharding)
    assert contents(tmp_path / "one") == contents(tmp_path / "all")


def test_a_killed_extraction_is_continued(tmp_path):
    run(tmp_path / "whole")
    killed = tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        run(killed, Noise(bomb=16))
    assert not (killed / "manifest.json").exists()
    with pytest.raises(SfdError, match="not finished"):
        LatentStore(killed)
    done = {path.name: path.stat().st_mtime_ns for path in killed.glob("*.bin")}
    assert done
    # After a SIGKILL: half a shard under its temporary name, and facts without a shard.
    (killed / "latents-00003.bin.part").write_bytes(b"half")
    (killed / "latents-00004.json").write_text((killed / "latents-00000.json").read_text())
    run(killed)
    assert contents(tmp_path / "whole") == contents(killed)
    for name, written in done.items():
        assert (killed / name).stat().st_mtime_ns == written, "a finished shard was written again"


def test_damage_names_the_shard_and_can_be_repaired(tmp_path):
    run(tmp_path)
    before = contents(tmp_path)
    shard = tmp_path / "latents-00002.bin"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 0x10
    shard.write_bytes(data)
    store = LatentStore(tmp_path)  # the length is right, so opening does not notice
    with pytest.raises(SfdError, match="latents-00002.bin does not match its checksum; delete it"):
        store.verify()
    with pytest.raises(SfdError, match="latents-00002.bin cannot be read"):
        for flip in (False, True):
            store.read(np.arange(COUNT), np.full(COUNT, flip))
    shard.write_bytes(data[:-1])
    with pytest.raises(SfdError, match="latents-00002.bin has"):
        LatentStore(tmp_path)
    shard.unlink()
    with pytest.raises(SfdError, match="latents-00002.bin is missing"):
        LatentStore(tmp_path)
    run(tmp_path).verify()
    assert contents(tmp_path) == before


def test_flips_that_are_not_stored_are_refused(tmp_path):
    def upright(pixels, index):
        return {name: value for name, value in encode(pixels, index).items() if "_flip" not in name}

    store = extract(Noise(), upright, tmp_path, ExtractConfig(batch_size=4), about={}, weights={})
    assert store.read(np.array([3]), np.array([False]))["index"] == [3]
    with pytest.raises(SfdError, match="no 'texture_flip'; extract with flips"):
        store.read(np.array([3, 4]), np.array([False, True]))


def test_another_run_is_refused(tmp_path):
    run(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(SfdError, match="config.seed: there 0, here 1"):
        run(tmp_path, seed=1)
    with pytest.raises(SfdError, match="weights.vae"):
        run(tmp_path, weights={"vae": "def"})
    assert contents(tmp_path) == before


def test_broken_images_are_skipped_counted_and_listed(tmp_path):
    store = run(tmp_path / "a", Noise(broken=(3, 11)), max_broken=2)
    assert len(store) == COUNT - 2
    assert [skipped["name"] for skipped in store.manifest["skipped"]] == ["noise/3.jpg", "noise/11.jpg"]
    indices = store.read(np.arange(len(store)))["index"]
    assert indices.tolist() == [i for i in range(COUNT) if i not in (3, 11)]
    with pytest.raises(SfdError, match="2 broken images, more than the 1 allowed"):
        run(tmp_path / "a", Noise(broken=(3, 11)), max_broken=1)  # those of finished shards count too
    with pytest.raises(SfdError, match="2 broken images, more than the 1 allowed") as caught:
        run(tmp_path / "b", Noise(broken=(3, 11)), max_broken=1)
    assert "noise/3.jpg: truncated" in str(caught.value)
    assert "noise/11.jpg: truncated" in str(caught.value)


def test_a_shard_may_be_empty_but_not_a_store(tmp_path):
    store = run(tmp_path / "a", Noise(broken=range(5, 10)), max_broken=5)  # the second shard's images
    assert [shard["count"] for shard in store.shards] == [5, 0, 5, 5, 3]
    assert store.read(np.array([4, 5]))["index"].tolist() == [4, 10]
    with pytest.raises(SfdError, match="no image of 23 could be read"):
        run(tmp_path / "b", Noise(broken=range(COUNT)), max_broken=COUNT)


def test_latents_that_are_not_finite_are_refused(tmp_path):
    def broken(pixels, index):
        latents = encode(pixels, index)
        return {**latents, "semantic": latents["semantic"].at[0].set(jnp.nan)}

    with pytest.raises(SfdError, match="'semantic' of image 0 is not finite"):
        extract(Noise(), broken, tmp_path, ExtractConfig(batch_size=4), about={}, weights={})


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SfdError, match="cannot write"):
        run(tmp_path / "file")
    with pytest.raises(SfdError, match="no latents in"):
        LatentStore(tmp_path)


def test_imagenet_with_flips_fits_in_70_gb(tmp_path):
    """Counted on a real shard of full-size latents in bfloat16, container and padding included."""
    fields = latent_fields((16, 16, 32), (16, 16, 16), dtype="bfloat16", flips=True)
    writer = LatentStoreWriter(tmp_path, Plan(256, 256, fields, {}, {}, None))
    random = np.random.default_rng(0)
    latents = {name: random.standard_normal(field["shape"]) for name, field in fields.items()}
    with writer.open_shard(0) as shard:
        for index in range(256):
            shard.add({**latents, "label": 0, "index": index})
    writer.finish()
    bytes_per_image = LatentStore(tmp_path).shards[0]["bytes"] / 256
    assert 62e9 < bytes_per_image * 1_281_167 < 70e9


def test_manifest_is_plain_json(tmp_path):
    run(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["count"] == COUNT == sum(shard["count"] for shard in manifest["shards"])
    assert LatentStoreWriter(tmp_path, store_plan(tmp_path)).is_done(4)


def store_plan(directory):
    plan = json.loads((directory / "plan.json").read_text())
    plan.pop("format")
    return Plan(**plan)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"count": 5}, "counts of its shards, its labels and its images differ"),
        ({"label_counts": {"0": 1}}, "counts of its shards, its labels and its images differ"),
        ({"shards": []}, "counts of its shards"),
        ({"shards": [{"name": "latents-00000.bin"}]}, "damaged .'count'"),
        ({"shards": 3}, "damaged"),
        ({"fields": {}}, "fields lack index, label, semantic, texture"),
        ({"fields": {"texture": {"dtype": "int8", "shape": []}}}, "unknown dtype 'int8'"),
        ({"shard_size": 0}, "shard_size 0"),
        ({"statistics": {}}, "missing"),
        ({"statistics": None}, "damaged"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_named(tmp_path, change, words):
    run(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(SfdError, match=f"manifest.json is damaged.*{words}|manifest.json is {words}"):
        LatentStore(tmp_path)


@pytest.mark.parametrize(
    "name, value",
    [("texture_std", 0.0), ("semantic_mean", float("nan")), ("texture_mean", None), ("texture_mean", 0.5)],
)
def test_statistics_of_a_store_are_numbers_for_its_channels(tmp_path, name, value):
    run(tmp_path)
    path = tmp_path / "manifest.json"
    manifest = json.loads(path.read_text())
    values = manifest["statistics"][name]
    manifest["statistics"][name] = values[1:] if value is None else [value, *values[1:]]
    path.write_text(json.dumps(manifest))
    with pytest.raises(SfdError, match="manifest.json is damaged.*(texture|semantic|its) statistics"):
        LatentStore(tmp_path)


def test_a_flipped_bit_of_a_record_is_named_or_changes_nothing(tmp_path):
    good = run(tmp_path).read(np.arange(COUNT))
    shard = tmp_path / "latents-00002.bin"
    data, random, named = shard.read_bytes(), np.random.default_rng(0), 0
    for place in random.integers(0, len(data), 300):
        changed = bytearray(data)
        changed[place] ^= 1 << random.integers(8)
        shard.write_bytes(changed)
        try:
            found = LatentStore(tmp_path).read(np.arange(COUNT))
            assert all((found[name] == good[name]).all() for name in good)
        except SfdError as error:
            assert "latents-00002.bin" in str(error)
            named += 1
    assert named > 10


def test_records_that_are_not_in_the_page_cache_are_requested_first_and_read_then(tmp_path, monkeypatch):
    store = run(tmp_path)
    expected, requests = store.read(np.arange(COUNT)), []

    def preadv(file, parts, start, flags):
        if flags and start % 3:
            raise BlockingIOError
        return real(file, parts[:1] if flags else parts, start)  # a part of a record may be there

    real = os.preadv
    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(os, "posix_fadvise", lambda file, start, size, advice: requests.append(start))
    for name, values in store.read(np.arange(COUNT)).items():
        np.testing.assert_array_equal(values, expected[name])
    assert len(requests) == COUNT


def test_stores_of_the_format_before_are_read(tmp_path):
    store = run(tmp_path)
    mirror = np.arange(COUNT) % 3 == 0
    expected = store.read(np.arange(COUNT), mirror)
    manifest = json.loads((tmp_path / "manifest.json").read_text()) | {"format": "sfd_jax latents 2"}
    size = store.record_dtype.itemsize + 4
    for shard in manifest["shards"]:
        path = tmp_path / shard["name"]
        data = path.read_bytes()
        path = path.with_suffix(".ar")
        writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
        for start in range(0, len(data), size):
            writer.write(data[start : start + size - 4])
        writer.close()
        shard |= {"name": path.name, "bytes": path.stat().st_size}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    for name, values in LatentStore(tmp_path).read(np.arange(COUNT), mirror).items():
        np.testing.assert_array_equal(values, expected[name])
    path.write_bytes(path.read_bytes().replace(data[:16], bytes(16)))
    with pytest.raises(SfdError, match="latents-00004.ar cannot be read"):
        LatentStore(tmp_path).read(np.array([20]))


def test_a_shard_in_the_place_of_another_is_named(tmp_path):
    run(tmp_path)
    first, second = tmp_path / "latents-00000.bin", tmp_path / "latents-00001.bin"
    swapped = first.read_bytes(), second.read_bytes()
    assert len(swapped[0]) == len(swapped[1])
    first.write_bytes(swapped[1]), second.write_bytes(swapped[0])
    with pytest.raises(SfdError, match="latents-00001.bin holds the images of another shard"):
        LatentStore(tmp_path).read(np.array([7]))
    first.write_bytes((tmp_path / "latents-00004.bin").read_bytes())  # has fewer records
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["shards"][0]["bytes"] = first.stat().st_size
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(SfdError, match="latents-00000.bin cannot be read .it holds 6 records, not 10"):
        LatentStore(tmp_path).read(np.array([0]))


def test_hosts_count_each_others_broken_images(tmp_path):
    """Host 1 found two, so host 0 stops at its first one."""
    with pytest.raises(SfdError, match="not finished"):  # host 0 has not written its shards
        run(tmp_path, Noise(broken=(6, 7)), share=Share(1, 2, lambda name: None), max_broken=2)
    with pytest.raises(SfdError, match="3 broken images, more than the 2 allowed") as caught:
        run(tmp_path, Noise(broken=(1, 6, 7)), share=Share(0, 2, lambda name: None), max_broken=2)
    assert all(f"noise/{index}.jpg" in str(caught.value) for index in (1, 6, 7))


def test_broken_images_that_another_host_finds_last_count_as_well(tmp_path):
    """Host 0 finished with one broken image before host 1 finds the second; then host 0 writes no manifest."""

    def barrier(name):
        with pytest.raises(SfdError, match="not finished"):  # host 0 has written no manifest yet
            run(tmp_path, Noise(broken=(1, 6)), share=Share(1, 2, lambda name: None), max_broken=2)

    with pytest.raises(SfdError, match="2 broken images, more than the 1 allowed"):
        run(tmp_path, Noise(broken=(1, 6)), share=Share(0, 2, barrier), max_broken=1)
    assert not (tmp_path / "manifest.json").exists()


@pytest.mark.parametrize("label", [-1, 0.5, 2**31, float("nan")])
def test_a_label_that_is_not_a_whole_number_is_refused(tmp_path, label):
    fields = latent_fields((1, 1, 1), (1, 1, 1), dtype="float32", flips=False)
    writer = LatentStoreWriter(tmp_path, Plan(1, 1, fields, {}, {}, None))
    with pytest.raises(SfdError, match="image 0 has the label"), writer.open_shard(0) as records:
        records.add({"texture": np.ones((1, 1, 1)), "semantic": np.ones((1, 1, 1)), "label": label, "index": 0})
