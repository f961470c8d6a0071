"""Hosts whose devices interleave in the mesh, as on a TPU slice, take the same steps as one host."""

import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from job_testing import launch

from sfd_jax import libtpu
from sfd_jax.distributed import host_rows, make_mesh, put_batch
from sfd_jax.errors import SfdError

IN_ORDER = list(range(8))
# Processes, the devices in the mesh's order (that of a v5e:4x4's first hosts), parts of the batch.
JOBS = {"one": (1, IN_ORDER, 1), "two, in parts": (2, [0, 1, 4, 5, 6, 7, 2, 3], 2)}


@pytest.mark.slow
def test_hosts_with_shuffled_devices_take_the_steps_of_one(tmp_path):
    script, found = Path(__file__).with_name("shuffled_job.py"), {}
    jobs = {
        name: launch([script, tmp_path / f"{name}.npz", json.dumps(order), parts], count, devices=8)
        for name, (count, order, parts) in JOBS.items()
    }
    for name, job in jobs.items():
        said = [process.communicate(timeout=600) for process in job.values()]
        assert {process.returncode for process in job.values()} == {0}, said
        with np.load(tmp_path / f"{name}.npz") as file:
            found[name] = dict(file)
    one, other = found.values()
    assert one.keys() == other.keys()
    drawn = [key for key in one if "_draws_" in key]
    assert len(drawn) == 3 * 18 and len({float(one[key][0]) for key in drawn}) > 30
    assert {0 < one[key][0] < one[key][1] for key in drawn if "dropped" in key} == {True}
    for key in one:
        if key.startswith("batch") or key in drawn:
            np.testing.assert_array_equal(one[key], other[key], err_msg=key)
        else:  # sums over the batch run in another order
            np.testing.assert_allclose(one[key], other[key], rtol=1e-5, atol=1e-5, err_msg=key)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: `bash scripts/setup.sh pod`")
def test_rows_of_a_host_on_a_slice():
    libtpu.expect_no_machine()
    from jax.experimental import topologies

    devices = lambda name, **options: topologies.get_topology_desc(name, platform="tpu", **options).devices
    mesh = make_mesh(devices=devices("v5e:4x4"))
    assert [device.process_index for device in mesh.devices.flat] == [0, 0, 1, 1, 1, 1, 0, 2, 3, 3, 3, 3, 2, 2, 2, 0]
    assert host_rows(mesh, 32).tolist() == [0, 1, 2, 3, 12, 13, 30, 31]  # of process 0, this one
    # A v4 chip has two cores, which are one device ("megacore") unless the topology says otherwise.
    with pytest.raises(SfdError, match="chip_config_name='megacore'"):
        make_mesh(devices=devices("v4:2x2x4"))
    assert make_mesh(devices=devices("v4:2x2x4", chip_config_name="megacore")).size == 16


def test_rows_that_do_not_divide_are_refused():
    mesh = make_mesh(4, 2)
    np.testing.assert_array_equal(host_rows(mesh, 16), np.arange(16))
    with pytest.raises(SfdError, match="12 rows does not divide over 8 devices"):
        host_rows(mesh, 12)
    with pytest.raises(SfdError, match="12 rows of a batch do not divide over 8 devices"):
        put_batch({"x": np.zeros(12)}, mesh)


def test_a_mesh_in_any_order_holds_the_batch_in_its_own():
    shuffled = np.array(jax.devices())[[5, 0, 3, 6, 1, 7, 4, 2]].reshape(4, 2)
    mesh = jax.sharding.Mesh(shuffled, ("data", "fsdp"))
    x = np.arange(48).reshape(16, 3)
    np.testing.assert_array_equal(put_batch({"x": x[host_rows(mesh, 16)]}, mesh)["x"], x)
