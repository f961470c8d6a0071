"""`sfd env` and `sfd --version`: what an issue report needs, whatever is broken."""

import importlib.metadata
import os
import subprocess
import sys

import pytest

import sfd_jax
from sfd_jax.cli import env
from sfd_jax.cli.main import main


def test_it_tells_versions_devices_caches_and_hides_secrets(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SFD_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_ENDPOINT", "https://me:pw@hub.example")
    monkeypatch.setenv("EDITOR", "no business of ours")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)  # then `sfd` sets it
    (tmp_path / "weights").write_bytes(bytes(2**20))
    assert main(["env"]) == 0
    printed = capsys.readouterr().out
    for wanted in (
        f"sfd_jax       {sfd_jax.__version__}",
        f"jax {importlib.metadata.version('jax')}",
        sys.executable,
        "cpu: 8 x cpu",
        f"{tmp_path}: 1 files, 0.00 GiB",
        "HF_TOKEN=(set, not shown)",
        "HF_ENDPOINT=https://...@hub.example",
    ):
        assert wanted in printed, printed
    assert "JAX_COMPILATION_CACHE_DIR" not in printed
    assert "hf_secret" not in printed and "pw@" not in printed and "EDITOR" not in printed


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("import time; time.sleep(60)", r"no answer in 1 s: another process may hold"),
        ("raise ImportError('no jaxlib here')", "JAX does not start: ImportError: no jaxlib here"),
        ("import os; os._exit(9)", "JAX does not start: status 9"),
    ],
)
def test_devices_that_do_not_answer_are_a_sentence(monkeypatch, program, words):
    monkeypatch.setattr(env, "PROBE", program)
    assert words in env.devices(1.0 if "sleep" in program else 60.0)


def test_it_works_where_jax_is_broken(tmp_path):
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax" / "__init__.py").write_text("raise RuntimeError('broken on purpose')")
    surroundings = {**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    code = [sys.executable, "-m", "sfd_jax", "env"]
    done = subprocess.run(code, capture_output=True, text=True, env=surroundings)
    assert done.returncode == 0 and "JAX does not start: RuntimeError: broken on purpose" in done.stdout, done


def test_the_version_names_the_commit_of_a_checkout(tmp_path, monkeypatch, capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith(sfd_jax.__version__)
    monkeypatch.setattr(sfd_jax, "__file__", str(tmp_path / "sfd_jax" / "__init__.py"))
    assert env.version() == sfd_jax.__version__
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run([*git, *arguments], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
    assert env.version() == f"{sfd_jax.__version__} (commit {commit[:10]})"
