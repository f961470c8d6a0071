"""`sfd train` with the tiny variant of the shipped recipe, on a generated store."""

import json
import re
import shutil
from types import MappingProxyType

import jax
import numpy as np
import pytest
from PIL import Image

from sfd_jax.cli.main import SMALLER, run_command
from sfd_jax.cli.train import main
from sfd_jax.cli.train_semvae import main as train_semvae
from sfd_jax.data.latent_store import LatentStore, LatentStoreWriter, Plan, latent_fields
from sfd_jax.experiment.build import network_from_config, train_config
from sfd_jax.experiment.config_files import load_config
from sfd_jax.models import Network
from sfd_jax.models.fingerprint import params_hash
from sfd_jax.training import load_params, save_params
from sfd_jax.training.logging import read_metrics

TINY = "--config=configs/sfd.py:xl,tiny"


def make_store(folder, seed=0, config=MappingProxyType({}), weights=MappingProxyType({})):
    """Twenty images of the tiny recipe's shapes."""
    fields = latent_fields((4, 4, 8), (4, 4, 4), dtype="float32", flips=True, repa_shape=(16, 24))
    writer = LatentStoreWriter(
        folder, Plan(20, 16, fields, dict(config), dict(weights), [f"class {i}" for i in range(10)])
    )
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
    return run_command(main, "train", [TINY, f"--workdir={workdir}", f"--config.data.path={latents}", *flags])


@pytest.mark.slow
def test_the_shipped_recipe_trains_and_resumes(latents, tmp_path, capsys):
    run = tmp_path / "run"
    small = ("--config.model.depth=2", "--config.model.remat=none")  # quicker to compile
    assert train(run, latents, "--config.train.steps=2", *small) == 0
    assert train(run, latents, *small) == 0
    out = capsys.readouterr()
    assert "20 images, 8 per step, 4 steps" in out.out and "resuming from step 2 of 4" in out.out
    assert "blocks/attention/qkv/kernel" in out.out  # the overview of parameters
    rows = read_metrics(run)
    assert [row["step"] for row in rows] == [2, 4]
    names = {f"error_{group}_q{q}" for group in ("semantic", "texture") for q in range(1, 5)}
    assert names & rows[0].keys() and {"loss", "loss_repa", "grad_norm", "learning_rate"} <= rows[0].keys()
    _, metadata = load_params(run)
    assert metadata["latent_statistics"]["texture_mean"] and metadata["class_names"][3] == "class 3"
    assert metadata["latents"] == {"weights": {}, "image_size": None, "tile_grid": None, "labels": list(range(10))}
    assert metadata["average"] == {"decay": 0.9999, "from": "drawn weights"}
    assert metadata["config"]["clocks"] == {"name": "fixed_offset", "delta_t": 0.3}

    assert train(run, latents, "--config.clocks.delta_t=0.5", *small) == 2
    assert "config.clocks.delta_t: there 0.3, here 0.5" in capsys.readouterr().err
    assert train(run, latents, "--config.clocks.delta_t=0.5", "--check", *small) == 2
    assert "config.clocks.delta_t: there 0.3, here 0.5" in capsys.readouterr().err
    before = (run / "run.json").read_bytes()
    assert train(run, latents, "--check", "--config.model.remat=full", "--config.model.depth=2") == 0
    assert (run / "run.json").read_bytes() == before
    assert f"note: {run} has done 4 steps, so train.steps=4 is already reached" in capsys.readouterr().out


@pytest.mark.slow
def test_the_advice_on_memory_can_be_applied_to_a_started_run(latents, tmp_path, capsys):
    small = ("--config.model.depth=1", "--config.model.repa_depth=1", "--config.model.remat=none")  # quicker to compile
    small += ("--config.train.global_batch_size=16",)
    run = tmp_path / "run"
    assert train(run, latents, *small) == 0
    advice = re.findall(r"--config[.\w]+=-?\w+", SMALLER["train"])
    assert [flag.split(".")[-1].split("=")[0] for flag in advice] == ["remat", "accumulation", "data", "fsdp"]
    moved = shutil.copytree(latents, tmp_path / "moved")
    for flags in (advice, ["--config.model.scan_blocks=False"]):
        shutil.rmtree(run / "checkpoints" / "4")
        assert train(run, moved, *small, *flags) == 0
        assert "resuming from step 2 of 4" in capsys.readouterr().out
    manifest = json.loads((moved / "manifest.json").read_text())
    manifest["shards"][1]["sha256"] = "0" * 64  # other latents
    (moved / "manifest.json").write_text(json.dumps(manifest))
    assert train(run, moved, *small) == 2
    assert "data_hash: there" in capsys.readouterr().err


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
    assert "note: it was not checked whether the batch divides over the devices" in capsys.readouterr().out
    assert train(tmp_path / "run", latents, "--check", "--init=nowhere") == 2
    assert "no checkpoint folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--config.data.path=", "give the latents"),
        ("--config.data.path=nowhere", "nowhere"),
        ("--config.model.repa_features=0", "loss.repa_weight=1.0 needs a projector"),
        (
            "--config.latents.semantic_channels=5",
            "8 texture and 4 semantic channels, but latents.texture_channels=8 and",
        ),
        ("--config.model.two_clocks=False", "model.two_clocks=False reads one clock"),
        ("--config.optimizer.schedule=cosin", "did you mean 'cosine'"),
        ("--config.train.accumulation=3", "global_batch_size=8 does not divide by train.accumulation=3"),
        ("--config.train.ema_decay=1.0", "train.ema_decay=1.0: give a number from 0 to below 1"),
        ("--config.data.repa_source=web", "data.repa_source='web'"),
        ("--config.data.flip=False", "did you mean 'flips'"),
    ],
)
def test_faults_of_the_config_are_reported_before_training(flag, message, latents, tmp_path, capsys):
    assert train(tmp_path / "run", latents, flag) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def save_drawn(folder, name, config, seed=0, **metadata):
    """Save a drawn network; return its folder and its hash."""
    network, random = Network(name, config), np.random.default_rng(seed)
    params = jax.tree.map(lambda leaf: random.standard_normal(leaf.shape).astype(np.float32), network.abstract_params())
    save_params(
        folder, params, {"network": name, "network_config": network.config_dict(), "source": "drawn", **metadata}
    )
    return str(folder), params_hash(params)


def test_unusual_settings_are_noted_at_the_start(latents, tmp_path, capsys):
    assert train(tmp_path / "run", latents, "--check", "--config.model.num_classes=12") == 0
    out = capsys.readouterr().out
    assert "note: model.num_classes=12, but the data have images of 10 classes: the embeddings of the other 2" in out
    assert (
        "note: train.ema_decay=0.9999 is too large for 4 steps" in out and "Set train.ema_decay=0.31 (1 % left)" in out
    )
    assert train(tmp_path / "run", latents, "--check", "--config.train.ema_decay=0.31") == 0
    assert "note:" not in capsys.readouterr().out


def test_initial_weights_must_fit_the_network_and_notes_name_other_latents(latents, tmp_path, capsys):
    store = make_store(tmp_path / "store", weights={"texture_vae": "1" * 64})
    network = network_from_config(load_config(TINY.removeprefix("--config=")))
    other = {"weights": {"texture_vae": "2" * 64}}
    metadata = dict(latents=other, latent_statistics=LatentStore(latents).statistics.to_dict(), class_names=["a", "b"])
    same = {**metadata, "latents": {"weights": {}}, "class_names": [f"class {i}" for i in range(10)]}
    vae, _ = save_drawn(tmp_path / "vae", "semantic_vae", SEMANTIC)
    init, _ = save_drawn(tmp_path / "init", network.name, network.config_dict(), **metadata)
    plain, _ = save_drawn(tmp_path / "plain", network.name, network.config_dict(), **same)
    assert train(tmp_path / "run", store, "--check", f"--init={vae}") == 2
    assert f"--init={vae} holds 'semantic_vae', expected 'lightning_dit'" in capsys.readouterr().err
    assert train(tmp_path / "run", store, "--check", f"--init={init}") == 0
    out = capsys.readouterr().out
    assert "features of another texture_vae 222222222222, not 111111111111" in out and "other class names" in out
    assert "ema_decay" not in out  # the average starts from trained weights
    assert train(tmp_path / "run", store, "--check", f"--init={plain}") == 0
    assert "note:" not in capsys.readouterr().out


SEMANTIC = dict(arch="linear", input_dim=24, bottleneck_dim=4)
VISUAL = dict(width=24, depth=1, num_heads=2, image_size=28, patch_size=7, num_registers=0)


def test_targets_need_the_networks_that_made_the_latents(tmp_path, capsys):
    semantic, made_semantic = save_drawn(tmp_path / "semantic", "semantic_vae", SEMANTIC)
    visual, made_visual = save_drawn(tmp_path / "visual", "dinov2", VISUAL)
    narrow, made_narrow = save_drawn(tmp_path / "narrow", "semantic_vae", SEMANTIC | {"input_dim": 20})
    config = {"image_size": 32, "tile_size": 16}
    own = make_store(tmp_path / "own", config=config, weights={"semantic_vae": made_semantic, "visual": made_visual})
    other = make_store(tmp_path / "other", config=config, weights={"semantic_vae": made_narrow, "visual": "3" * 64})
    unknown = make_store(tmp_path / "unknown")
    folder = tmp_path / "images" / "train" / "0"
    folder.mkdir(parents=True)
    for index in range(20):
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / f"{index:02d}.png")
    semvae = ["--config.data.repa_source=semvae", f"--config.data.semantic_vae={semantic}"]
    online = [
        "--config.data.repa_source=online",
        f"--config.data.visual_encoder={visual}",
        f"--config.data.images.path={tmp_path / 'images'}",
    ]

    def answer(store, *flags):
        status = train(tmp_path / "run", store, "--check", *flags)
        captured = capsys.readouterr()
        return captured.err if status else captured.out

    assert "made with other weights of 'semantic_vae'" in answer(other, *semvae)
    assert "made with other weights of 'visual'" in answer(other, *online)
    assert "do not say which 'semantic_vae' made them" in answer(unknown, *semvae)
    assert "no faults found" in answer(own, *semvae)
    principal = make_store(tmp_path / "pca", weights={"visual": made_visual, "pca": "5" * 64})
    assert "made by visual, pca, not by a 'semantic_vae'" in answer(principal, *semvae)
    narrow = [semvae[0], f"--config.data.semantic_vae={narrow}"]
    assert "model.repa_features=24, but data.semantic_vae makes features of 20" in answer(other, *narrow)
    assert "tile_grid=3 does not divide a grid of 4 latents: 4 or a divisor" in answer(
        unknown, *semvae, "--config.data.tile_grid=3"
    )
    assert "no faults found" in answer(own, *semvae, "--config.data.tile_grid=2")
    for source in (semvae, online):
        assert "extracted in tiles of 2 x 2 latent pixels, but data.tile_grid=4: leave it out" in answer(
            own, *source, "--config.data.tile_grid=4"
        )
    assert "with model.patch_size=2 a token stands for 4 of them" in answer(own, "--config.model.patch_size=2")
    assert "images of 32 px, but data.images.image_size=64" in answer(
        own, *online, "--config.data.images.image_size=64"
    )
    assert "images of 30 px do not divide by 4, the latents a side (model.input_size): use 28 or 32" in answer(
        unknown, *online, "--config.data.images.image_size=30"
    )
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / "more.png")
    assert "made from 20 images, but there are 21: set data.images to" in answer(own, *online)


def test_all_faults_are_named_at_once_with_the_flags_that_fix_them(tmp_path, capsys):
    """Latents extracted without `--repa` and flips and with other channels, as a new user may have them."""
    folder = tmp_path / "plain"
    fields = latent_fields((4, 4, 6), (4, 4, 3), dtype="float32", flips=False)
    writer = LatentStoreWriter(folder, Plan(8, 8, fields, {}, {}, [str(i) for i in range(10)]))
    with writer.open_shard(0) as records:
        for index in range(8):
            arrays = {
                name: np.random.default_rng(index).standard_normal(field["shape"]) for name, field in fields.items()
            }
            records.add({**arrays, "label": 1, "index": index})
    writer.finish()
    wrong = [
        "--config.optimizer.learning_rate=nan",
        "--config.loss.time=none",
        "--config.train.accumulation=3",
        "--config.model.input_size=8",
        "--config.clocks.name=none",
        "--config.optimizer.schedule=none",
    ]
    for check in ([], ["--check"]):
        assert train(tmp_path / "run", folder, *wrong, *check) == 2
        error = capsys.readouterr().err
        assert error.startswith("sfd train: 9 faults:\n")
        for words in (
            "optimizer.learning_rate=nan: give",
            "unknown loss.time 'none'",
            "no clocks 'none'",
            "unknown optimizer.schedule 'none'",
            "train.accumulation=3",
            "--config.latents.texture_channels=6 --config.latents.semantic_channels=3",
            "--config.data.flips=False",
            "`sfd extract --repa`",
            "--config.model.repa_features=0 --config.loss.repa_weight=0",
            "--config.model.input_size=4",
        ):
            assert words in error
    assert not (tmp_path / "run").exists()
    flags = (
        "--config.latents.texture_channels=6",
        "--config.latents.semantic_channels=3",
        "--config.data.flips=False",
        "--config.model.repa_features=0",
        "--config.loss.repa_weight=0",
        "--check",
    )
    capsys.readouterr()
    assert train(tmp_path / "run", folder, *flags) == 0  # the flags fix it
    assert "projector untrained" not in capsys.readouterr().out
    assert train(tmp_path / "run", folder, *flags[:3], *flags[4:]) == 0
    assert "note: loss.repa_weight=0 leaves REPA's projector untrained" in capsys.readouterr().out


@pytest.mark.parametrize(
    "module, flags, words",
    [
        (
            "train_semvae",
            ["--config.model.hidden_dim=7", "--config.loss.mse_weight=nan"],
            ("3 faults", "hidden_dim 7", "loss.mse_weight=nan", "give features"),
        ),
        (
            "train_texture_vae",
            ["--config.model.norm_groups=7", "--config.data.workers=-1", "--config.lpips=s3://x"],
            ("4 faults", "norm_groups 7", "data.workers=-1", "'s3:' cannot be read", "give the images"),
        ),
        (
            "train_semvae",
            ["--config.loss.mse_weight=0", "--config.loss.cosine_weight=0"],
            ("nothing trains the reconstruction",),
        ),
        (
            "train_texture_vae",
            ["--config=configs/texture_vae.py:tiny", "--config.loss.l1_weight=0", "--config.loss.mse_weight=0"],
            ("nothing trains the reconstruction",),
        ),
        (
            "train_texture_vae",
            ["--config=configs/texture_vae.py:tiny", "--config.data.held_out_split=train"],
            ("the held-out data are training data",),
        ),
        (
            "train_texture_vae",
            ["--config=configs/texture_vae.py:tiny", "--config.lpips=x", "--config.loss.perceptual_weight=0"],
            ("lpips has no effect with loss.perceptual_weight=0",),
        ),
    ],
)
def test_the_other_training_commands_check_too(module, flags, words, tmp_path, capsys):
    import importlib

    main = importlib.import_module(f"sfd_jax.cli.{module}").main
    assert run_command(main, module, [f"--workdir={tmp_path / 'run'}", "--check", *flags]) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error
    assert not (tmp_path / "run").exists()


def test_check_of_a_texture_vae_and_a_semantic_vae(latents, tmp_path, capsys):
    from sfd_jax.cli import train_semvae, train_texture_vae

    run = f"--workdir={tmp_path / 'run'}"
    assert (
        run_command(
            train_texture_vae.main, "train_texture_vae", ["--config=configs/texture_vae.py:tiny", run, "--check"]
        )
        == 0
    )
    flags = ["--config=configs/semantic_vae.py:tiny", run, f"--config.data.path={latents}", "--check"]
    assert run_command(train_semvae.main, "train_semvae", flags) == 0
    assert capsys.readouterr().out.count("no faults found") == 2 and not (tmp_path / "run").exists()
    assert run_command(train_semvae.main, "train_semvae", [*flags, "--config.model.input_dim=20"]) == 2
    assert "--config.model.input_dim=24" in capsys.readouterr().err


@pytest.mark.slow
def test_the_label_of_every_record_is_checked_before_training(latents, tmp_path, capsys):
    """Only the last record's label is too large, and the first batch does not contain it."""
    store = tmp_path / "latents"
    fields = latent_fields((4, 4, 8), (4, 4, 4), dtype="float32", flips=True, repa_shape=(16, 24))
    writer = LatentStoreWriter(store, Plan(20, 20, fields, {}, {}, None))
    with writer.open_shard(0) as records:
        for index in range(20):
            arrays = {
                name: np.random.default_rng(index).standard_normal(field["shape"]) for name, field in fields.items()
            }
            records.add({**arrays, "label": 10 if index == 19 else index % 10, "index": index})
    writer.finish()
    run = tmp_path / "run"
    words = f"{store}: labels outside 0..9: [10] (1 labels, 1 images)"
    for flags in ((), ("--check",)):
        assert train(run, store, *flags) == 2 and words in capsys.readouterr().err
    semvae = [f"--config.data.path={store}", "--config.loss.classification_weight=1.0", "--config.loss.num_classes=10"]
    assert (
        run_command(
            train_semvae, "train_semvae", ["--config=configs/semantic_vae.py:tiny", f"--workdir={run}", *semvae]
        )
        == 2
    )
    assert words in capsys.readouterr().err and not run.exists()


@pytest.mark.slow
def test_train_semvae_from_stored_features(latents, tmp_path, capsys):
    from sfd_jax.cli.train_semvae import main

    others = make_store(tmp_path / "held_out", seed=1)
    flags = ["--config=configs/semantic_vae.py:tiny", f"--workdir={tmp_path}", f"--config.data.path={latents}"]
    stores = [make_store(tmp_path / name, seed, weights={"visual": name * 8}) for seed, name in enumerate("ab")]
    paths = [f"--config.data.path={stores[0]}", f"--config.data.held_out_path={stores[1]}"]
    assert run_command(main, "train_semvae", [*flags[:2], *paths]) == 2
    assert "the held-out features are of another encoder" in capsys.readouterr().err
    assert run_command(main, "train_semvae", [*flags, f"--config.data.held_out_path={latents}"]) == 2
    assert "the held-out data are training data" in capsys.readouterr().err
    assert run_command(main, "train_semvae", [*flags, f"--config.data.held_out_path={others}"]) == 0
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
    assert run_command(convert, "convert", [str(tmp_path / "lpips.safetensors"), f"--out={tmp_path / 'lpips'}"]) == 0

    run = tmp_path / "run"
    flags = ["--config=configs/texture_vae.py:tiny", f"--workdir={run}", f"--config.lpips={tmp_path / 'lpips'}"]
    flags += ["--config.model.ch_mult=(1,1)"]  # quicker to compile
    assert run_command(main, "train_texture_vae", flags) == 0
    last = read_metrics(run)[-1]
    assert {"l1", "kl", "held_out_psnr"} <= last.keys() and 0 < last["held_out_psnr"] < 60
    parts = last["l1"] + last["mse"] + 1e-5 * last["kl"] + last["perceptual"]
    assert last["perceptual"] > 0
    np.testing.assert_allclose(last["loss"], parts, rtol=1e-4)  # means of float32 over the steps logged
    assert load_params(run)[1]["class_names"] == [str(digit) for digit in range(10)]


@pytest.mark.parametrize(
    "config, name", [("semantic_vae", "semantic_vae"), ("texture_vae", "texture_vae"), ("visual_encoder", "dinov2")]
)
def test_full_recipes_resolve(config, name):
    config = load_config(f"configs/{config}.py")
    assert Network(name, config.model.to_dict()).num_params() > 1e7
    assert train_config(config).steps >= 50_000
