"""Checkpoints: round trip, which are kept, and errors for what does not fit or is damaged."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from toy_training import toy_task

from sfd_jax.distributed import make_mesh
from sfd_jax.errors import SfdError
from sfd_jax.training import (
    Checkpointer,
    OptimizerConfig,
    Task,
    abstract_state,
    checksums,
    init_state,
    load_metadata,
    load_params,
    make_optimizer,
    save_params,
)

OPTIMIZER = make_optimizer(OptimizerConfig(clip_norm=1.0), 10)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(1, 1, devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def state(mesh):
    """A state whose EMA differs from its parameters."""
    state = init_state(toy_task(), OPTIMIZER, mesh, seed=5)
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x + 1 if "ema_params" in jax.tree_util.keystr(path) else x, state
    )


def test_which_checkpoints_are_kept(tmp_path, state, mesh):
    checkpointer = Checkpointer(tmp_path / "checkpoints", keep_last=2, keep_every=4)
    for step in range(1, 8):
        checkpointer.save(step, state, {})
    checkpointer.close()
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [4, 6, 7]
    assert Checkpointer(tmp_path / "checkpoints").latest_step() == 7


def test_round_trip_of_state_params_and_metadata(tmp_path, state, mesh):
    checkpointer = Checkpointer(tmp_path / "checkpoints")
    checkpointer.save(3, state, {"class_names": ["a"]})
    checkpointer.wait()
    target = abstract_state(toy_task(), OPTIMIZER, mesh)
    restored = checkpointer.restore(target)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    for folder in (tmp_path, tmp_path / "checkpoints", tmp_path / "checkpoints" / "3"):
        params, metadata = load_params(folder)
        jax.tree.map(np.testing.assert_array_equal, params, state.ema_params)
        assert metadata == {"class_names": ["a"], "step": 3} == load_metadata(folder)
    raw, _ = load_params(tmp_path, which="raw", abstract=target.params)
    jax.tree.map(np.testing.assert_array_equal, raw, state.params)
    assert raw["hidden"]["kernel"].sharding == state.params["hidden"]["kernel"].sharding


def test_every_array_that_does_not_fit_is_named(tmp_path, state, mesh):
    checkpointer = Checkpointer(tmp_path / "checkpoints")
    checkpointer.save(1, state, {})
    checkpointer.wait()
    other = Task("other", None, lambda key: {"hidden": {"kernel": jnp.ones((5, 17)), "scale": jnp.ones(3)}}, None)
    with pytest.raises(SfdError) as fault:
        checkpointer.restore(abstract_state(other, OPTIMIZER, mesh))
    message = str(fault.value)
    for line in (
        "missing   params.hidden.scale (3,)",
        "extra     ema_params.out.kernel (16, 3)",
        "misshapen progress.opt_state.1.0.nu.hidden.kernel is (5, 16), expected (5, 17)",
    ):
        assert line in message
    # four trees: params, EMA, two moments; in each one missing, two extra, one misshapen
    assert message.count("\n") == 4 * 4


def test_converted_params_are_read_like_trained_ones_and_never_overwritten(tmp_path):
    params = {"a": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}}
    save_params(tmp_path / "converted", params, {"network": "x", "step": 400_000})
    for which in ("ema", "raw"):
        read, metadata = load_params(tmp_path / "converted", which=which)
        np.testing.assert_array_equal(read["a"]["kernel"], params["a"]["kernel"])
        assert metadata == {"network": "x", "step": 400_000}
    with pytest.raises(SfdError, match="400000 exists already"):
        save_params(tmp_path / "converted", params, {"step": 400_000})
    with pytest.raises(SfdError, match="no checkpoint of step 7; it has 400000"):
        load_params(tmp_path / "converted", step=7)
    with pytest.raises(SfdError, match="misshapen params.a.kernel"):
        load_params(tmp_path / "converted", abstract={"a": {"kernel": jax.ShapeDtypeStruct((3, 2), "float32")}})
    with pytest.raises(SfdError, match="must be JSON"):
        save_params(tmp_path / "other", params, {"array": np.ones(2)})


def test_relative_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_params("converted", {"w": np.ones(3, np.float32)}, {})
    assert load_params("converted")[1] == {"step": 0} and load_metadata("converted/0") == {"step": 0}


def test_absent_and_damaged_checkpoints(tmp_path, state):
    with pytest.raises(SfdError, match="no checkpoint folder"):
        load_params(tmp_path / "absent")
    with pytest.raises(SfdError, match="holds no complete checkpoint"):
        load_params(tmp_path)
    (tmp_path / "0000100.pt").write_bytes(b"PK")
    with pytest.raises(SfdError, match="0000100.pt is a file, not a checkpoint folder; `sfd convert"):
        load_params(tmp_path / "0000100.pt")
    save_params(tmp_path, state.params, {})
    for data in (tmp_path / "0" / "params").rglob("d/*"):
        data.write_bytes(b"damaged")
    with pytest.raises(SfdError, match="cannot be read.*damaged"):
        load_params(tmp_path)


@pytest.fixture
def saved(tmp_path, mesh):
    """A checkpoint of a run whose arrays are too large for TensorStore's index: (folder, target, its contents)."""
    task = Task("large", None, lambda key: {"kernel": jax.random.normal(key, (64, 32)), "bias": jnp.ones(3)}, None)
    checkpointer = Checkpointer(tmp_path / "checkpoints")
    checkpointer.save(3, init_state(task, OPTIMIZER, mesh, 0), {"task": "large", "latent_statistics": {"mean": [0.5]}})
    checkpointer.wait()
    target = abstract_state(task, OPTIMIZER, mesh)
    return tmp_path / "checkpoints" / "3", target, read_all(tmp_path / "checkpoints" / "3", target)


def read_all(folder, target):
    state = Checkpointer(folder.parent).restore(target, 3)
    return jax.device_get((state, load_params(folder), load_params(folder, which="raw")))


@pytest.mark.slow
def test_a_flipped_bit_in_any_file_is_named_or_not_read(saved):
    folder, target, whole = saved
    rng, refused, named = np.random.default_rng(0), set(), 0
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.stat().st_size]
    for file in files:
        data = file.read_bytes()
        for place in rng.integers(0, len(data), 3):
            damaged = bytearray(data)
            damaged[place] ^= 1 << int(rng.integers(8))
            file.write_bytes(damaged)
            try:
                assert jax.tree.all(jax.tree.map(np.array_equal, read_all(folder, target), whole)), f"{file} at {place}"
            except SfdError as error:
                refused.add(file.relative_to(folder).parts[0])
                named += "kernel" in str(error)
        file.write_bytes(data)
    assert (
        refused == {"params", "ema_params", "progress", "metadata"} and named >= 3
    )  # of six bits in the kernels; few are not read
    assert jax.tree.all(jax.tree.map(np.array_equal, read_all(folder, target), whole))


@pytest.mark.parametrize("item", ["params", "ema_params", "progress", "metadata"])
def test_a_checkpoint_that_lacks_an_item_says_which(saved, item):
    folder, target, _ = saved
    shutil.rmtree(folder / item)
    with pytest.raises(SfdError, match=f"lacks its {item}: an incomplete copy"):
        Checkpointer(folder.parent).restore(target)
    if item != "progress":
        with pytest.raises(SfdError, match=f"lacks its {item}"):
            load_params(folder, which={"params": "raw"}.get(item, "ema"))


def test_checkpoints_without_checksums_are_read_with_a_warning(saved, capsys):
    folder, target, whole = saved
    file = folder / "metadata" / "metadata"
    file.write_text(json.dumps(json.loads(file.read_text())["metadata"]))  # the old form
    jax.tree.map(np.testing.assert_array_equal, read_all(folder, target), whole)
    assert "has no checksums" in capsys.readouterr().out
    shutil.rmtree(folder / "ema_params")
    with pytest.raises(SfdError, match="lacks its ema_params"):
        load_params(folder)


def test_checksums_do_not_depend_on_the_device():
    rng = np.random.default_rng(0)
    mesh = make_mesh(2, 4)
    for dtype in ("float32", "bfloat16", "int32", "bool"):
        array = np.asarray(jnp.asarray(rng.standard_normal((3, 8, 16)), dtype))
        split = jax.device_put(array, NamedSharding(mesh, PartitionSpec(None, "data", "fsdp")))
        (value,) = checksums.checksums({"a": array}).values()
        assert (
            {value}
            == set(checksums.checksums({"a": split}).values())
            == {f"{int(checksums._on_device([split])[0]):08x}"}
        )
        swapped = array.copy()
        swapped[0, 0, 0], swapped[0, 0, 1] = array[0, 0, 1], array[0, 0, 0]
        assert np.array_equal(swapped, array) or checksums.checksums({"a": swapped})["a"] != value
    large = rng.integers(0, 2**32, 2**18 + 5, np.uint32)  # larger than a chunk
    assert checksums._on_host(large) == int(checksums._on_device([jnp.asarray(large)])[0])


def test_a_folder_of_another_step_and_arrays_of_another_dtype(saved):
    folder, target, _ = saved
    half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), target.params)
    with pytest.raises(SfdError, match="other dtype: params.kernel is float32, expected bfloat16"):
        load_params(folder, which="raw", abstract=half)
    folder.rename(folder.parent / "5")
    with pytest.raises(SfdError, match="5 holds step 3"):
        Checkpointer(folder.parent).restore(target)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SfdError, match="cannot be opened: .*Not a directory"):
        Checkpointer(tmp_path / "file" / "checkpoints")


def test_a_write_that_fails_in_the_background(tmp_path, state, mesh):
    """A limit on file size acts like a full disk: the same failed write, from the same thread."""
    resource = pytest.importorskip("resource")
    checkpointer = Checkpointer(tmp_path / "checkpoints")
    checkpointer.save(1, state, {})
    checkpointer.wait()
    large = Task("large", None, lambda key: {"kernel": jax.random.normal(key, (256, 256))}, None)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**15, limits[1]))
    try:
        with pytest.raises(SfdError, match="(can|could) not be written to .*Complete checkpoints are untouched"):
            checkpointer.save(2, init_state(large, OPTIMIZER, mesh, 0), {})
            checkpointer.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    checkpointer.close()
    assert Checkpointer(tmp_path / "checkpoints").latest_step() == 1
