"""All links, files, commands, flags and classes in README and docs/ exist, and their Python code resolves."""

import ast
import builtins
import importlib
import inspect
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from sfd_jax.class_names import imagenet_classes
from sfd_jax.cli.main import COMMANDS, main
from sfd_jax.experiment.config_files import load_config
from sfd_jax.generation.labels import parse_classes

ROOT = Path(__file__).resolve().parents[1]
PAGES = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if page.exists()]
DEFAULT_CONFIG = {
    "train_semvae": "configs/semantic_vae.py",
    "train_texture_vae": "configs/texture_vae.py",
    "train_encoder": "configs/visual_encoder.py",
    "demo": "configs/digits.py",
}


def blocks(page: Path, *languages: str) -> list[str]:
    """Return the code blocks of a page in some languages; "" is a block that names none."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.S | re.M)
    return [code for language, code in fences if language in languages]


def commands() -> list[str]:
    """Return the shell commands of all pages, in code blocks and in the text, without comments, each once."""
    found = {}
    for page in PAGES:
        lines = [*blocks(page, "", "bash", "sh"), *re.findall(r"`((?:sfd|bash) [^`]+)`", page.read_text())]
        for line in "\n".join(lines).replace("\\\n", " ").splitlines():
            # The part of a line that calls one of ours: `cd x && ./create.sh`, `for ...; do sfd fetch ...; done`.
            for part in re.split(r"&&|;|\bdo\b", line.split(" #")[0]):
                part = part.strip().replace("...", "")
                if re.match(r"(sfd|bash scripts/|python scripts/|\./\w+\.sh)\b", part):
                    found[part] = page.name
    return list(found)


@cache
def help_of(command: tuple[str, ...]) -> str:
    """Return what a command prints for --help."""
    done = subprocess.run([*command, "--help"], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_exist(page):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    assert not [link for link in links if not (page.parent / link).exists()]


@pytest.mark.parametrize("command", commands())
def test_commands_and_flags_exist(command, capsys):
    words = [word for word in shlex.split(command) if word not in ("--", ">")]
    if words[0] == "sfd":
        if len(words) < 2 or not words[1].isidentifier() or words[1] == "COMMAND":
            return
        with pytest.raises(SystemExit):
            main([words[1], "--help"])
        text = capsys.readouterr().out
    elif words[0].startswith("./"):
        text = help_of(("bash", f"scripts/tpu/{words[0]}")) + "--config --workdir --config.data.path"
    elif words[0] == "python":
        text = help_of((sys.executable, words[1]))
    else:
        assert (ROOT / words[1]).exists()
        return
    text += "--plugin --help"  # of all
    given = dict(word.partition("=")[::2] for word in words if word.startswith("--"))
    if (classes := given.get("--labels", "balanced")) not in ("balanced", "random"):
        parse_classes(classes, 1000, list(imagenet_classes()))
    flags = [word.partition("=")[0] for word in words if word.startswith("--")]
    overrides = [flag for flag in flags if flag.startswith("--config.")]
    unknown = [flag for flag in set(flags) - set(overrides) if not re.search(re.escape(flag) + r"\b", text)]
    assert not unknown
    if overrides and words[0] == "sfd" and "--plugin" not in flags:  # tests/extend/ runs those of plugins
        config = load_config(given.get("--config") or DEFAULT_CONFIG.get(words[1], "configs/sfd.py:xl"))
        for flag in overrides:
            node = config
            for key in flag.removeprefix("--config.").split("."):
                assert key in node, flag
                node = node[key]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_python_code_resolves(page):
    """Every name is defined on the page before it is used, imports exist, and calls of ours fit their signatures.

    docs/extend.md is run as it stands by tests/extend/.
    """
    known = set(dir(builtins))
    for block in blocks(page, "python"):
        ours, tree = {}, ast.parse(block)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("sfd_jax"):
                ours |= {each.name: getattr(importlib.import_module(node.module), each.name) for each in node.names}
        stored = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        stored |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
        stored |= {getattr(node, "name", None) for node in ast.walk(tree)}
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
        stored |= {(each.asname or each.name).split(".")[0] for node in imports for each in node.names}
        known |= stored
        used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        assert not used - known, used - known
        for call in ast.walk(tree):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in ours:
                keywords = {each.arg: None for each in call.keywords}
                inspect.signature(ours[call.func.id]).bind(*call.args, **keywords)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_are_there(page):
    places = (ROOT, ROOT / "sfd_jax", ROOT / "sfd_jax" / "diffusion", *(ROOT / "scripts").iterdir())
    named = re.findall(r"`([\w./]+/[\w.]*|\w+\.(?:py|sh|md|toml))`", page.read_text())
    elsewhere = r"my_|demo_out/|runs/|samples/|report\.md|[A-Z]+/"  # written by commands; capitals stand for any folder
    named = [name for name in named if not re.match(elsewhere, name)]
    assert not [name for name in named if not any((place / name).exists() for place in places)]


def test_functions_that_the_method_names_are_there():
    text = (ROOT / "docs" / "method.md").read_text()
    named = re.findall(r"`(losses|paths|guidance|sampling|solvers|dopri5|clocks)\.(\w+)", text)
    assert len(named) > 10
    for module, name in named:
        assert hasattr(importlib.import_module(f"sfd_jax.diffusion.{module}"), name), (module, name)


def test_commands_stand_in_fences():
    """The tests above read no other blocks."""
    for page in PAGES:
        assert not re.findall(r"^\n    (?:sfd|python|bash) .*", page.read_text(), re.M), page.name


def test_the_readme_is_short_and_names_every_command():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    assert not [name for name in COMMANDS if f"`sfd {name}`" not in text]
