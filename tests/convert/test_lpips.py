"""LPIPS's table, both ways, on a state dict in the `lpips` package's form."""

import numpy as np

from sfd_jax.convert import FORMATS
from sfd_jax.convert.checkpoints import identify
from sfd_jax.convert.table import export_state, import_params
from sfd_jax.models import Network


def state_dict(channels=(2, 3, 5, 7, 7)):
    generator = np.random.default_rng(0)
    state, inputs = {}, 3
    for i, (channel, numbers) in enumerate(
        zip(channels, ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)), strict=True)
    ):
        for number in numbers:
            state[f"net.slice{i + 1}.{number}.weight"] = generator.standard_normal((channel, inputs, 3, 3))
            state[f"net.slice{i + 1}.{number}.bias"] = generator.standard_normal(channel)
            inputs = channel
        for key in (f"lin{i}.model.1.weight", f"lins.{i}.model.1.weight"):  # the package stores them twice
            state[key] = generator.random((1, channel, 1, 1))
    state["scaling_layer.shift"] = np.zeros((1, 3, 1, 1))
    return {key: array.astype(np.float32) for key, array in state.items()}


def test_lpips_in_and_out():
    state = state_dict()
    name, module = identify(state, "lpips.pth")
    assert name == "lpips" and module is FORMATS["lpips"]
    network = Network("lpips", module.read_config(state, {}, {})[0])
    params = import_params(module.TABLE, state, network)
    np.testing.assert_array_equal(
        params["slices"]["2"]["1"]["kernel"], state["net.slice3.12.weight"].transpose(2, 3, 1, 0)
    )
    back = export_state(module.TABLE, params, network)
    assert set(state) - set(back) == {"scaling_layer.shift", *(f"lins.{i}.model.1.weight" for i in range(5))}
    for key, array in back.items():
        np.testing.assert_array_equal(array, state[key])
