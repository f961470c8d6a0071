"""scripts/setup.sh, tpu_setup.sh and check_devices.py, with stand-ins for Python, pip and uv."""

import importlib.util
import shutil
import subprocess
import sys
import threading

import pytest

# A Python whose pip does as the file pip_plan says, a line a call: ok, fail. It writes its calls down.
PYTHON = r"""#!/usr/bin/env bash
here={folder}
case "$*" in
    -c*) exec {python} "$@" ;;
    --version) exec {python} --version ;;
    "-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
    "-m pip --version") ;;
    "-m pip install"*)
        echo "$*" >>"$here/pip_calls"
        plan=$(head -n 1 "$here/pip_plan"); sed -i 1d "$here/pip_plan"
        [ "$plan" != fail ] || {{ echo "the index did not answer" >&2; exit 1; }}
        case "$*" in *--target*) mkdir -p "$7/bin"; cp "$here/uv" "$7/bin/uv" ;; esac ;;
    *) exit 99 ;;
esac
"""
# A uv that has no Python until it has installed one, which fails while the file uv_fails is there.
UV = r"""#!/usr/bin/env bash
here={folder}
case "$*" in
    "python find --managed-python 3.13") [ -f "$here/installed" ] && echo "$here/python" ;;
    "python install 3.13") [ ! -f "$here/uv_fails" ] && touch "$here/installed" ;;
    *) exit 99 ;;
esac
"""


@pytest.fixture
def checkout(root, tmp_path):
    """A checkout with the scripts alone, and a folder of stand-ins beside it."""
    checkout, tools = tmp_path / "checkout", tmp_path / "tools"
    (checkout / "scripts/tpu").mkdir(parents=True)
    tools.mkdir()
    shutil.copy(root / "tpu_setup.sh", checkout)
    shutil.copy(root / "scripts/setup.sh", checkout / "scripts")
    shutil.copy(root / "scripts/tpu/check_devices.py", checkout / "scripts/tpu")
    (checkout / "constraints.txt").write_text("jax==0\n")
    (checkout / "pyproject.toml").write_text("")
    for name, text in (("python", PYTHON), ("uv", UV), ("sleep", "#!/bin/sh\n")):
        (tools / name).write_text(text.format(folder=tools, python=sys.executable))
        (tools / name).chmod(0o755)
    (tools / "pip_plan").write_text("")
    return checkout


def run(checkout, script, *arguments, **environment):
    tools = checkout.parent / "tools"
    environment = {"PATH": f"{tools}:/usr/bin:/bin", "HOME": str(checkout), "TPU_CHECK_TIMEOUT": "0", **environment}
    return subprocess.run(
        ["bash", str(checkout / script), *arguments], capture_output=True, text=True, timeout=60, env=environment
    )


def setup(checkout, *extras):
    return run(checkout, "scripts/setup.sh", *extras, PYTHON=str(checkout.parent / "tools/python"))


def pip_calls(checkout):
    path = checkout.parent / "tools/pip_calls"
    return path.read_text().splitlines() if path.exists() else []


def test_setup_installs_the_pins_once(checkout):
    assert setup(checkout, "dev", "torch").returncode == 0
    assert "--constraint constraints.txt --editable .[dev,torch]" in pip_calls(checkout)[0]
    assert setup(checkout, "dev", "torch").returncode == 0 and len(pip_calls(checkout)) == 1
    (checkout / "constraints.txt").write_text("jax==1\n")
    assert setup(checkout, "dev", "torch").returncode == 0 and len(pip_calls(checkout)) == 2


def test_another_python_makes_the_environment_anew(checkout):
    assert setup(checkout).returncode == 0
    (checkout / ".venv/old").touch()
    # The environment says that it is another Python than the one that is to be used.
    text = (checkout / ".venv/bin/python").read_text()
    (checkout / ".venv/bin/python").write_text(
        text.replace("--version) exec", "--version) echo Python 3.2.1; exit; exec")
    )
    (checkout / ".venv/.installed").write_text("what that Python's stamp was\n")
    done = setup(checkout)
    assert done.returncode == 0 and ".venv has Python 3.2.1; creating it again with Python 3." in done.stdout
    assert not (checkout / ".venv/old").exists() and len(pip_calls(checkout)) == 2


def stand_in(path, minor):
    """Put a Python 3.`minor` at `path`: the version that setup.sh asks for is the only thing it compares."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/usr/bin/env bash\ncase "$*" in *"(3, {minor}))") exit 0 ;; *) exit 1 ;; esac\n')
    path.chmod(0o755)


def test_the_newest_python_is_found(checkout):
    tools = checkout.parent / "tools"
    for name in ("python3", "python3.11", "python3.12", "python3.13", "python3.14"):
        stand_in(tools / name, 10)  # hides those of this machine
    find = lambda *minors, **environment: run(checkout, "scripts/setup.sh", "--find-python", *minors, **environment)
    done = find()
    assert done.returncode == 2 and "Python 3.11 to 3.14 with the venv module is needed" in done.stderr
    stand_in(tools / "python3", 11)
    assert find().stdout == "python3\n"
    stand_in(tools / "python3.12", 12)
    assert find().stdout == "python3.12\n" and find("11").stdout == "python3\n" and find("13").returncode == 2
    pyenv = checkout / ".pyenv/versions/3.13.0/bin/python"  # HOME is the checkout
    stand_in(pyenv, 13)
    assert find().stdout == f"{pyenv}\n" and find("12", "13").stdout == "python3.12\n"
    assert find(PYTHON="python3").stdout == "python3\n"
    assert find(PYTHON="/no/python").returncode == 2
    # What .venv was made of, where nothing else leads there.
    brought = checkout / "brought/bin/python3.13"
    pyenv.rename(brought.parent.parent.with_name("moved"))
    stand_in(brought, 13)
    (checkout / ".venv/bin").mkdir(parents=True)
    (checkout / ".venv/bin/python").symlink_to(brought)
    assert find().stdout == f"{brought}\n"


def test_another_folder_for_the_environment(checkout):
    tools = checkout.parent / "tools"
    assert run(checkout, "scripts/setup.sh", PYTHON=str(tools / "python"), SFD_VENV=".venv-other").returncode == 0
    assert (checkout / ".venv-other/.installed").exists() and not (checkout / ".venv").exists()


def test_the_demo_installs_what_it_needs(root, checkout):
    shutil.copy(root / "scripts/demo.sh", checkout / "scripts")
    run(checkout, "scripts/demo.sh", PYTHON=str(checkout.parent / "tools/python"))  # there is no sfd to run afterwards
    assert pip_calls(checkout)[0].endswith("--editable .[demo]")


def test_setup_tries_again_after_a_hiccup_of_pip(checkout):
    plan = checkout.parent / "tools/pip_plan"
    plan.write_text("fail\nok\n")
    done = setup(checkout)
    assert done.returncode == 0 and "trying again" in done.stderr
    (checkout / "constraints.txt").write_text("jax==1\n")
    plan.write_text("fail\nfail\nfail\n")
    done = setup(checkout)
    assert done.returncode == 1 and "pip failed three times" in done.stderr
    # What was there before is still there, and the next run goes on.
    (checkout / ".venv/kept").touch()
    assert setup(checkout).returncode == 0 and (checkout / ".venv/kept").exists()


@pytest.mark.parametrize("half", ["killed pip", "no pip"])
def test_setup_makes_a_half_made_environment_anew(checkout, half):
    old = checkout / ".venv"
    (old / "bin").mkdir(parents=True)
    (old / "old").touch()
    shutil.copy(checkout.parent / "tools/python", old / "bin/python")
    if half == "killed pip":
        dead = subprocess.Popen(["true"])
        dead.wait()
        (old / ".installing").write_text(f"{dead.pid}\n")
    else:
        (old / "bin/python").write_text("#!/bin/sh\nexit 1\n")
    done = setup(checkout)
    assert done.returncode == 0 and "is incomplete" in done.stdout and not (old / "old").exists()


def test_setup_waits_for_another_one(checkout):
    (checkout / ".venv").mkdir()
    other = subprocess.Popen(["/bin/sleep", "60"])
    threading.Thread(target=other.wait).start()  # so that it does not stay as a zombie, which `kill -0` still finds
    (checkout / ".venv/.installing").write_text(f"{other.pid}\n")
    # It ends while it is being waited for.
    (checkout.parent / "tools/sleep").write_text(
        f"#!/bin/sh\nkill {other.pid}; touch {checkout}/waited; /bin/sleep 0.1\n"
    )
    done = setup(checkout)
    assert done.returncode == 0 and "waiting for it" in done.stdout and (checkout / "waited").exists()


def test_tpu_setup_takes_the_python_that_is_there(checkout):
    done = run(checkout, "tpu_setup.sh", PYTHON=str(checkout.parent / "tools/python"))
    assert done.returncode == 0, done.stderr
    assert len(pip_calls(checkout)) == 1 and pip_calls(checkout)[0].endswith("--editable .[tpu]")


def test_tpu_setup_brings_a_python_where_the_image_has_an_old_one(checkout):
    tools = checkout.parent / "tools"
    # The image's Pythons: too old, whatever their name.
    for name in ("python3", "python3.11", "python3.12", "python3.13", "python3.14"):
        text = (tools / "python").read_text().replace("-c*) exec", "-c*) exit 1; exec")
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    (tools / "pip_plan").write_text("fail\n")
    done = run(checkout, "tpu_setup.sh")
    assert done.returncode == 1 and "uv, which installs Python 3.13, could not be installed" in done.stderr
    (tools / "uv_fails").touch()
    done = run(checkout, "tpu_setup.sh")
    assert (
        done.returncode == 1
        and "Python 3.13 could not be downloaded" in done.stderr
        and "PYTHON=python3.11" in done.stderr
    )
    (tools / "uv_fails").unlink()
    done = run(checkout, "tpu_setup.sh")
    assert done.returncode == 0, done.stderr
    assert (checkout / ".venv/.installed").exists()
    assert ["uv==" in call for call in pip_calls(checkout)] == [True, True, False]
    # And again: nothing is left to do.
    assert run(checkout, "tpu_setup.sh").returncode == 0 and len(pip_calls(checkout)) == 3


# --- check_devices.py -------------------------------------------------------------------------------------------------


@pytest.fixture
def check_devices(root):
    spec = importlib.util.spec_from_file_location("check_devices", root / "scripts/tpu/check_devices.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_processes_that_hold_the_chips_are_named(check_devices, tmp_path):
    chip = tmp_path / "accel0"
    chip.touch()
    code = "import sys; file = open(sys.argv[1]); print(flush=True); sys.stdin.read()"
    holder = subprocess.Popen([sys.executable, "-c", code, str(chip)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    holder.stdout.readline()
    fault = check_devices.check(5, [str(chip)])
    holder.communicate()
    assert f"held by process {holder.pid} ({sys.executable}" in fault


@pytest.mark.parametrize(
    "ask, sentence",
    [
        ("print('4 local devices of 16: TPU v5e (tpu)')", ""),
        ("import time; time.sleep(9)", "did not answer within 0 s"),
        ("print('1 local devices'); raise SystemExit(3)", "JAX finds no TPU: JAX chose another platform"),
        ("raise RuntimeError('ABORTED: in use')", "JAX finds no TPU: RuntimeError: ABORTED: in use"),
    ],
)
def test_missing_devices_are_explained(check_devices, tmp_path, monkeypatch, capsys, ask, sentence):
    chip = tmp_path / "accel0"
    chip.touch()
    monkeypatch.setattr(check_devices, "ASK", ask)
    fault = check_devices.check(0.4 if "sleep" in ask else 20, [str(chip)])
    assert (fault == "") if sentence == "" else sentence in fault
    if not sentence:
        assert "4 local devices" in capsys.readouterr().out
    assert "no TPU chips" in check_devices.check(5, [])
