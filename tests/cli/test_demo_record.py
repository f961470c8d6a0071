"""The demo's work folder: done stages are not done again, other configurations and bad folders are refused."""

import json

import pytest

from sfd_jax.errors import SfdError
from sfd_jax.experiment.demo.record import DemoRecord


def test_a_finished_stage_runs_once_and_a_failed_one_again(tmp_path):
    calls = []

    def stage(fail):
        calls.append(fail)
        if fail:
            raise RuntimeError("killed")
        return {"loss": 2}

    with pytest.raises(RuntimeError):
        DemoRecord(tmp_path, {"seed": 0}).run("vae", "a stage", lambda: stage(True))
    DemoRecord(tmp_path, {"seed": 0}).run("vae", "a stage", lambda: stage(False))
    record = DemoRecord(tmp_path, {"seed": 0})
    record.run("vae", "a stage", lambda: stage(False))
    assert calls == [True, False]
    assert record.stages["vae"]["loss"] == 2


def test_another_configuration_is_named_and_nothing_changes(tmp_path):
    DemoRecord(tmp_path, {"seed": 0, "train": {"steps": 3}})
    before = (tmp_path / "demo.json").read_bytes()
    with pytest.raises(SfdError, match=r"train\.steps: there 3, here 4"):
        DemoRecord(tmp_path, {"seed": 0, "train": {"steps": 4}})
    DemoRecord(tmp_path, {"seed": 0, "train": {"steps": 3, "preview": {"every": 2}}})  # these change nothing
    assert (tmp_path / "demo.json").read_bytes() == before


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SfdError, match="cannot be used"):
        DemoRecord(tmp_path / "file" / "demo", {})


def test_full_disk_in_a_stage_keeps_the_record(tmp_path):
    record = DemoRecord(tmp_path, {})
    record.run("first", "a stage", dict)

    def full():
        raise OSError(28, "No space left on device")

    with pytest.raises(SfdError, match="No space left"):
        record.run("second", "a stage", full)
    assert list(json.loads((tmp_path / "demo.json").read_text())["stages"]) == ["first"]


def test_damaged_record(tmp_path):
    DemoRecord(tmp_path, {})
    (tmp_path / "demo.json").write_text("{")
    with pytest.raises(SfdError, match="damaged"):
        DemoRecord(tmp_path, {})
