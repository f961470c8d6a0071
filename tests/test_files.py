"""Files appear whole or not at all, and records of runs are compared leaf by leaf."""

import pytest

from sfd_jax.files import PART, appearing, differences, write_json


def test_a_file_keeps_its_old_content_until_the_block_ends(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with appearing(path) as part:
        part.write_text("new")
        assert path.read_text() == "old" and part.name.endswith(PART)
    assert path.read_text() == "new"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("fault", [RuntimeError, OSError, KeyboardInterrupt])
def test_a_block_that_fails_leaves_nothing(tmp_path, fault):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(fault):
        with appearing(path, shared=True) as part:
            part.write_text("ne")
            raise fault
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


def test_writing_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        write_json(tmp_path / "file" / "a.json", {})


def test_differences_name_each_leaf():
    found = {"a": {"b": 1, "gone": None}, "same": [1, 2], "long": "x" * 100}
    wanted = {"a": {"b": 2, "new": True}, "same": (1, 2), "long": "y" * 100}
    lines = differences(found, wanted)
    assert lines[("a", "b")] == "a.b: there 1, here 2"
    assert lines[("a", "gone")] == "a.gone: there null, here absent"
    assert lines[("a", "new")] == "a.new: there absent, here true"
    assert len(lines[("long",)]) < 140 and ("same",) not in lines
    assert differences(found, found) == {}
