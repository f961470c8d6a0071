"""Two processes as two hosts: they make together what one makes alone, and host 0 writes it."""

import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from sfd_jax.generation.job import make_images
from sfd_jax.generation.outputs import write_samples_npz

HOST = """
import sys
sys.path[:0] = {paths!r}
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
from sfd_jax import distributed
distributed.start()
import numpy as np
import test_sampler, test_sampling_hosts
from sfd_jax.evaluation import gather, image_set_of
assert jax.process_count() == 2 and jax.device_count() == 4
test_sampling_hosts.job(sys.argv[1])
images = np.random.default_rng(0).integers(0, 256, (13, 5, 3, 3), dtype=np.uint8)
import test_evaluate
[(statistics, _)] = gather(image_set_of("images", images), [test_evaluate.stand_in()], keep_features=[True])
np.save(sys.argv[2], statistics.features)
"""


def job(folder):
    import test_sampler

    sampler = test_sampler.make_sampler(test_sampler.dit(), test_sampler.vae(), test_sampler.EULER, seed=11)
    labels = np.arange(11, dtype=np.int32) % 5
    make_images(sampler, labels, folder, recipe=sampler.recipe, batch_size=4, chunk_size=8, progress=False)


@pytest.mark.slow
def test_two_hosts_make_what_one_makes(tmp_path, root):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    paths = [str(root), str(root / "tests" / "generation"), str(root / "tests" / "evaluation")]
    processes = []
    for index in range(2):
        environment = {
            **os.environ,
            "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(index),
        }
        code = HOST.format(paths=paths)
        arguments = [str(tmp_path / f"host{index}"), str(tmp_path / f"{index}.npy")]
        processes.append(subprocess.Popen([sys.executable, "-c", code, *arguments], env=environment))
    assert [process.wait(timeout=400) for process in processes] == [0, 0]
    assert not (tmp_path / "host1").exists()

    job(tmp_path / "alone")
    with np.load(write_samples_npz(tmp_path / "host0")) as both, np.load(write_samples_npz(tmp_path / "alone")) as one:
        difference = np.abs(both["arr_0"].astype(int) - one["arr_0"])
        assert difference.max() <= 1 and (difference > 0).mean() < 0.01  # truncation to bytes at an edge
        np.testing.assert_array_equal(both["arr_1"], one["arr_1"])
    np.testing.assert_array_equal(np.load(tmp_path / "0.npy"), np.load(tmp_path / "1.npy"))
