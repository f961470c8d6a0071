"""The commands `sample` and `evaluate` from checkpoints on disk to files, with a small network for Inception."""

import dataclasses
import json
import os
import re

import jax
import numpy as np
import pytest

from sfd_jax.cli import evaluate as evaluate_command
from sfd_jax.cli import sample as sample_command
from sfd_jax.cli.main import run_command
from sfd_jax.diffusion.sample_config import SampleConfig
from sfd_jax.distributed import make_mesh
from sfd_jax.distributed.lock import FolderLock
from sfd_jax.evaluation import Extractor
from sfd_jax.experiment import evaluation
from sfd_jax.experiment.sampling import open_texture_vae
from sfd_jax.latents import LatentStatistics
from sfd_jax.models import Network
from sfd_jax.models.fingerprint import params_hash
from sfd_jax.settings import to_dict
from sfd_jax.training import Checkpointer, OptimizerConfig, load_params, make_optimizer, save_params
from sfd_jax.training.state import state_from_params

DIT = dict(width=8, depth=1, num_heads=2, input_size=4, in_channels=5, num_classes=5)
VAE = dict(ch=4, ch_mult=(1, 2), num_res_blocks=1, z_channels=3, norm_groups=2, attention_levels=())


def save_random(folder, name, config, seed, /, **metadata):
    network = Network(name, config)
    leaves, tree = jax.tree.flatten(network.abstract_params())
    generator = np.random.default_rng(seed)
    leaves = [
        (generator.standard_normal(x.shape) / np.sqrt(max(1, np.prod(x.shape[:-1])))).astype(np.float32) for x in leaves
    ]
    metadata = {"network": name, "network_config": network.config_dict(), "source": "drawn"} | metadata
    save_params(folder, jax.tree.unflatten(tree, leaves), metadata)
    return str(folder)


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """Flags of a job of 21 images from a drawn model, and the folders they name."""
    folder = tmp_path_factory.mktemp("checkpoints")
    statistics = LatentStatistics(np.zeros(3), np.ones(3), np.zeros(2), np.ones(2)).to_dict()
    names = ["zero", "one", "two", "three", "five"]
    model = save_random(folder / "model", "lightning_dit", DIT, 0, latent_statistics=statistics, class_names=names)
    bare = save_random(folder / "bare", "lightning_dit", DIT, 0)
    vae = save_random(folder / "vae", "texture_vae", VAE, 1)
    common = [f"--texture_vae={vae}", "--num=21", "--solver=euler", "--num_steps=4", "--batch_size=1"]
    return {"model": [f"--checkpoint={model}", *common], "bare": [f"--checkpoint={bare}", *common]}


@pytest.fixture
def stand_in(monkeypatch):
    """A random projection instead of Inception."""
    weights = np.random.default_rng(2).standard_normal((8 * 8 * 3, 4)).astype(np.float32) / 100

    def apply(params, images):
        features = images.reshape(len(images), -1) @ params["w"]
        return {"features": features, "spatial": features[:, :2], "probabilities": jax.nn.softmax(features, axis=-1)}

    extractor = Extractor("inception", {"w": weights}, apply)
    monkeypatch.setattr(evaluation, "open_extractor", lambda name, directory: extractor)


def reference(tmp_path):
    images = np.random.default_rng(3).integers(0, 256, (30, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "reference.npz", arr_0=images)
    return f"--reference={tmp_path / 'reference.npz'}"


@pytest.mark.slow
def test_from_checkpoint_to_scores(flags, stand_in, tmp_path, capsys):
    out = tmp_path / "samples"
    sample = [*flags["model"], f"--out={out}", "--png", "--chunk_size=8"]
    assert run_command(sample_command.main, "sample", sample) == 0
    with np.load(out / "samples.npz") as file:
        images, labels = file["arr_0"], file["arr_1"]
    assert images.shape == (21, 8, 8, 3) and images.dtype == np.uint8
    assert sorted(np.bincount(labels)) == [4, 4, 4, 4, 5]
    assert len(list((out / "images").glob("*.png"))) == 21 and (out / "grid.png").stat().st_size > 0
    recipe = json.loads((out / "recipe.json").read_text())
    assert recipe["sampler"]["solver"] == "euler" and recipe["nfe"]["mean"] == 3.0
    assert recipe["model"]["source"] == "drawn" and recipe["labels"]["mode"] == "balanced"

    # The scores are the same for every form of the samples, also without files.
    common = [reference(tmp_path), "--inception=stand-in", "--metrics=fid,sfid,is,precision,recall,kid"]
    reports = {}
    for name, samples in {
        "npz": [f"--samples={out / 'samples.npz'}"],
        "chunks": [f"--samples={out}"],
        "png": [f"--samples={out / 'images'}"],
        "live": ["--live", *flags["model"]],
    }.items():
        file = tmp_path / f"{name}.json"
        assert run_command(evaluate_command.main, "evaluate", [*samples, *common, f"--out={file}"]) == 0
        reports[name] = json.loads(file.read_text())
        assert reports[name]["scores"] == reports["npz"]["scores"]
        sampling = reports[name]["recipe"]["sampling"]
        assert {key: sampling[key] for key in ("seed", "model", "labels", "nfe")} == {
            key: recipe[key] for key in ("seed", "model", "labels", "nfe")
        }
        assert reports[name]["recipe"]["num_images"] == 21
    assert "precision" in capsys.readouterr().out

    # Nothing is overwritten, and a folder holds one recipe.
    again = [f"--samples={out}", *common, f"--out={tmp_path / 'npz.json'}"]
    assert run_command(evaluate_command.main, "evaluate", again) == 2
    assert run_command(sample_command.main, "sample", [*sample, "--seed=1"]) == 2
    assert "npz.json exists already" in (err := capsys.readouterr().err) and "seed: there 0, here 1" in err


def test_a_folder_in_use_is_refused(flags, tmp_path, capsys):
    with FolderLock(tmp_path):
        assert run_command(sample_command.main, "sample", [*flags["model"], f"--out={tmp_path}"]) == 2
    assert "is in use by process" in capsys.readouterr().err and os.listdir(tmp_path) == [".lock"]


def test_saved_statistics_serve_as_reference(stand_in, tmp_path):
    given = [reference(tmp_path), "--inception=stand-in"]
    statistics = tmp_path / "statistics.npz"
    assert run_command(evaluate_command.main, "evaluate", [*given, f"--save_statistics={statistics}"]) == 0
    samples = f"--samples={tmp_path / 'reference.npz'}"
    for number, source in enumerate((given[0], f"--reference={statistics}")):
        out = f"--out={tmp_path / f'{number}.json'}"
        assert run_command(evaluate_command.main, "evaluate", [samples, source, given[1], out]) == 0
    first, second = (json.loads((tmp_path / f"{number}.json").read_text())["scores"] for number in range(2))
    assert first == second and first["precision"] == 1.0


@pytest.mark.parametrize(
    ("command", "arguments", "words"),
    [
        ("sample", ["bare"], "has no latent statistics"),
        ("sample", ["model", "--labels=fife"], "no class is called 'fife'; did you mean 'five'"),
        ("sample", ["model", "--num=0"], "--num=0: give an integer from 1"),
        ("sample", ["model", "--guidance=autoguidance"], "needs a weaker model: add --weak=CKPT"),
        ("sample", ["model", "--guidance_scale=1.5"], "--guidance_scale=1.5 has no effect without --guidance=cfg"),
        ("sample", ["model", "--guidance=cfg"], "guidance 'cfg' with guidance_scale=1 is no guidance"),
        ("sample", ["model", "--guidance=cfg", "--weak=w"], "--weak=w has no effect without --guidance=autoguidance"),
        ("sample", ["model", "--rtol=1e-3"], "--rtol=0.001 has no effect without --solver=dopri5"),
        ("sample", ["model", "--nfe=9"], "--num_steps=4 has no effect beside --nfe"),
        ("sample", ["model", "--weak_step=1"], "--weak_step=1 has no effect without --weak"),
        ("sample", ["model", "--step=7"], "is one checkpoint, so step 7 cannot be chosen|no checkpoint of step 7"),
        ("sample", ["model", "--chunk_size=-1"], "--chunk_size=-1: give an integer from 1"),
        ("sample", ["model", "--seed=4294967296"], "--seed=4294967296: give an integer from 0 to 4,294,967,295"),
        ("sample", ["model", "--timestep_shift=nan"], "--timestep_shift=nan: give a number"),
        (
            "evaluate",
            ["--samples={tmp}/reference.npz", "--guidance_scale=2"],
            "--guidance_scale=2.0 has no effect without --live",
        ),
        (
            "evaluate",
            ["--samples={tmp}/reference.npz", "--seed=2"],
            "--seed=2 has no effect without --live or --reconstruction",
        ),
        (
            "evaluate",
            ["--samples={tmp}/reference.npz", "--lpips=l"],
            "--lpips=l has no effect without --reconstruction",
        ),
        ("evaluate", ["--samples={tmp}/reference.npz", "--image_size=8"], "--image_size=8 has no effect"),
        ("evaluate", ["--samples={tmp}/reference.npz", "--metrics= ,"], "--metrics is empty"),
        (
            "evaluate",
            ["--live", "--nfe=3"],
            "2 faults:\n.*needs --checkpoint and --texture_vae\n.*--nfe=3 has no effect",
        ),
        ("sample", ["model", "--solvr=euler"], "did you mean '--solver'"),
        ("evaluate", ["--samples={tmp}/reference.npz", "--num=31"], "holds 30 images, but --num=31"),
        ("evaluate", ["--samples={tmp}/nowhere.npz"], "no images at"),
        ("evaluate", ["--samples={tmp}/reference.npz", "--metrics=fid,isc"], "unknown metric 'isc'"),
        ("evaluate", [], "nothing to evaluate"),
    ],
)
def test_bad_input_is_a_sentence_and_status_two(flags, stand_in, tmp_path, capsys, command, arguments, words):
    given = [reference(tmp_path), "--inception=stand-in", f"--out={tmp_path / 'out.json'}"]
    if command == "sample":
        given, arguments = [f"--out={tmp_path / 'out'}"], [*flags[arguments[0]], *arguments[1:]]
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    main = {"sample": sample_command, "evaluate": evaluate_command}[command].main
    assert run_command(main, command, [*given, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"sfd {command}: ") and "Traceback" not in error
    assert re.search(words, error), error
    assert not (tmp_path / "out.json").exists() and not list(tmp_path.glob("out/chunks/*.npz"))


def test_another_texture_vae_is_refused_or_noted(flags, stand_in, tmp_path, capsys):
    model, vae = (flags["model"][i].split("=", 1)[1] for i in (0, 1))
    params, metadata = load_params(model)
    (mine, _), other = load_params(vae), save_random(tmp_path / "other", "texture_vae", VAE, 7)
    metadata = {
        **metadata,
        "latents": {"weights": {"texture_vae": params_hash(mine)}, "image_size": 8, "labels": [0, 1, 4]},
        # dopri5's and AutoGuidance's settings have no effect here; -1 and 0 are old values for "not given".
        "config": {
            "sample": dict(
                solver="euler", num_steps=4, calls=0, rtol=0.1, num=21, batch_size=64, guidance="autoguidance"
            )
            | dict(guidance_scale=1.5, guidance_scale_semantic=-1.0)
        },
    }
    save_params(tmp_path / "model", params, metadata)
    sample = [f"--checkpoint={tmp_path / 'model'}", "--batch_size=1", f"--out={tmp_path / 'out'}"]
    assert run_command(sample_command.main, "sample", [*sample, f"--texture_vae={other}"]) == 2
    assert f"--texture_vae={other}" in (error := capsys.readouterr().err) and "--other_texture_vae" in error
    assert not (tmp_path / "out" / "samples.npz").exists()
    assert run_command(sample_command.main, "sample", [*sample, f"--texture_vae={other}", "--other_texture_vae"]) == 0
    lines = capsys.readouterr().out.splitlines()
    printed = [line.removeprefix("note: ") for line in lines if line.startswith("note: ")]
    recipe = json.loads((tmp_path / "out" / "recipe.json").read_text())
    assert len(printed) == 3 and printed == recipe["notes"]
    assert "no weaker model was given (--weak=CKPT): these samples are without guidance" in printed[0]
    assert "as --other_texture_vae allows" in printed[1] and "5 classes, of which 3 were trained" in printed[2]

    # The checkpoint's settings were used and printed; a flag overrides one.
    used = "solver=euler mode=staged num_steps=4 guidance=none num=21 labels=balanced batch_size=1"
    assert f"sampling with {used}" in lines and recipe["num_images"] == 21
    assert recipe["sampler"] == to_dict(SampleConfig(solver="euler", num_steps=4))

    # The notes are reported with the scores, of finished and of live samples.
    given = [reference(tmp_path), "--inception=stand-in", "--metrics=fid"]
    live = ["--live", *sample[:-1], f"--texture_vae={other}", "--other_texture_vae"]
    for number, samples in enumerate(([f"--samples={tmp_path / 'out'}"], live)):
        out = tmp_path / f"{number}.json"
        assert run_command(evaluate_command.main, "evaluate", [*samples, *given, f"--out={out}"]) == 0
        *notes, of_few = json.loads(out.read_text())["notes"]
        assert notes == recipe["notes"] and "scores of 21 images are biased" in of_few
        assert capsys.readouterr().out.count("note: ") == 4


@pytest.mark.slow
def test_raw_weights_are_decoded_by_the_vae_that_made_the_latents(flags, tmp_path):
    model, vae = (load_params(flags["model"][i].split("=", 1)[1]) for i in (0, 1))
    state = state_from_params(vae[0], make_optimizer(OptimizerConfig(), 1), make_mesh())
    state = dataclasses.replace(state, ema_params=jax.tree.map(lambda leaf: leaf + 1, state.params))
    checkpointer = Checkpointer(tmp_path / "vae")
    checkpointer.save(1, state, vae[1])
    checkpointer.close()
    made_by = {which: params_hash(load_params(tmp_path / "vae", which=which)[0]) for which in ("ema", "raw")}
    assert made_by["ema"] != made_by["raw"]
    for which, asked in (("ema", "raw"), ("raw", "ema")):
        made = {"latents": {"weights": {"texture_vae": made_by[which]}}}
        params, metadata = open_texture_vae(str(tmp_path / "vae"), made, asked)
        assert metadata["which"] == which and params_hash(params) == made_by[which]
    unknown = open_texture_vae(str(tmp_path / "vae"), model[1], "ema")
    assert unknown[1]["which"] == "ema"  # the requested weights


@pytest.mark.parametrize(
    ("command", "flag", "holds"),
    [
        ("sample", "--checkpoint", "texture_vae"),
        ("sample", "--texture_vae", "lightning_dit"),
        ("sample", "--weak", "texture_vae"),
        ("evaluate", "--inception", "texture_vae"),
        ("evaluate", "--dinov2", "texture_vae"),
        ("evaluate", "--lpips", "texture_vae"),
    ],
)
def test_a_checkpoint_of_another_network_is_named(flags, tmp_path, capsys, monkeypatch, command, flag, holds):
    model, vae = (flags["model"][i].split("=", 1)[1] for i in (0, 1))
    wrong = f"{flag}={model if holds == 'lightning_dit' else vae}"
    given = [
        *flags["model"],
        f"--out={tmp_path / 'out'}",
        wrong,
        *(["--guidance_scale=1.5"] if flag == "--weak" else []),
    ]
    if command == "evaluate":
        images = np.random.default_rng(3).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
        np.savez(tmp_path / "reference.npz", arr_0=images)
        given = [f"--reference={tmp_path / 'reference.npz'}", f"--samples={tmp_path / 'reference.npz'}", wrong]
    if flag == "--lpips":
        extractor = Extractor("inception", {}, lambda params, images: {"features": images.reshape(len(images), -1)})
        monkeypatch.setattr(evaluation, "open_extractor", lambda name, directory: extractor)
        given = ["--reconstruction", "--inception=stand-in", f"--texture_vae={vae}", given[0], wrong]
    assert run_command({"sample": sample_command, "evaluate": evaluate_command}[command].main, command, given) == 2
    error, wanted = capsys.readouterr().err, {"--checkpoint": "lightning_dit", "--weak": "lightning_dit"}
    assert f"{wrong} holds '{holds}', expected '{wanted.get(flag, flag[2:])}'" in error, error
