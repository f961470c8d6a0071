"""Flags of the doors: overrides apply, and each kind of mistake names the nearest valid thing."""

import argparse
import os
import subprocess
import sys

import pytest

from sfd_jax.cli.flags import door_parser, load_config, parse_door
from sfd_jax.cli.main import DOORS, SMALLER, main, open_door
from sfd_jax.errors import SfdError

CONFIG = "configs/sfd.py:xl,tiny"


def parse(*argv):
    parser = door_parser("train", "a door")
    parser.add_argument("--workdir")
    return parse_door(parser, list(argv), CONFIG)


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


def test_config_is_locked():
    with pytest.raises((AttributeError, KeyError)):
        load_config(CONFIG).train.stepz = 3


def test_unknown_door(capsys):
    assert main(["trian"]) == 2
    assert "did you mean 'train'?" in capsys.readouterr().err


def test_overview_names_every_door(capsys):
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {door} " in printed for door in DOORS)


@pytest.mark.parametrize("door", DOORS)
def test_every_door_explains_itself(door, capsys):
    with pytest.raises(SystemExit) as stop:
        main([door, "--help"])
    assert stop.value.code == 0
    assert f"usage: sfd {door}" in capsys.readouterr().out


def test_dashes_and_underscores_are_one():
    parser = door_parser("train", "a door")
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--flips", action=argparse.BooleanOptionalAction, default=True)
    for batch, flips in ("--batch-size=3", "--no-flips"), ("--batch_size=3", "--no_flips"):
        args = parse_door(parser, [batch, flips])
        assert args.batch_size == 3 and args.flips is False


def test_a_reader_that_has_seen_enough_is_no_fault(root):
    reading, writing = os.pipe()
    os.close(reading)  # as `| head` does once it has its lines
    done = subprocess.run(
        [sys.executable, "-m", "sfd_jax.cli.fetch", "--list"], cwd=root, stdout=writing, stderr=subprocess.PIPE, text=True
    )
    os.close(writing)
    assert done.returncode == 0 and done.stderr == ""


@pytest.mark.parametrize("door", SMALLER)
def test_too_little_memory_says_what_to_make_smaller(capfd, door):
    def greedy(arguments):
        import jax.numpy as jnp

        jnp.zeros(2**50).block_until_ready()  # no machine has 4 PiB

    assert open_door(greedy, door, []) == 2
    told = capfd.readouterr().err
    assert f"sfd {door}: a device's memory does not suffice: " in told and SMALLER[door] in told
    assert "RESOURCE_EXHAUSTED" in told and "Traceback" not in told
    if door == "train":  # the hint's flags exist
        assert parse(*(word.rstrip(",") for word in SMALLER[door].split() if word.startswith("--"))).config.train.accumulation == 2
