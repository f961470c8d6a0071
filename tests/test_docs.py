"""What README and docs/ say exists: every file they link to, every command and every flag they show."""

import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from sfd_jax.cli.main import main
from sfd_jax.experiment.config_files import load_config

ROOT = Path(__file__).resolve().parents[1]
PAGES = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if page.exists()]
DEFAULT_CONFIG = {
    "train_semvae": "configs/semantic_vae.py",
    "train_texture_vae": "configs/texture_vae.py",
    "train_encoder": "configs/visual_encoder.py",
    "demo": "configs/digits.py",
}


def commands() -> list[str]:
    """Return the shell commands of all pages' code blocks, without comments, each once."""
    found = {}
    for page in PAGES:
        text = page.read_text()
        blocks = re.findall(r"^```(?:bash|sh)?\n(.*?)^```", text, re.S | re.M) + re.findall(
            r"`((?:sfd|bash) [^`]+)`", text
        )
        for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
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
def test_links_lead_somewhere(page):
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
    flags = [word.partition("=")[0] for word in words if word.startswith("--")]
    overrides = [flag for flag in flags if flag.startswith("--config.")]
    unknown = [flag for flag in set(flags) - set(overrides) if not re.search(re.escape(flag) + r"\b", text)]
    assert not unknown
    if overrides and words[0] == "sfd":
        given = dict(word.partition("=")[::2] for word in words if word.startswith("--config"))
        config = load_config(given.get("--config") or DEFAULT_CONFIG.get(words[1], "configs/sfd.py:xl"))
        for flag in overrides:
            node = config
            for key in flag.removeprefix("--config.").split("."):
                assert key in node, flag
                node = node[key]
