"""Flags, config groups and checks from one dataclass; "not given" is None."""

import dataclasses
from typing import Optional

import pytest

from sfd_jax.cli.flags import command_parser, parse_command
from sfd_jax.errors import SfdError
from sfd_jax.ranges import Range, check_fields
from sfd_jax.settings import config_group, flags_from, from_args, over_defaults, setting


@dataclasses.dataclass(frozen=True)
class Job:
    size: int = setting(64, "images at once", range=Range(int, 1, 100))
    word: str = setting("good", "how it is", choices=("good", "better"))
    scale: float | None = setting(None, "of the guidance", range=Range(float, 0, 9), was={-1: None})
    mirrored: bool = setting(True, "mirrored images too")
    seed: int = setting(0, "of the draws")

    def __post_init__(self):
        check_fields("job", self)


def parse(*argv):
    parser = command_parser("job", "")
    flags_from(Job, parser, under="the checkpoint's")
    return parse_command(parser, list(argv))


def test_flags_override_saved_values_and_these_the_defaults():
    args = parse("--scale=0", "--no-mirrored")
    assert args.given == ["mirrored", "scale"] and args.size is None
    assert from_args(Job, args) == Job(scale=0.0, mirrored=False)
    assert from_args(Job, args, Job(size=7, scale=3.0)) == Job(size=7, scale=0.0, mirrored=False)
    assert from_args(Job, parse("--word=better")) == Job(word="better")


def test_help_shows_defaults_and_choices(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert "--word {good,better} how it is (default: the checkpoint's, else good)" in shown
    assert "of the guidance (default: the checkpoint's)" in shown
    assert "--mirrored, --no-mirrored mirrored images too (default: the checkpoint's, else True)" in shown


@pytest.mark.parametrize(
    "flag, says",
    [
        ("--size=0", "--size=0: give an integer from 1 to 100"),
        ("--scale=nan", "--scale=nan: give a number from 0 to 9"),
        ("--seed=-1", "--seed=-1: give an integer from 0"),  # of the table of ranges
        ("--word=bad", "invalid choice: 'bad'"),
    ],
)
def test_flags_are_checked_by_the_fields(flag, says):
    with pytest.raises(SfdError, match=says):
        parse(flag)


@pytest.mark.parametrize(
    "values, says",
    [
        (dict(size=101), "job.size=101: give an integer from 1 to 100"),
        (dict(size="7"), "job.size='7': give a number"),
        (dict(scale=-1.0), "job.scale=-1.0"),
        (dict(word="gud"), "unknown job.word 'gud': did you mean 'good'"),
        (dict(mirrored=1), "job.mirrored=1: give True or False"),
        (dict(seed=2**32), "job.seed=4294967296"),
    ],
)
def test_values_are_checked_by_the_fields(values, says):
    with pytest.raises(SfdError, match=says):
        Job(**values)


def test_types_may_be_strings_or_optional():
    @dataclasses.dataclass(frozen=True)
    class Late:
        power: "float" = 2.0  # as with `from __future__ import annotations`
        on: "bool | None" = True
        maybe: Optional[float] = None  # noqa: UP045

        def __post_init__(self):
            check_fields("late", self)

    group = config_group(Late())
    group.maybe = 2.0
    assert Late(**group) == Late(maybe=2.0)
    for values, says in (
        ({"power": "3"}, "late.power='3': give a number"),
        ({"power": None}, "late.power=None: give a number"),
        ({"on": "yes"}, "late.on='yes': give True or False"),
        ({"maybe": "3"}, "late.maybe='3': give a number"),
    ):
        with pytest.raises(SfdError, match=says):
            Late(**values)


def test_a_config_group_accepts_a_value_for_a_field_that_is_none():
    group = config_group(Job(size=7))
    assert group.to_dict() == {"size": 7, "word": "good", "scale": None, "mirrored": True, "seed": 0}
    group.scale = 2.0
    with pytest.raises(TypeError):
        group.scale = "much"
    assert Job(**group.to_dict()) == Job(size=7, scale=2.0)


def test_old_names_of_fields_and_values_are_read():
    @dataclasses.dataclass(frozen=True)
    class Renamed:
        nfe: int | None = setting(None, "evaluations", was={0: None}, was_called="calls")
        mode: str = setting("staged", "how", was={"published": "released"})

    assert over_defaults(Renamed, {"calls": 9, "mode": "published"}) == {"nfe": 9, "mode": "released"}
    assert over_defaults(Renamed, {"calls": 0}) == {"nfe": None, "mode": "staged"}
    assert over_defaults(Renamed, {"calls": 0, "nfe": 3}) == {"nfe": 3, "mode": "staged"}


def test_old_forms_of_none_are_read():
    found = over_defaults(Job, {"scale": -1.0, "size": 7, "of_then": -1})
    assert found == {"size": 7, "word": "good", "scale": None, "mirrored": True, "seed": 0}
