"""`sfd train` with the tiny form of the shipped recipe, on a store made here."""

import numpy as np
import pytest

from sfd_jax.cli.build import train_config
from sfd_jax.cli.flags import load_config
from sfd_jax.cli.main import open_door
from sfd_jax.cli.train import main
from sfd_jax.data.latent_store import LatentStore, LatentStoreWriter, Plan, latent_fields
from sfd_jax.models import Network
from sfd_jax.training import load_params
from sfd_jax.training.logging import read_metrics

TINY = "--config=configs/sfd.py:xl,tiny"


def make_store(folder, seed=0, config={}, weights={}):
    """Twenty images of the tiny recipe's shapes."""
    fields = latent_fields((4, 4, 8), (4, 4, 4), dtype="float32", flips=True, repa_shape=(16, 24))
    writer = LatentStoreWriter(folder, Plan(20, 16, fields, config, weights, [f"class {i}" for i in range(10)]))
    rng = np.random.default_rng(seed)
    for shard in range(2):
        with writer.open_shard(shard) as records:
            for index in writer.plan.span(shard):
                arrays = {name: rng.standard_normal(field["shape"]) for name, field in fields.items()}
                records.add({**arrays, "label": index % 10, "index": index})
    writer.finish()
    return folder


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("latents"))


def train(workdir, latents, *flags):
    return open_door(main, "train", [TINY, f"--workdir={workdir}", f"--config.data.path={latents}", *flags])


@pytest.mark.slow
def test_the_shipped_recipe_trains_and_goes_on(latents, tmp_path, capsys):
    run = tmp_path / "run"
    small = ("--config.model.depth=2", "--config.model.remat=none")  # quicker to compile
    assert train(run, latents, "--config.train.steps=2", *small) == 0
    assert train(run, latents, *small) == 0
    out = capsys.readouterr()
    assert "20 images, 8 a step, 4 steps" in out.out and "goes on from step 2 of 4" in out.out
    assert "blocks/attention/qkv/kernel" in out.out  # the overview of parameters
    rows = read_metrics(run)
    assert [row["step"] for row in rows] == [2, 4]
    names = {f"error_{group}_q{q}" for group in ("semantic", "texture") for q in range(1, 5)}
    assert names & rows[0].keys() and {"loss", "loss_repa", "grad_norm", "learning_rate"} <= rows[0].keys()
    _, metadata = load_params(run)
    assert metadata["latent_statistics"]["texture_mean"] and metadata["class_names"][3] == "class 3"
    assert metadata["config"]["clocks"] == {"name": "fixed_offset", "delta_t": 0.3}

    assert train(run, latents, "--config.clocks.delta_t=0.5", *small) == 2
    assert "config.clocks.delta_t: there 0.3, here 0.5" in capsys.readouterr().err


def test_check_names_faults_without_training(latents, tmp_path, capsys):
    assert train(tmp_path / "run", latents, "--check") == 0
    assert "no faults found" in capsys.readouterr().out and not (tmp_path / "run").exists()
    assert train(tmp_path / "run", latents, "--check", "--config.model.num_classes=7") == 2
    assert "model.num_classes=7" in capsys.readouterr().err
    assert train(tmp_path / "run", latents, "--check", "--config.model.input_size=8") == 2
    assert "8, 8, 12" in capsys.readouterr().err


@pytest.mark.parametrize("flag, message", [
    ("--config.data.path=", "say where the latents are"),
    ("--config.data.path=nowhere", "nowhere"),
    ("--config.model.repa_features=0", "loss.repa_weight=1.0 needs the projector"),
    ("--config.latents.semantic_channels=5", "8 texture and 4 semantic channels, but latents.texture_channels=8 and"),
    ("--config.model.two_clocks=False", "model.two_clocks=False reads one clock"),
    ("--config.optimizer.schedule=cosin", "did you mean 'cosine'"),
    ("--config.train.accumulation=3", "global_batch_size=8 does not divide by train.accumulation=3"),
    ("--config.train.ema_decay=1.0", "train.ema_decay=1.0 must lie in"),
    ("--config.data.repa_source=web", "data.repa_source='web'"),
    ("--config.data.flip=False", "did you mean 'flips'"),
])
def test_faults_of_the_config_are_told_before_training(flag, message, latents, tmp_path, capsys):
    assert train(tmp_path / "run", latents, flag) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_train_semvae_from_stored_features(latents, tmp_path, capsys):
    from sfd_jax.cli.train_semvae import main

    others = make_store(tmp_path / "held_out", seed=1)
    flags = ["--config=configs/semantic_vae.py:tiny", f"--workdir={tmp_path}", f"--config.data.path={latents}"]
    assert open_door(main, "train_semvae", [*flags, f"--config.data.held_out_path={latents}"]) == 2
    assert "the held-out data are training data" in capsys.readouterr().err
    assert open_door(main, "train_semvae", [*flags, f"--config.data.held_out_path={others}"]) == 0
    last = read_metrics(tmp_path)[-1]
    assert {"mse", "cosine_token", "kl", "held_out_cosine", "held_out_mse"} <= last.keys()
    params, metadata = load_params(tmp_path)
    network = Network(metadata["network"], metadata["network_config"])
    # The held-out numbers count each of the 20 rows once, although batches of 8 are filled up to 24.
    features = LatentStore(others).read(np.arange(20))["repa_features"].astype(np.float32)
    mean, _ = network.apply(params, features, method="encode")
    error = np.square(np.asarray(network.apply(params, mean, method="decode")) - features)
    np.testing.assert_allclose(last["held_out_mse"], error.mean(), rtol=1e-2)  # bfloat16


@pytest.mark.slow
def test_train_texture_vae_on_digits(tmp_path):
    from safetensors.numpy import save_file

    from sfd_jax.cli.convert import main as convert
    from sfd_jax.cli.train_texture_vae import main

    rng, layers, lpips = np.random.default_rng(0), ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)), {}
    for i, numbers in enumerate(layers):  # LPIPS in the form of its package, three channels wide
        for number in numbers:
            lpips[f"net.slice{i + 1}.{number}.weight"] = rng.normal(0, 0.3, (3, 3, 3, 3)).astype(np.float32)
            lpips[f"net.slice{i + 1}.{number}.bias"] = rng.normal(0, 0.3, 3).astype(np.float32)
        lpips[f"lin{i}.model.1.weight"] = rng.random((1, 3, 1, 1), np.float32)
    save_file(lpips, tmp_path / "lpips.safetensors")
    assert open_door(convert, "convert", [str(tmp_path / "lpips.safetensors"), f"--out={tmp_path / 'lpips'}"]) == 0

    run = tmp_path / "run"
    flags = ["--config=configs/texture_vae.py:tiny", f"--workdir={run}", f"--config.lpips={tmp_path / 'lpips'}"]
    assert open_door(main, "train_texture_vae", flags) == 0
    last = read_metrics(run)[-1]
    assert {"l1", "kl", "held_out_psnr"} <= last.keys() and 0 < last["held_out_psnr"] < 60
    parts = last["l1"] + last["mse"] + 1e-5 * last["kl"] + last["perceptual"]
    assert last["perceptual"] > 0
    np.testing.assert_allclose(last["loss"], parts, rtol=1e-4)  # means of float32 over the steps logged
    assert load_params(run)[1]["class_names"] == [str(digit) for digit in range(10)]


@pytest.mark.parametrize("config", ["configs/semantic_vae.py", "configs/texture_vae.py"])
def test_full_recipes_resolve(config):
    config = load_config(config)
    name = "semantic_vae" if "arch" in config.model else "texture_vae"
    assert Network(name, config.model.to_dict()).num_params() > 1e7
    assert train_config(config).steps >= 400_000
