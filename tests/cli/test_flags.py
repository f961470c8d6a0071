"""Flags of the commands: overrides, and messages that name the nearest valid name."""

import argparse
import dataclasses
import os
import subprocess
import sys

import pytest

from sfd_jax.cli.flags import command_parser, parse_command
from sfd_jax.cli.main import COMMANDS, SMALLER, main, run_command
from sfd_jax.diffusion.clocks import CLOCKS, Clocks, make_clocks
from sfd_jax.diffusion.losses import TERMS, LossTerm
from sfd_jax.errors import SfdError
from sfd_jax.experiment.config_files import load_config
from sfd_jax.ranges import Range
from sfd_jax.settings import setting

CONFIG = "configs/sfd.py:xl,tiny"


def parse(*argv):
    parser = command_parser("train", "a command")
    parser.add_argument("--workdir")
    return parse_command(parser, list(argv), CONFIG)


def test_overrides_apply_and_keep_types():
    args = parse("--config.train.steps=9", "--config.optimizer.learning_rate=1e-3", "--workdir=w")
    assert args.config.train.steps == 9
    assert args.config.optimizer.learning_rate == 1e-3
    assert args.workdir == "w"
    assert args.config_name == CONFIG


@pytest.mark.parametrize(
    "flag, says",
    [
        ("--config.train.stesp=9", "did you mean 'steps'?"),
        ("--config.trian.steps=9", "did you mean 'train'?"),
        ("--config.train.steps=many", "takes an integer"),
        ("--config.optimizer.learning_rate=fast", "takes a number"),
        ("--config.train.steps.now=9", "is a value, not a group"),
        ("--config.train=9", "is a group"),
        ("--config.model.use_rope=perhaps", "use_rope"),
        ("--config.train.steps", "needs an equals sign"),
        ("--workdri=w", "did you mean '--workdir'?"),
        ("--config=configs/sfd.py:xxl", "unknown size 'xxl'"),
        ("--config=configs/none.py", "no config file"),
    ],
)
def test_each_mistake_is_named(flag, says):
    with pytest.raises(SfdError) as error:
        parse(flag)
    assert says in str(error.value)


def test_an_unknown_flag_is_named_before_a_missing_one(capsys):
    for given in ("--wrokdir=w", "--config.seed=1 --wrokdir w"):
        assert main(["train", *given.split()]) == 2
        assert "unknown argument '--wrokdir" in (said := capsys.readouterr().err) and "mean '--workdir'?" in said
    assert main(["train", "--config.seed=1"]) == 2
    assert "required: --workdir" in capsys.readouterr().err


@dataclasses.dataclass(frozen=True)
class Odd(Clocks):
    """Its fields have the names of settings of other groups."""

    depth: float = 0.5
    nfe: float = 0.5
    path: str = " a"
    tau_end = 1.0
    breakpoints = ()

    def times(self, tau):
        return tau, tau


@dataclasses.dataclass(frozen=True)
class Sample(LossTerm):
    num_steps: float = setting(0.5, "of the term", range=Range(float, 0, 1))

    def __call__(self, at):
        return at.t_semantic


def test_fields_of_parts_may_have_names_of_other_settings(monkeypatch):
    monkeypatch.setitem(CLOCKS, "odd", Odd)
    monkeypatch.setitem(TERMS, "sample", Sample)
    flags = ("--config.clocks.name=odd", "--config.loss.terms.sample.weight=1")
    odd = ("--config.clocks.depth=0.25", "--config.clocks.nfe=0.25", "--config.loss.terms.sample.num_steps=0.25")
    config = parse(*flags, *odd).config
    assert make_clocks(config.clocks) == Odd(0.25, 0.25)
    assert config.loss.terms.sample.num_steps == 0.25 and config.sample.num_steps > 2
    for flag, says in (
        ("--config.loss.terms.sample.num_steps=2", "loss.terms.sample.num_steps=2.0: give a number from 0 to 1"),
        ("--config.sample.num_steps=1", "sample.num_steps=1: give an integer from 2"),
        ("--config.clocks.nfe=None", "'clocks.nfe' takes a number"),
        ("--config.loss.terms.sample=0.5", "'loss.terms.sample' is a group"),
    ):
        with pytest.raises(SfdError) as error:
            parse(*flags, "--config.sample.solver=euler", flag)
        assert says in str(error.value)


def test_config_is_locked():
    with pytest.raises((AttributeError, KeyError)):
        load_config(CONFIG).train.stepz = 3


def test_unknown_command(capsys):
    assert main(["trian"]) == 2
    assert "did you mean 'train'?" in capsys.readouterr().err


def test_overview_names_every_command(capsys):
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {command} " in printed for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"usage: sfd {command}" in capsys.readouterr().out


def test_dashes_and_underscores_are_equivalent():
    parser = command_parser("train", "a command")
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--flips", action=argparse.BooleanOptionalAction, default=True)
    for batch, flips in ("--batch-size=3", "--no-flips"), ("--batch_size=3", "--no_flips"):
        args = parse_command(parser, [batch, flips])
        assert args.batch_size == 3 and args.flips is False


def test_a_closed_standard_output_is_no_error(root):
    reading, writing = os.pipe()
    os.close(reading)  # as `| head` does
    done = subprocess.run(
        [sys.executable, "-m", "sfd_jax", "fetch", "--list"],
        cwd=root,
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writing)
    assert done.returncode == 0 and done.stderr == ""


@pytest.mark.parametrize("command", SMALLER)
def test_out_of_memory_gives_advice(capfd, command):
    def greedy(arguments):
        import jax.numpy as jnp

        jnp.zeros(2**50).block_until_ready()  # no machine has 4 PiB

    assert run_command(greedy, command, []) == 2
    error = capfd.readouterr().err
    assert f"sfd {command}: a device is out of memory: " in error and SMALLER[command] in error
    assert "RESOURCE_EXHAUSTED" in error and "Traceback" not in error
    if command == "train":  # the hint's flags exist
        assert (
            parse(
                *(word.rstrip(",") for word in SMALLER[command].split() if word.startswith("--"))
            ).config.train.accumulation
            == 2
        )


def test_none_is_a_value_of_optional_settings():
    assert parse("--config.sample.guidance_scale_semantic=None").config.sample.guidance_scale_semantic is None
    assert parse("--config.model.scan_blocks=None").config.model.scan_blocks is None
    assert parse("--config.clocks.delta_t=0").config.clocks.delta_t == 0  # one clock
    args = parse("--config.clocks.delta_t=0.2", "--config.clocks.name=sequential", "--config.clocks.name=fixed_offset")
    assert args.config.clocks.to_dict() == {"name": "fixed_offset", "delta_t": 0.2}
    assert parse("--config.data.semantic_vae=None").config.data.semantic_vae == ""
    digits = load_config("configs/digits.py", ["--config.diffusion.model.scan_blocks=None"])
    assert digits.diffusion.model.scan_blocks is None
    with pytest.raises(SfdError, match="'train.steps' takes an integer"):
        parse("--config.train.steps=None")
    for given in (["--workdir=None"], ["--workdir", "None"]):
        args = parse(*given)
        assert args.workdir is None and "workdir" not in args.given
    assert parse("--workdir=w").given == ["workdir"]


def test_all_faults_are_named_at_once():
    with pytest.raises(SfdError) as error:
        parse("--config.train.stesp=9", "--config.optimizer.b2=nan", "--config.data.path=hdfs://x", "--config.seed=-1")
    assert "4 faults" in str(error.value)
    assert all(name in str(error.value) for name in ("stesp", "optimizer.b2=nan", "hdfs:", "seed=-1"))


@pytest.mark.parametrize(
    "flag, says",
    [
        ("--config.sample.nfe=9", "--config.sample.nfe=9 has no effect beside --config.sample.solver=dopri5"),
        ("--config.sample.solver=eulr", "unknown sample.solver 'eulr': did you mean 'euler'"),
        ("--config.data.visual_encoder=x", "has no effect without --config.data.repa_source=online"),
        (
            "--config.data.images.image_size=64",
            "images.image_size=64 has no effect without --config.data.repa_source=online",
        ),
        ("--config.loss.repa_weight=0 --config.data.repa_source=semvae", "no effect without --config.loss.repa_weight"),
        (
            "--config.loss.repa_weight=0 --config.loss.repa_spatial_norm=0.6",
            "no effect without --config.loss.repa_weight",
        ),
        ("--config.loss.repa_spatial_norm=1.5", "repa_spatial_norm=1.5: give a number from 0 to 1"),
        (
            "--config.model.repa_features=0 --config.model.repa_projector=conv",
            "repa_projector=conv has no effect without",
        ),
        ("--config.model.repa_projector=conv --config.model.repa_width=9", "without --config.model.repa_projector=mlp"),
        ("--config.optimizer.learning_rate=0", "learning_rate=0.0: give a number above 0"),
        ("--config.loss.label_dropout=1", "label_dropout=1.0: give a number from 0 to below 1"),
        ("--config.data.path=gs:/bucket/x", "a bucket is written gs://BUCKET/FOLDER"),
        (
            "--config.clocks.name=sequential --config.clocks.delta_t=0.5",
            "'clocks.delta_t': clocks has no 'delta_t'",
        ),
        ("--config.data.path=gs://bucket/x", "only --workdir and checkpoints may lie in a bucket"),
        ("--config.mesh.fsdp=0", "mesh.fsdp=0: give an integer from 1 to 1,048,576, or -1"),
        ("--config.train.steps=1e3", "takes an integer"),
        ("--config=configs/digits.py", "is for `sfd demo`; use one like --config=configs/sfd.py:xl"),
        ("--config=configs/semantic_vae.py", "is for `sfd train_semvae`"),
        ("--config=configs/texture_vae.py", "is for `sfd train_texture_vae`"),
    ],
)
def test_values_without_effect_or_sense_are_refused(flag, says):
    with pytest.raises(SfdError) as error:
        parse(*flag.split())
    assert says in str(error.value)


def test_settings_of_a_semantic_vae_without_effect_are_named():
    for flags in (["model.arch=linear", "model.hidden_dim=9"], ["model.variational=False", "loss.kl_weight=1.0"]):
        with pytest.raises(SfdError, match=f"{flags[1]} has no effect"):
            load_config("configs/semantic_vae.py", [f"--config.{flag}" for flag in flags])


def test_a_config_of_unknown_kind_is_refused(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("import ml_collections\ndef get_config():\n  return ml_collections.ConfigDict(dict(latents={}))\n")
    with pytest.raises(SfdError, match="lacks clocks: use one like configs/sfd.py:xl"):
        parse(f"--config={file}")


def test_scales_of_old_configs_are_read(tmp_path):
    file = tmp_path / "old.py"
    file.write_text(
        "import ml_collections\ndef get_config():\n"
        "  return ml_collections.ConfigDict(dict(sample=dict(guidance_scale_semantic=-1.0, nfe=0)))\n"
    )
    assert load_config(str(file)).sample.to_dict() == {"guidance_scale_semantic": None, "nfe": None}
    with pytest.raises(SfdError, match="guidance_scale_semantic=-1.0"):
        load_config(str(file), ["--config.sample.guidance_scale_semantic=-1.0"])


@pytest.mark.parametrize(
    "command, flags, says",
    [
        ("extract", ["--out=o", "--repack=r", "--texture_vae=v"], "--texture_vae=v has no effect beside --repack"),
        (
            "extract",
            ["--out=o", "--images=folder", "--texture_vae=v", "--statistics=measured"],
            "has no effect without --repack",
        ),
        (
            "extract",
            ["--out=o", "--images=digits", "--texture_vae=v", "--path=x"],
            "--path=x has no effect beside --images=digits",
        ),
        (
            "extract",
            ["--out=o", "--images=digits", "--texture_vae=v", "--expect_count=3"],
            "has no effect without --check",
        ),
        (
            "extract",
            ["--out=o", "--images=digits", "--texture_vae=v", "--workers=-1"],
            "--workers=-1: give an integer from 0",
        ),
        (
            "extract",
            ["--out=gs://b/o", "--images=digits", "--texture_vae=v"],
            "argument --out: path gs://b/o: only --workdir",
        ),
        ("extract", ["--out= o", "--images=digits"], "has blanks or quotes at its ends"),
        ("convert", ["x.pt", "--inspect", "--step=3"], "--step=3 has no effect without --export"),
        ("convert", ["x.pt", "--out=", "--inspect"], "argument --out: an empty path"),
        ("fetch", ["--file=x"], "--file=x has no effect without --name"),
        ("compile_pod", ["--topology=v5e:2x2", "--batch_size=4"], "--batch_size=4 has no effect beside --what=train"),
        ("plan", ["--topology=v5e:2x2", "--utilisation=nan"], "--utilisation=nan: give a number above 0 to 1"),
        ("demo", ["--seed=-1"], "--seed=-1: give an integer from 0 to 4,294,967,295"),
    ],
)
def test_flags_without_effect_or_sense_are_refused(command, flags, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([command, *flags]) == 2
    assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
