"""Every case of the parity pack passes, and a tampered pack fails.

The bounds are in sfd_jax/parity, since `sfd verify` uses them too.
"""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from sfd_jax.cli.verify import main
from sfd_jax.errors import SfdError
from sfd_jax.parity import run_case, run_pack


def test_case(parity_dir, place):
    checks = list(run_case(*place))
    broken = [str(check) for check in checks if not check.ok]
    assert checks and not broken, "\n".join(broken)


def test_large_case(parity_dir, place):
    """A billion parameters within 12 GiB, measured in a separate process."""
    code = f"""
import resource
from sfd_jax.parity import run_case
broken = [str(check) for check in run_case({str(place[0])!r}, {place[1]!r}) if not check.ok]
print("BROKEN", broken)
print("PEAK", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "BROKEN []" in done.stdout, done.stdout + done.stderr
    peak = float(done.stdout.split("PEAK")[1])
    assert peak < 12, f"{peak:.1f} GiB"


# --- Tampering ---------------------------------------------------------------------------------------

CASE = "semvae_mlp"  # cheap, with every kind of answer


@pytest.fixture
def copy(parity_dir, tmp_path):
    """A pack of one case, and how to change it: `copy(json=function, arrays=function)`."""
    if not (parity_dir / f"{CASE}.npz").exists():
        pytest.skip(f"this parity pack has no case {CASE}")
    for suffix in (".json", ".npz"):
        shutil.copy(parity_dir / f"{CASE}{suffix}", tmp_path)
        (tmp_path / f"{CASE}{suffix}").chmod(0o644)

    def change(json_change=None, arrays_change=None):
        if json_change:
            path = tmp_path / f"{CASE}.json"
            spec = json.loads(path.read_text())
            json_change(spec)
            path.write_text(json.dumps(spec))
        if arrays_change:
            path = tmp_path / f"{CASE}.npz"
            arrays = dict(np.load(path))
            arrays_change(arrays)
            np.savez(path, **arrays)
        return tmp_path

    return change


def scale(name, factor):
    def change(arrays):
        flat = arrays[name].reshape(-1).copy()
        flat[np.abs(flat).argmax()] *= factor
        arrays[name] = flat.reshape(arrays[name].shape)

    return change


def rename(spec):
    spec["params"]["encoder.0.gates.weight"] = spec["params"].pop("encoder.0.gate.weight")


TAMPERED = {
    "an answer off by 1e-3": dict(arrays_change=scale("out_mean", 1.001)),
    "a scalar answer off": dict(arrays_change=scale("out_kl", 1.001)),
    "an input off": dict(arrays_change=scale("in_features", 1.01)),
    "an answer that is NaN": dict(arrays_change=scale("out_recon", np.nan)),
    "an answer of another shape": dict(arrays_change=lambda a: a.update(out_z=a["out_z"][:1])),
    "an answer missing": dict(arrays_change=lambda a: a.pop("out_recon")),
    "an answer that nothing compares": dict(arrays_change=lambda a: a.update(out_new=np.ones(2))),
    "another seed": dict(json_change=lambda s: s.update(seed=s["seed"] + 1)),
    "a weight renamed": dict(json_change=rename),
    "a weight reshaped": dict(json_change=lambda s: s["params"]["decoder.0.up.bias"].append(2)),
    "a weight missing": dict(json_change=lambda s: s["params"].pop("decoder.0.up.bias")),
    "another architecture": dict(json_change=lambda s: s["config"].update(arch="linear")),
    "no seed": dict(json_change=lambda s: s.pop("seed")),
}


def test_the_untouched_copy_passes(copy, capsys):
    assert main([f"--pack={copy()}"]) == 0
    assert "0 bounds broken" in capsys.readouterr().out


@pytest.mark.parametrize("how", TAMPERED)
def test_a_tampered_pack_fails(copy, how, capsys):
    assert main([f"--pack={copy(**TAMPERED[how])}"]) == 1
    assert "BROKEN" in capsys.readouterr().out


@pytest.mark.parametrize("name", [f"{CASE}.npz", f"{CASE}.json"])
@pytest.mark.parametrize("length", [0, 100, -1])
def test_a_damaged_pack_fails(copy, name, length):
    pack = copy()
    data = (pack / name).read_bytes()
    if length < 0:
        (pack / name).unlink()
    else:
        (pack / name).write_bytes(data[:length])
    checks = list(run_pack(pack))
    assert [check.ok for check in checks] == [False]
    assert CASE in checks[0].note


def test_several_packs_are_one(copy, tmp_path_factory, capsys):
    pack, other = copy(), tmp_path_factory.mktemp("other")
    shutil.copytree(pack, other, dirs_exist_ok=True)
    (other / f"{CASE}.npz").unlink()
    assert main([f"--pack={pack}:{other}"]) == 1
    printed = capsys.readouterr().out
    assert printed.count("BROKEN") == 1 and printed.count(" ok") > 3


def test_a_case_of_unknown_kind_fails(copy):
    pack = copy()
    for suffix in (".json", ".npz"):
        (pack / f"{CASE}{suffix}").rename(pack / f"novel{suffix}")
    assert [check.ok for check in run_pack(pack)] == [False]


def test_a_missing_pack_or_case_is_refused(tmp_path, copy):
    with pytest.raises(SfdError, match="no parity pack"):
        list(run_pack(tmp_path / "nowhere"))
    with pytest.raises(SfdError, match="no case of .* fits dit"):
        list(run_pack(copy(), only=["dit_*"]))


def test_bfloat16_has_its_own_bounds(copy, capsys):
    pack = copy()
    assert main([f"--pack={pack}", "--dtype=bfloat16"]) == 0
    printed = capsys.readouterr().out
    assert "backend cpu" in printed and "bfloat16" in printed.splitlines()[0]
    # float32 has errors of 1e-7 here: if the flag were ignored, no error would be as large as bfloat16's.
    assert max(check.error for check in run_case(pack, CASE, "bfloat16")) > 1e-4
