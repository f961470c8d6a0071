"""Registries of parts, and plugins that add to them."""

import sys

import pytest

from sfd_jax.cli import main as cli
from sfd_jax.errors import SfdError
from sfd_jax.registry import Registry, load_plugins


def test_parts_are_found_by_name_and_names_are_not_taken_twice():
    parts = Registry("part")
    parts.register("own", 1, module="sfd_jax.models")

    @parts.register("other")
    class Other:
        pass

    assert parts["own"] == 1 and parts["other"] is Other and list(parts) == ["own", "other"]
    assert parts.registered_in("own") is None and parts.registered_in("other") == __name__
    parts.register("other", 2, module=__name__)  # a notebook's cell, run again
    assert parts["other"] == 2
    with pytest.raises(SfdError, match="but sfd_jax.models has one of that name"):
        parts.register("own", 3, module=__name__)
    with pytest.raises(SfdError, match="no part 'owm': did you mean 'own'.*--plugin=MODULE"):
        parts["owm"]
    with pytest.raises(SfdError, match="--plugin=theirs "):
        parts.find("third", "theirs")


@pytest.mark.parametrize("way", ["--plugin=FILE", "--plugin MODULE", "SFD_PLUGINS"])
def test_a_plugin_is_imported_before_the_command_runs(way, tmp_path, monkeypatch):
    (tmp_path / "my_sfd_part.py").write_text("HERE = 1\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_sfd_part", raising=False)
    flags = {
        "--plugin=FILE": [f"--plugin={tmp_path / 'my_sfd_part.py'}"],
        "--plugin MODULE": ["--plugin", "my_sfd_part"],
    }
    if way != "--plugin=FILE":
        monkeypatch.chdir(tmp_path)
    if way == "SFD_PLUGINS":
        monkeypatch.setenv("SFD_PLUGINS", "my_sfd_part")
    seen = []

    def command(arguments):
        seen.extend([arguments, sys.modules["my_sfd_part"].HERE])

    assert cli.run_command(command, "verify", ["--a=1", *flags.get(way, []), "b"]) == 0
    assert seen == [["--a=1", "b"], 1]
    monkeypatch.delitem(sys.modules, "my_sfd_part")


def test_a_missing_plugin_is_named(tmp_path, capsys):
    assert cli.run_command(lambda _: 0, "verify", ["--plugin=nowhere_sfd"]) == 2
    assert "plugin 'nowhere_sfd': no such module" in capsys.readouterr().err
    (tmp_path / "broken_sfd_part.py").write_text("import not_installed_anywhere\n")
    with pytest.raises(ModuleNotFoundError, match="not_installed_anywhere"):
        load_plugins([str(tmp_path / "broken_sfd_part.py")])
    sys.path.remove(str(tmp_path))


def test_a_plugin_file_is_loaded_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    files = [tmp_path / folder / name for folder in "ab" for name in ("sfd_one.py", "sfd.dotted one.py")]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"HERE = {str(file)!r}\n")
    load_plugins([f" {files[0]} ", str(files[0]), str(files[1])])
    assert [sys.modules[name].HERE for name in ("sfd_one", "sfd.dotted one")] == list(map(str, files[:2]))
    with pytest.raises(SfdError, match=r"b/sfd_one.py': another module has the name sfd_one \(.*a/sfd_one.py\)"):
        load_plugins([str(files[2])])
    (tmp_path / "random.py").write_text("")
    with pytest.raises(SfdError, match="another module has the name random"):
        load_plugins([str(tmp_path / "random.py")])
    with pytest.raises(SfdError, match="no such file"):
        load_plugins([str(tmp_path / "nowhere.py")])
    with pytest.raises(SfdError, match="an empty --plugin"):
        load_plugins([" "])
    monkeypatch.setenv("SFD_PLUGINS", f" , {files[0]} ,")
    load_plugins()
    for name in ("sfd_one", "sfd.dotted one"):
        del sys.modules[name]
