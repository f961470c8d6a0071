"""The section "A clock" of docs/extend.md: one class, one registration, one config value."""

import json
import sys

import numpy as np
import pytest

from sfd_jax.diffusion.clocks import CLOCKS, FixedOffset
from sfd_jax.errors import SfdError
from sfd_jax.experiment.training_data import load_init
from sfd_jax.generation import SampleConfig, make_sampler
from sfd_jax.models import Network
from sfd_jax.training import load_metadata, load_params

PLUGIN = '''
import dataclasses

import jax.numpy as jnp

from sfd_jax.diffusion.clocks import CLOCKS, Clocks
from sfd_jax.ranges import Range
from sfd_jax.settings import setting


@CLOCKS.register("power")
@dataclasses.dataclass(frozen=True)
class Power(Clocks):
    """Let texture follow semantics by a power: t_texture = tau ** power."""

    power: float = setting(2.0, "how far texture lags", range=Range(float, 1, 8))
    tau_end = 1.0
    breakpoints = ()

    def times(self, tau):
        return tau, tau**self.power


@CLOCKS.register("trained_power")
@dataclasses.dataclass(frozen=True)
class TrainedPower(Power):
    """The same, with the power trained with the network, starting from the given one."""

    def init(self, key):
        return {"log_power": jnp.log(jnp.float32(self.power))}

    def times(self, tau):
        return tau, tau ** jnp.exp(self.params["log_power"])
'''


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """The flag that loads the module, which is not imported before and is removed afterwards."""
    (tmp_path / "my_sfd_clock.py").write_text(PLUGIN)
    forget()
    yield f"--plugin={tmp_path / 'my_sfd_clock.py'}"
    forget()


def forget():
    sys.modules.pop("my_sfd_clock", None)
    for name in ("power", "trained_power"):
        CLOCKS.pop(name, None)


@pytest.mark.slow
def test_a_clock_with_a_setting_of_its_own(sfd, plugin, samplers, texture_vae, tmp_path, capsys):
    run, mine = tmp_path / "run", ("--config.clocks.name=power", "--config.clocks.power=3")
    assert sfd("train", plugin, f"--workdir={run}", *mine) == 0
    clocks = {"name": "power", "power": 3.0}
    assert load_metadata(run)["config"]["clocks"] == clocks
    assert json.loads((run / "run.json").read_text())["config"]["clocks"] == clocks

    assert sfd("sample", plugin, f"--checkpoint={run}", f"--out={tmp_path / 'out'}") == 0
    [sampler] = samplers
    assert sampler.clocks == sys.modules["my_sfd_clock"].Power(3.0) and sampler.clocks.power == 3.0
    assert json.loads((tmp_path / "out" / "recipe.json").read_text())["clocks"] == clocks
    assert np.load(tmp_path / "out" / "samples.npz")["arr_0"].shape == (8, 8, 8, 3)

    # Another parameter or clock is another run; a parameter out of range is refused.
    capsys.readouterr()
    for flags, says in (
        ([mine[0], "--config.clocks.power=2.5"], "config.clocks.power: there 3.0, here 2.5"),
        ([], 'config.clocks.name: there "power", here "fixed_offset"'),
        ([mine[0], "--config.clocks.power=9"], "clocks.power=9.0: give a number from 1 to 8"),
        ([mine[0], "--config.clocks.delta_t=0.2"], "clocks has no 'delta_t'"),
    ):
        assert sfd("train", plugin, f"--workdir={run}", *flags) == 2
        assert says in capsys.readouterr().err

    # With the checkpoint but without the module, the error names the module.
    forget()
    with pytest.raises(SfdError, match="--plugin=my_sfd_clock"):
        make_sampler(load_params(run), load_params(texture_vae), SampleConfig())


@pytest.mark.slow
def test_a_clock_that_is_trained_with_the_network(sfd, plugin, samplers, texture_vae, tmp_path, capsys):
    run = tmp_path / "run"
    name = "--config.clocks.name=trained_power"
    assert sfd("train", f"--workdir={run}", "--config.mesh.fsdp=2", plugin, name) == 0
    params, averaged = load_params(run, which="raw")[0], load_params(run)[0]
    raw, ema = (float(tree["clocks"]["log_power"]) for tree in (params, averaged))
    start = float(np.log(np.float32(2)))
    assert params.keys() == averaged.keys() == {"network", "clocks"}
    assert 0.001 < abs(raw - start) < 0.031 and abs(ema - start) < abs(raw - start)  # three steps of Adam at 0.01

    # The sampler uses the learned parameters: the average, or the raw ones with --weights=raw.
    cfg = ("--guidance=cfg", "--guidance_scale=2", "--guidance_interval_start=0.2")
    assert sfd("sample", plugin, f"--checkpoint={run}", f"--out={tmp_path / 'out'}", *cfg) == 0
    of_raw = make_sampler(load_params(run, which="raw"), load_params(texture_vae), SampleConfig())
    for sampler, value in zip((samplers[0], of_raw), (ema, raw), strict=True):
        assert float(sampler.clocks.params["log_power"]) == value
        np.testing.assert_allclose(sampler.clocks.times(np.float32(0.5))[1], 0.5 ** np.exp(value), rtol=1e-6)

    # A run that starts from it keeps its clocks or drops them with a note; the released format cannot store them.
    network, clocks = Network("lightning_dit", load_metadata(run)["network_config"]), type(of_raw.clocks)()
    assert load_init(str(run), network, clocks, 0)["clocks"]["log_power"] == np.float32(ema)
    assert load_init(str(run), network, FixedOffset(), 0).keys() == params["network"].keys()
    capsys.readouterr()
    assert sfd("train", f"--workdir={tmp_path / 'next'}", f"--init={run}", plugin, "--check") == 0
    assert "was trained with other clocks, TrainedPower(power=2.0)" in capsys.readouterr().out
    assert sfd("convert", str(run), f"--export={tmp_path / 'theirs.safetensors'}") == 2
    assert "clocks were trained with it" in capsys.readouterr().err
