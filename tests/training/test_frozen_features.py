"""Targets computed inside the step by frozen networks, and the batches that these read."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_training import INPUTS, OUTPUTS, toy_batches, toy_config, toy_task

from sfd_jax.cli.main import run_command
from sfd_jax.data.paired import WithPixels
from sfd_jax.data.pipeline import latent_transform
from sfd_jax.distributed import make_mesh, put_batch
from sfd_jax.errors import SfdError
from sfd_jax.latents import LatentLayout, LatentStatistics
from sfd_jax.models import Network
from sfd_jax.models.encoders import Tiling, VisualEncoder, to_float
from sfd_jax.training import fit, init_state, load_params, make_optimizer, make_train_step
from sfd_jax.training.frozen_features import online_features, semvae_features
from sfd_jax.training.randomness import stream_key


def task_with_teacher(teacher: np.ndarray):
    """The toy task with targets that a frozen matrix computes from the inputs."""
    toy = toy_task()

    def loss(params, batch, key, frozen):
        return toy.loss(params, {**batch, "y": batch["x"] @ frozen["kernel"]}, key)

    return dataclasses.replace(toy, loss=loss, frozen={"kernel": teacher})


TEACHER = np.random.default_rng(3).standard_normal((INPUTS, OUTPUTS)).astype(np.float32)


@pytest.mark.parametrize("parts", [1, 2])
def test_targets_computed_in_the_step_equal_those_of_the_data(parts):
    config, mesh = toy_config(accumulation=parts), make_mesh(2, 4)
    optimizer, key = make_optimizer(config.optimizer, config.steps), stream_key(1, "loss", mesh)
    batch = {name: rows for name, rows in next(toy_batches()(0)).items() if name != "index"}
    ends = []
    for task, y in ((task_with_teacher(TEACHER), batch["y"]), (toy_task(), batch["x"] @ TEACHER)):
        step = make_train_step(task, optimizer, config, mesh)
        state, _ = step(init_state(task, optimizer, mesh, 0), put_batch({**batch, "y": y}, mesh), key)
        ends.append(jax.device_get(state.params))
    # One AdamW step of 0.01; rounding of a product of five terms, in numpy's order or XLA's.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *ends)


def test_checkpoints_hold_only_the_hash_of_frozen_weights(tmp_path):
    mesh, run = make_mesh(1, 1, devices=jax.devices()[:1]), tmp_path / "run"
    through = fit(
        task_with_teacher(TEACHER), toy_batches(), toy_config(), tmp_path / "through", mesh=mesh, progress=False
    )
    config = toy_config(optimizer=dataclasses.replace(toy_config().optimizer, schedule="constant"))
    fit(task_with_teacher(TEACHER), toy_batches(), dataclasses.replace(config, steps=4), run, mesh=mesh, progress=False)
    resumed = fit(task_with_teacher(TEACHER), toy_batches(), config, run, mesh=mesh, progress=False)
    jax.tree.map(np.testing.assert_array_equal, through.params, resumed.params)  # to the bit

    params, metadata = load_params(run)
    assert params.keys() == toy_task().init(jax.random.key(0)).keys()
    assert metadata["frozen"] == json.loads((run / "run.json").read_text())["frozen"] and len(metadata["frozen"]) == 64
    with pytest.raises(SfdError, match="frozen: there"):
        fit(task_with_teacher(TEACHER + 1), toy_batches(), config, run, mesh=mesh, progress=False)


def test_semvae_features_are_decoded_from_raw_latents_tile_by_tile():
    network = Network(
        "semantic_vae",
        dict(
            arch="transformer", input_dim=6, bottleneck_dim=2, hidden_dim=4, transformer_heads=2, transformer_blocks=1
        ),
    )
    params, rng = network.init(jax.random.key(0)), np.random.default_rng(0)
    raw = rng.standard_normal((3, 4, 4, 5)).astype(np.float32)  # 3 texture channels, 2 semantic ones
    statistics = LatentStatistics(np.zeros(3), np.ones(3), np.array([0.5, -2.0]), np.array([3.0, 0.25]))
    latents = np.concatenate([raw[..., :3], (raw[..., 3:] - [0.5, -2.0]) / [3.0, 0.25]], axis=-1).astype(np.float32)
    made = semvae_features(network, params, LatentLayout(3, 2), statistics, tile_grid=2)
    features = np.asarray(made.compute(params, {"latents": latents})).reshape(3, 4, 4, 6)
    for top, left in ((0, 0), (0, 2), (2, 0), (2, 2)):  # attention is within one quarter
        tokens = raw[:, top : top + 2, left : left + 2, 3:].reshape(3, 4, 2)
        expected = network.apply(params, tokens, method="decode").reshape(3, 2, 2, 6)
        # Two orders of the same float32 sums.
        np.testing.assert_allclose(features[:, top : top + 2, left : left + 2], expected, atol=2e-5)
    with pytest.raises(SfdError, match="tile_grid=3 does not divide a grid of 4 latents"):
        semvae_features(network, params, LatentLayout(3, 2), statistics, 3).compute(params, {"latents": latents})


def test_online_features_are_the_encoders():
    network = Network("dinov2", dict(image_size=8, patch_size=4, width=6, depth=1, num_heads=1, num_registers=1))
    params = network.init(jax.random.key(0))
    encoder = VisualEncoder(network, Tiling(tile_size=8, grid=2))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    expected = encoder.features(params, to_float(jnp.asarray(pixels)))
    made = online_features(encoder, params)
    for given in (pixels, to_float(jnp.asarray(pixels))):
        np.testing.assert_allclose(made.compute(params, {"pixels": jnp.asarray(given)}), expected, atol=1e-6)


class Latents:
    """Five latents of seven images: 2 and 5 were broken when they were extracted."""

    statistics, class_names = LatentStatistics(np.zeros(1), np.ones(1), np.zeros(1), np.ones(1)), None
    kept = np.array([0, 1, 3, 4, 6])

    def __len__(self):
        return 5

    def read(self, indices, flip):
        index = self.kept[indices]
        latent = (np.where(flip, -index, index)[:, None, None, None] * np.ones((1, 2, 2, 1))).astype(np.float32)
        return {"texture": latent, "semantic": latent, "label": (index % 3).astype(np.int32), "index": index}


class Images:
    def __init__(self, count=7, shift=0):
        self.count, self.shift = count, shift

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        pixels = np.zeros((2, 2, 3), np.uint8)
        pixels[:, 0] = 10 * index  # the left column
        return {"pixels": pixels, "label": (index + self.shift) % 3, "index": index}


def test_pixels_are_those_the_latents_were_made_from():
    source = WithPixels(Latents(), Images())
    batch = source.read(np.array([4, 2]), np.zeros(2, bool))
    np.testing.assert_array_equal(batch["pixels"][:, 0, 0, 0], [60, 30])
    assert len(source) == 5
    transform = latent_transform(LatentLayout(1, 1), Latents.statistics)
    flipped = transform(source.read(np.array([4, 2]), np.array([False, True])))
    np.testing.assert_array_equal(flipped["latents"][:, 0, 0, 0], [6, -3])
    np.testing.assert_array_equal(flipped["pixels"][:, 0, :, 0], [[60, 0], [0, 30]])  # mirrored as the latent is
    with pytest.raises(SfdError, match="image 6 has label 1, but its latents 0"):
        WithPixels(Latents(), Images(shift=1)).read(np.array([4]), np.zeros(1, bool))
    with pytest.raises(SfdError, match="latents of image 6, but there are 5 images"):
        WithPixels(Latents(), Images(5)).read(np.array([4]), np.zeros(1, bool))


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--config.data.repa_source=semvae"], "--config.data.semantic_vae=CKPT"),
        (["--config.data.repa_source=online"], "--config.data.visual_encoder=CKPT"),
        (["--config.data.repa_source=online", "--config.data.visual_encoder=x"], "--config.data.images.path=IMAGES"),
        (["--config.data.repa_source=semva"], "did you mean 'semvae'"),
    ],
)
def test_a_missing_input_of_a_source_is_reported_by_the_command(flags, message, tmp_path, capsys):
    from sfd_jax.cli.train import main

    assert run_command(main, "train", ["--config=configs/sfd.py:xl,tiny", f"--workdir={tmp_path / 'run'}", *flags]) == 2
    assert message in capsys.readouterr().err
