"""Programs are traced and compiled once: not after the first step or the first batch of samples."""

import jax
import jax.monitoring
import numpy as np
import pytest

from sfd_jax.diffusion.clocks import FixedOffset
from sfd_jax.diffusion.losses import LossConfig
from sfd_jax.distributed import make_mesh, put_batch
from sfd_jax.generation.sampler import SampleConfig, Sampler
from sfd_jax.latents import LatentLayout, LatentStatistics
from sfd_jax.models import Network
from sfd_jax.training import OptimizerConfig, TrainConfig, init_state, make_optimizer, make_train_step
from sfd_jax.training.diffusion import diffusion_task
from sfd_jax.training.randomness import stream_key

DIT = Network("lightning_dit", dict(width=16, depth=1, num_heads=2, input_size=2, in_channels=5, num_classes=3))
LAYOUT = LatentLayout(3, 2)


@pytest.fixture
def work():
    """A list that grows by one name with everything that JAX traces or compiles."""
    names = []
    listening = [True]

    def note(event, seconds, **more):
        if listening and ("trace" in event or "compile" in event):
            names.append((event, more.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(note)
    yield names
    listening.clear()  # JAX has no public function to remove a listener


@pytest.mark.slow
def test_training_steps(work):
    config = TrainConfig(OptimizerConfig(schedule="cosine", warmup_steps=2), steps=9, global_batch_size=8)
    mesh, optimizer = make_mesh(), make_optimizer(config.optimizer, config.steps)
    task = diffusion_task(DIT, LAYOUT, FixedOffset(0.3), LossConfig(repa_weight=0.0))
    state, key = init_state(task, optimizer, mesh, 0), stream_key(0, "step", mesh)
    step = make_train_step(task, optimizer, config, mesh)

    def take(seed):
        random = np.random.default_rng(seed)
        latents = random.standard_normal((8, 2, 2, 5)).astype(np.float32)
        return step(state, put_batch({"latents": latents, "labels": np.arange(8, dtype=np.int32) % 3}, mesh), key)[0]

    state = take(0)
    assert work  # the listener works
    work.clear()
    for seed in (1, 2, 3):
        state = take(seed)
    assert int(state.step) == 4 and not work, work


@pytest.mark.slow
def test_batches_of_samples_and_the_padded_last_one(work):
    vae = Network("texture_vae", dict(ch=4, ch_mult=(1, 2), num_res_blocks=1, z_channels=3, norm_groups=2))
    params = [jax.jit(network.init)(jax.random.key(0)) for network in (DIT, vae)]
    zeros, ones = np.zeros(5, np.float32), np.ones(5, np.float32)
    sampler = Sampler(
        (DIT, params[0]),
        (vae, params[1]),
        layout=LAYOUT,
        statistics=LatentStatistics(zeros[:3], ones[:3], zeros[3:], ones[3:]),
        clocks=FixedOffset(0.3),
        config=SampleConfig(),
    )
    labels = np.arange(20) % 3
    sampler(np.arange(8), labels[:8], batch_size=8)
    assert work
    work.clear()
    images, _ = sampler(np.arange(20), labels, batch_size=8)  # 8, 8, and 4 with 4 more of the last
    assert len(images) == 20 and not work, work
