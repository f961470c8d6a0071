"""`sfd train_encoder`, and `--init` of the commands that train a single network."""

import importlib
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from sfd_jax.cli.main import run_command
from sfd_jax.experiment import training
from sfd_jax.experiment.checkpoints import open_checkpoint
from sfd_jax.experiment.config_files import load_config
from sfd_jax.models import Network
from sfd_jax.models.fingerprint import params_hash
from sfd_jax.training import save_params
from sfd_jax.training.logging import read_metrics

COMMANDS = {"texture_vae": "train_texture_vae", "dinov2": "train_encoder", "semantic_vae": "train_semvae"}
CONFIGS = {"texture_vae": "texture_vae", "dinov2": "visual_encoder", "semantic_vae": "semantic_vae"}


def run(command, *flags):
    return run_command(importlib.import_module(f"sfd_jax.cli.{command}").main, command, list(flags))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two classes of four images to train on, and of two held out; a third class of held-out images elsewhere."""
    root, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, classes, count in (("train", "ab", 4), ("val", "ab", 2), ("other", "bc", 2), ("one", "a", 4)):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(0, 256, (40, 33, 3), np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{index}.png")
    return root


@pytest.mark.slow
def test_train_encoder_and_who_takes_its_folder(images, tmp_path, capsys):
    small = ["--config=configs/visual_encoder.py:small", f"--config.data.path={images}", "--config.data.image_size=16"]
    small += ["--config.model.width=16", "--config.model.depth=1", "--config.train.global_batch_size=8"]
    flags = [*small, "--config.data.held_out_split=val", "--config.optimizer.warmup_steps=0"]
    folder = tmp_path / "encoder"
    assert run("train_encoder", *flags, f"--workdir={folder}", "--config.train.steps=1") == 0
    assert run("train_encoder", *flags, f"--workdir={folder}", "--config.train.steps=2") == 0  # goes on
    last = read_metrics(folder)[-1]
    assert last["step"] == 2 and {"held_out_accuracy_cls", "held_out_accuracy_patches"} <= last.keys()
    assert last["held_out_accuracy_cls"] in (0.0, 0.25, 0.5, 0.75, 1.0)  # of four images
    network, _, metadata = open_checkpoint(folder)
    assert network.config.image_size == 16 and metadata["class_names"] == ["a", "b"]
    assert metadata["config"]["loss"]["num_classes"] == 2  # the data's, where the config tells none

    semvae = ["--config=configs/semantic_vae.py:small", "--config.model.input_dim=16", "--config.model.hidden_dim=16"]
    semvae += [f"--config.data.visual_encoder={folder}", f"--config.data.images.path={images}"]
    assert run("train_semvae", *semvae, "--config.data.images.image_size=16", f"--workdir={tmp_path}", "--check") == 0
    assert "8 images" in capsys.readouterr().out
    assert run("train_semvae", *semvae, f"--workdir={tmp_path}", "--check") == 2
    assert "images of 16 px and would see 32 px here: --config.data.images.image_size=16" in capsys.readouterr().err

    again = tmp_path / "again"
    assert run("train_encoder", *small, f"--init={folder}", f"--workdir={again}", "--config.train.steps=1") == 0
    assert json.loads((again / "run.json").read_text())["init"] is not None


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], ("give the images",)),
        (["--config.data.path={}", "--config.data.split=one"], ("loss.num_classes=1", "needs two")),
        (["--config.data.path={}", "--config.data.held_out_split=other"], ("have the classes b, c", "a, b")),
        (["--config.data.path={}", "--config.data.image_size=30"], ("image_size 30 does not divide by patch_size 8",)),
        (["--config.data.path={}", "--config.loss.num_classes=2", "--config.data.split=val"], ()),
        (["--config=configs/texture_vae.py:small"], ("is for `sfd train_texture_vae`", "configs/visual_encoder.py")),
    ],
)
def test_check_of_an_encoder(flags, words, images, tmp_path, capsys):
    flags = ["--config=configs/visual_encoder.py:small", *(flag.format(images) for flag in flags)]
    status = run("train_encoder", *flags, f"--workdir={tmp_path / 'run'}", "--check")
    printed = capsys.readouterr()
    assert status == (2 if words else 0) and all(word in printed.err for word in words), printed.err
    assert not (tmp_path / "run").exists()


def drawn(folder: Path, name: str, config: dict, **metadata) -> tuple[str, dict]:
    network, random = Network(name, config), np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: random.standard_normal(leaf.shape).astype(np.float32), network.abstract_params())
    known = {"network": name, "network_config": network.config_dict(), "source": "drawn"}
    save_params(folder, params, {**known, **metadata})
    return str(folder), params


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_init_of_a_single_network(name, tmp_path, capsys):
    argument = f"configs/{CONFIGS[name]}.py:tiny"
    data = [] if name != "semantic_vae" else ["--config.data.images.kind=digits", "--config.data.images.image_size=28"]
    encoder = dict(width=24, depth=1, num_heads=2, image_size=28, patch_size=7, num_registers=0)
    if data:
        visual, _ = drawn(tmp_path / "visual", "dinov2", encoder)
        data += [f"--config.data.visual_encoder={visual}", "--config.data.view_size=28"]
    config = load_config(argument, data)
    folder, params = drawn(tmp_path / "init", name, config.model.to_dict(), latents={"weights": {"visual": "1" * 64}})
    run_of = getattr(training, f"open_{CONFIGS[name]}")(config, init=folder)
    trained = run_of.params["network"] if name == "dinov2" else run_of.params
    jax.tree.map(np.testing.assert_array_equal, trained, params)
    assert run_of.record()["init"] == params_hash(run_of.params)
    assert jax.tree.structure(run_of.params) == jax.tree.structure(jax.eval_shape(run_of.task.init, jax.random.key(0)))
    assert [("of another visual" in note) for note in run_of.notes] == [True] * (name == "semantic_vae")

    flags = [f"--config={argument}", *data, f"--workdir={tmp_path / 'run'}", "--check"]
    wider = {"texture_vae": "ch", "dinov2": "width", "semantic_vae": "hidden_dim"}[name]
    size = 2 * config.model[wider]
    other, _ = drawn(tmp_path / "other", name, {**config.model.to_dict(), wider: size})
    assert run(COMMANDS[name], *flags, f"--init={other}") == 2
    assert (
        f"--init={other} has {wider} {size} (here {size // 2}): set config.model accordingly" in capsys.readouterr().err
    )
    assert run(COMMANDS[name], *flags, f"--init={tmp_path / 'none'}") == 2
    assert "no checkpoint folder" in capsys.readouterr().err
    kind, _ = drawn(tmp_path / "kind", "semantic_vae" if name == "dinov2" else "dinov2", KINDS[name == "dinov2"])
    assert run(COMMANDS[name], *flags, f"--init={kind}") == 2
    assert f"expected '{name}'" in capsys.readouterr().err


KINDS = (dict(width=24, depth=1, num_heads=2), dict(arch="linear", input_dim=24, bottleneck_dim=4))
