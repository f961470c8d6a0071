"""Mesh shapes, slices, and the rule from shapes to shardings."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from sfd_jax.distributed import batch_sharding, make_mesh, param_shardings, put_batch, shard_rule
from sfd_jax.errors import SfdError


def test_minus_one_takes_the_remaining_devices():
    assert dict(make_mesh(-1, 2).shape) == {"data": 4, "fsdp": 2}
    assert dict(make_mesh(1, -1).shape) == {"data": 1, "fsdp": 8}
    assert dict(make_mesh(-1, -1).shape) == {"data": 1, "fsdp": 8}
    assert sorted(device.id for device in make_mesh(2, 4).devices.flat) == list(range(8))


@pytest.mark.parametrize("data, fsdp", [(-2, -1), (0, 8), (-2, -4), (8, True)])
def test_impossible_sizes_are_refused(data, fsdp):
    with pytest.raises(SfdError, match="mesh.(data|fsdp)=.*: give an integer from 1"):
        make_mesh(data, fsdp)


@pytest.mark.parametrize("data, fsdp", [(3, -1), (2, 2)])
def test_sizes_that_do_not_fill_the_devices(data, fsdp):
    with pytest.raises(SfdError, match=f"mesh.data={data} and mesh.fsdp={fsdp}"):
        make_mesh(data, fsdp)


@dataclasses.dataclass(frozen=True)
class FakeChip:
    """The attributes that the mesh reads of a device of a two-slice job."""

    id: int
    slice_index: int
    platform: str = "fake"
    device_kind: str = "fake"
    process_index: int = 0


def test_only_data_crosses_slices():
    chips = [FakeChip(id, slice_index=id % 2) for id in range(8)]
    try:
        grid = make_mesh(2, 4, devices=chips).devices
    except TypeError:
        pytest.skip("this JAX makes a Mesh of real devices only")
    assert [{chip.slice_index for chip in row} for row in grid] == [{0}, {1}]
    with pytest.raises(SfdError, match="mesh.data=1 does not divide over 2 slices"):
        make_mesh(1, 8, devices=chips)


def test_largest_divisible_dimension_is_split():
    mesh = make_mesh(2, 4)
    assert shard_rule((28, 1152, 6912), mesh) == PartitionSpec(None, None, "fsdp")
    assert shard_rule((28, 4608, 1153), mesh) == PartitionSpec(None, "fsdp")
    assert shard_rule((1152, 1152), mesh) == PartitionSpec("fsdp")  # the earlier of equals
    assert shard_rule((1001, 1153), mesh) == PartitionSpec()  # indivisible
    assert shard_rule((1152,), mesh) == PartitionSpec()  # small
    assert shard_rule((), mesh) == PartitionSpec()
    assert shard_rule((1152, 1152), make_mesh(8, 1)) == PartitionSpec()


def test_batch_rows_are_spread_over_both_axes():
    mesh = make_mesh(2, 4)
    batch = put_batch({"x": np.arange(24.0).reshape(8, 3)}, mesh)
    assert batch["x"].sharding == batch_sharding(mesh)
    assert {shard.data.shape for shard in batch["x"].addressable_shards} == {(1, 3)}
    np.testing.assert_array_equal(batch["x"], np.arange(24.0).reshape(8, 3))


def test_one_rule_for_a_tree():
    mesh = make_mesh(1, 8)
    tree = {"a": jax.ShapeDtypeStruct((1024, 64), "float32"), "b": {"c": jax.ShapeDtypeStruct((7,), "float32")}}
    shardings = param_shardings(tree, mesh)
    assert shardings["a"].shard_shape((1024, 64)) == (128, 64)
    assert shardings["b"]["c"].is_fully_replicated
