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


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    """Twenty images of the tiny recipe's shapes."""
    folder = tmp_path_factory.mktemp("latents")
    fields = latent_fields((4, 4, 8), (4, 4, 4), dtype="float32", flips=True, repa_shape=(16, 24))
    writer = LatentStoreWriter(folder, Plan(20, 16, fields, {}, {}, [f"class {i}" for i in range(10)]))
    rng = np.random.default_rng(0)
    for shard in range(2):
        with writer.open_shard(shard) as records:
            for index in writer.plan.span(shard):
                arrays = {name: rng.standard_normal(field["shape"]) for name, field in fields.items()}
                records.add({**arrays, "label": index % 10, "index": index})
    writer.finish()
    return folder


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
    assert "the latents are 4 x 4, but model.input_size=8: --config.model.input_size=4" in capsys.readouterr().err
    assert train(tmp_path / "run", latents, "--check", "--config.train.global_batch_size=12") == 2
    assert "global_batch_size=12 does not divide over 8 devices" in capsys.readouterr().err
    assert train(tmp_path / "run", latents, "--check", "--config.mesh.fsdp=3") == 0
    assert "note: whether the batch divides over the devices was not checked" in capsys.readouterr().out
    assert train(tmp_path / "run", latents, "--check", "--init=nowhere") == 2
    assert "no checkpoint folder" in capsys.readouterr().err


@pytest.mark.parametrize("flag, message", [
    ("--config.data.path=", "say where the latents are"),
    ("--config.data.path=nowhere", "nowhere"),
    ("--config.model.repa_features=0", "loss.repa_weight=1.0 needs the projector"),
    ("--config.latents.semantic_channels=5", "8 texture and 4 semantic channels, but latents.texture_channels=8 and"),
    ("--config.model.two_clocks=False", "model.two_clocks=False reads one clock"),
    ("--config.optimizer.schedule=cosin", "did you mean 'cosine'"),
    ("--config.train.accumulation=3", "global_batch_size=8 does not divide by train.accumulation=3"),
    ("--config.train.ema_decay=1.0", "train.ema_decay=1.0: give a number from 0 to below 1"),
    ("--config.data.repa_source=web", "data.repa_source='web'"),
    ("--config.data.flip=False", "did you mean 'flips'"),
])
def test_faults_of_the_config_are_told_before_training(flag, message, latents, tmp_path, capsys):
    assert train(tmp_path / "run", latents, flag) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_all_faults_are_named_at_once_with_the_flags_that_fix_them(tmp_path, capsys):
    """What a new user meets whose latents were extracted without `--repa`, with other channels and no mirrored images."""
    folder = tmp_path / "plain"
    fields = latent_fields((4, 4, 6), (4, 4, 3), dtype="float32", flips=False)
    writer = LatentStoreWriter(folder, Plan(8, 8, fields, {}, {}, [str(i) for i in range(10)]))
    with writer.open_shard(0) as records:
        for index in range(8):
            arrays = {name: np.random.default_rng(index).standard_normal(field["shape"]) for name, field in fields.items()}
            records.add({**arrays, "label": 1, "index": index})
    writer.finish()
    wrong = ["--config.optimizer.learning_rate=nan", "--config.loss.time=none", "--config.train.accumulation=3",
             "--config.model.input_size=8"]  # fmt: skip
    for check in ([], ["--check"]):
        assert train(tmp_path / "run", folder, *wrong, *check) == 2
        told = capsys.readouterr().err
        assert told.startswith("sfd train: 7 faults:\n")
        for words in ("optimizer.learning_rate=nan: give", "unknown loss.time 'none'", "train.accumulation=3",
                      "--config.latents.texture_channels=6 --config.latents.semantic_channels=3", "--config.data.flips=False",
                      "`sfd extract --repa`", "--config.model.repa_features=0 --config.loss.repa_weight=0",
                      "--config.model.input_size=4"):  # fmt: skip
            assert words in told
    assert not (tmp_path / "run").exists()
    flags = ("--config.latents.texture_channels=6", "--config.latents.semantic_channels=3", "--config.data.flips=False",
             "--config.model.repa_features=0", "--config.loss.repa_weight=0", "--check")  # fmt: skip
    assert train(tmp_path / "run", folder, *flags) == 0  # the flags do fix it


@pytest.mark.parametrize("module, flags, words", [
    ("train_semvae", ["--config.model.hidden_dim=7", "--config.loss.mse_weight=nan"],
     ("3 faults", "hidden_dim 7", "loss.mse_weight=nan", "say where the features are")),
    ("train_texture_vae", ["--config.model.norm_groups=7", "--config.data.workers=-1", "--config.lpips=s3://x"],
     ("4 faults", "norm_groups 7", "data.workers=-1", "'s3:' cannot be read", "say where the images are")),
])  # fmt: skip
def test_the_other_training_commands_check_too(module, flags, words, tmp_path, capsys):
    import importlib

    main = importlib.import_module(f"sfd_jax.cli.{module}").main
    assert open_door(main, module, [f"--workdir={tmp_path / 'run'}", "--check", *flags]) == 2
    told = capsys.readouterr().err
    assert all(word in told for word in words), told
    assert not (tmp_path / "run").exists()


def test_check_of_a_texture_vae_and_a_semantic_vae(latents, tmp_path, capsys):
    from sfd_jax.cli import train_semvae, train_texture_vae

    run = f"--workdir={tmp_path / 'run'}"
    assert open_door(train_texture_vae.main, "train_texture_vae", ["--config=configs/texture_vae.py:tiny", run, "--check"]) == 0
    flags = ["--config=configs/semantic_vae.py:tiny", run, f"--config.data.path={latents}", "--check"]
    assert open_door(train_semvae.main, "train_semvae", flags) == 0
    assert capsys.readouterr().out.count("no faults found") == 2 and not (tmp_path / "run").exists()
    assert open_door(train_semvae.main, "train_semvae", [*flags, "--config.model.input_dim=20"]) == 2
    assert "the data do not fit the network" in capsys.readouterr().err


@pytest.mark.slow
def test_train_semvae_from_stored_features(latents, tmp_path):
    from sfd_jax.cli.train_semvae import main

    flags = ["--config=configs/semantic_vae.py:tiny", f"--workdir={tmp_path}", f"--config.data.path={latents}",
             f"--config.data.held_out_path={latents}"]
    assert open_door(main, "train_semvae", flags) == 0
    last = read_metrics(tmp_path)[-1]
    assert {"mse", "cosine_token", "kl", "held_out_cosine", "held_out_mse"} <= last.keys()
    params, metadata = load_params(tmp_path)
    network = Network(metadata["network"], metadata["network_config"])
    # The held-out numbers count each of the 20 rows once, although batches of 8 are filled up to 24.
    features = LatentStore(latents).read(np.arange(20))["repa_features"].astype(np.float32)
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
