"""Atomic writes, paths of users, and the comparison of records leaf by leaf."""

import re

import pytest

from sfd_jax.errors import SfdError
from sfd_jax.files import PART, atomic_write, differences, must_be_local, user_path, write_json
from sfd_jax.training.checkpoint import find_checkpoint


def test_a_file_keeps_its_old_content_until_the_block_ends(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with atomic_write(path) as part:
        part.write_text("new")
        assert path.read_text() == "old" and part.name.endswith(PART)
    assert path.read_text() == "new"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("fault", [RuntimeError, OSError, KeyboardInterrupt])
def test_a_failing_block_leaves_nothing(tmp_path, fault):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(fault), atomic_write(path, shared=True) as part:
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


def test_paths_are_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/weights") == str(tmp_path / "weights")
    for path in ("here", "/there/x", "gs://bucket/x", "imagenet2012:5.1.0", "with space", "ü", "."):
        assert user_path(path) == path
    assert user_path(tmp_path) == str(tmp_path)


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("", "an empty path"),
        (" x", "blanks"),
        ("x\n", "blanks"),
        ("'x'", "quotes"),
        ("a\nb", "line ends"),
        ("gs:/bucket/x", "gs://BUCKET/FOLDER"),
        ("gs:bucket", "gs://BUCKET/FOLDER"),
        ("GS://bucket/x", "small letters"),
        ("gs:///x", "gs://BUCKET/FOLDER"),
        ("file:///x", "leave 'file:' out, /x"),
        ("FILE:/x", "leave 'FILE:' out, /x"),
        ("hdfs://a/b", "'hdfs:' cannot be read"),
        ("s3://b/x", "'s3:' cannot be read"),
        ("https://b/x", "cannot be read"),
        ("~nobody-of-this-name/x", "no such user"),
    ],
)
def test_invalid_paths_are_refused(path, says):
    with pytest.raises(SfdError, match=re.escape(says)):
        user_path(path)
    if path:
        with pytest.raises(SfdError, match="^--out: "):
            must_be_local("--out", path)
        with pytest.raises(SfdError, match=re.escape(says)):
            find_checkpoint(path)


def test_a_bucket_is_not_a_local_path():
    with pytest.raises(SfdError, match="--out: path gs://b/x: only --workdir and checkpoints"):
        must_be_local("--out", "gs://b/x")
