"""Clocks: values, rates, breakpoints, configs and trained parameters."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sfd_jax.diffusion.clocks import (
    CLOCKS,
    Clocks,
    FixedOffset,
    Sequential,
    Synchronous,
    clocks_config,
    join_params,
    make_clocks,
    split_params,
)
from sfd_jax.errors import SfdError
from sfd_jax.ranges import Range
from sfd_jax.settings import setting


class Smooth(Clocks):
    """Like a learned pair: semantics lead, no clock is ever constant, one breakpoint in the middle."""

    tau_end = 2.0
    breakpoints = (1.0,)

    def times(self, tau):
        u = tau / 2
        return 1 - (1 - u) ** 2, jnp.where(tau < 1, u * 0.5, u * 1.5 - 0.5)


def test_fixed_offset_by_hand():
    clocks = FixedOffset(0.3)
    assert clocks.edges == (0.0, 0.3, 1.0, 1.3)
    semantic, texture = clocks.times(jnp.float32([0, 0.1, 0.3, 0.65, 1.0, 1.2, 1.3]))
    # 1e-7: the spacing of float32 near 1
    np.testing.assert_allclose(semantic, [0, 0.1, 0.3, 0.65, 1, 1, 1], atol=1e-7)
    np.testing.assert_allclose(texture, [0, 0, 0, 0.35, 0.7, 0.9, 1], atol=2e-7)


@pytest.mark.parametrize("clocks", [FixedOffset(0.3), Sequential(), Synchronous(), Smooth()])
def test_clocks_rise_from_0_to_1(clocks):
    tau = jnp.linspace(0, clocks.tau_end, 101)
    for clock in clocks.times(tau):
        assert clock[0] == 0 and abs(clock[-1] - 1) < 2e-7 and (jnp.diff(clock) >= 0).all()


def test_rates_are_those_inside_the_stage():
    clocks = FixedOffset(0.3)
    tau = jnp.float32([0, 0.3, 0.3, 1.0, 1.0, 1.3])
    semantic, texture = clocks.rates(tau, jnp.int32([0, 0, 1, 1, 2, 2]))
    np.testing.assert_array_equal(semantic, [1, 1, 1, 1, 0, 0])
    np.testing.assert_array_equal(texture, [0, 0, 1, 1, 1, 1])


def test_released_rates_are_the_released_masks():
    # Texture where tau >= delta_t, semantics where tau <= 1: both ends belong to stage II.
    below, above = np.nextafter(np.float32(0.3), 0), np.nextafter(np.float32(1), 2)
    tau = jnp.float32([0, below, 0.3, 1, above, 1.3, 1.4])
    semantic, texture = FixedOffset(0.3).released_rates(tau)
    np.testing.assert_array_equal(semantic, [1, 1, 1, 1, 0, 0, 0])
    np.testing.assert_array_equal(texture, [0, 0, 1, 1, 1, 1, 1])


def test_rates_of_a_learned_pair_are_its_derivative():
    clocks = Smooth()
    semantic, texture = clocks.rates(jnp.float32([0.5, 1.0, 1.0]), jnp.int32([0, 0, 1]))
    # 1e-5: at the breakpoint the rate is taken at a distance of 1e-6
    np.testing.assert_allclose(semantic, [0.75, 0.5, 0.5], atol=1e-5)
    np.testing.assert_allclose(texture, [0.25, 0.25, 0.75], atol=1e-5)


def test_sequential_synchronous_and_training_times():
    sequential = Sequential()
    assert sequential.edges == (0.0, 1.0, 2.0)
    np.testing.assert_array_equal(sequential.times(jnp.float32([0.5, 1, 1.5]))[1], [0, 0, 0.5])
    assert Synchronous().edges == (0.0, 1.0)
    np.testing.assert_array_equal(Synchronous().rates(jnp.zeros(1), jnp.zeros(1, int)), [[1], [1]])
    # Training draws t in (0, 1) and scales it: tau = 1.3 t.
    semantic, texture = FixedOffset(0.3).training_times(jnp.float32([0.2, 0.5, 0.9]))
    np.testing.assert_allclose(semantic, [0.26, 0.65, 1], atol=1e-7)
    np.testing.assert_allclose(texture, [0, 0.35, 0.87], atol=1e-7)


def test_tau_at_inverts_the_clocks_even_while_tracing():
    found = []
    jax.jit(lambda x: found.append(FixedOffset(0.3).tau_at(0.1)) or x)(1.0)
    np.testing.assert_allclose(found[0], (0.1, 0.4), atol=1e-6)
    np.testing.assert_allclose(Smooth().tau_at(0.5), (2 - 2**0.5, 4 / 3), atol=1e-6)


@CLOCKS.register("bent")
@dataclasses.dataclass(frozen=True)
class Bent(Clocks):
    """Texture lags by a trained bend: t_texture = tau - b tau (1 - tau), b = most * sigmoid(bend)."""

    most: float = setting(1.0, "largest bend", range=Range(float, 0, 1))
    tau_end = 1.0
    breakpoints = ()

    def init(self, key):
        return {"bend": jnp.float32(0.0)}

    def times(self, tau):
        return tau, tau - self.most * jax.nn.sigmoid(self.params["bend"]) * tau * (1 - tau)


@pytest.mark.parametrize(
    "clocks, config",
    [
        (FixedOffset(0.5), {"name": "fixed_offset", "delta_t": 0.5}),
        (Sequential(), {"name": "sequential"}),
        (Synchronous(), {"name": "synchronous"}),
        (Bent(0.4), {"name": "bent", "most": 0.4}),
    ],
)
def test_clocks_survive_the_way_through_a_config(clocks, config):
    assert clocks_config(clocks) == config and make_clocks(config) == clocks
    assert make_clocks({"name": config["name"]}) == type(clocks)()  # missing fields have their defaults


def test_configs_of_earlier_versions_have_a_delta_t_for_every_name():
    assert make_clocks({"name": "sequential", "delta_t": 0.3}) == Sequential()
    assert make_clocks({"name": "fixed_offset", "delta_t": 0}) == Synchronous()


@pytest.mark.parametrize(
    "config, says",
    [
        ({"name": "sequentail"}, "did you mean 'sequential'"),
        ({"name": "fixed_offset", "delta_t": 1.2}, "clocks.delta_t=1.2: give a number from 0 to 1"),
        ({"name": "fixed_offset", "dalta_t": 0.2}, "has no field 'dalta_t': did you mean 'delta_t'"),
        ({"name": "synchronous", "most": 0.2}, "'synchronous' has no field 'most': it takes none"),
        ({"name": "bent", "most": True}, "clocks.most=True"),
    ],
)
def test_wrong_configs_are_refused(config, says):
    with pytest.raises(SfdError, match=says):
        make_clocks(config)


def test_unregistered_clocks_and_missing_modules_are_named():
    with pytest.raises(SfdError, match="Smooth are clocks without a registered name: register the class"):
        clocks_config(Smooth())
    with pytest.raises(SfdError, match="--plugin=their_clocks"):
        make_clocks({"name": "theirs"}, "their_clocks")


def test_trained_parameters_are_bound_and_differentiated():
    clocks = Bent(0.8)
    params = clocks.init(jax.random.key(0))
    assert clocks.bind(params) == clocks  # equality ignores trained parameters
    times = lambda p: clocks.bind(p).times(jnp.float32(0.5))[1]
    rate = lambda p: clocks.bind(p).rates(jnp.float32(0.25), jnp.int32(0))[1]
    np.testing.assert_allclose([times(params), rate(params)], [0.5 - 0.4 / 4, 1 - 0.4 / 2], rtol=1e-6)
    # b = 0.8 sigmoid(bend), whose derivative at 0 is 0.2.
    found = [jax.grad(f)(params)["bend"] for f in (times, rate)]
    np.testing.assert_allclose(found, [-0.2 / 4, -0.2 / 2], rtol=1e-5)
    for wrong in ({}, {"bend": jnp.zeros(2)}, {"bent": jnp.float32(0)}):
        with pytest.raises(SfdError, match="the trained parameters of the clocks have shapes"):
            clocks.bind(wrong)


def test_classes_that_cannot_hold_settings_are_refused(monkeypatch):
    class Bare(Clocks):
        tau_end, breakpoints, times = 1.0, (), Synchronous.times

    class Inherits(FixedOffset):
        more: float = 1.0

    @dataclasses.dataclass
    class Thawed(Bare):
        pass

    @dataclasses.dataclass(frozen=True)
    class Named(Bare):
        name: str = "x"

    frozen = r"is not a frozen dataclass: decorate it with @dataclasses.dataclass\(frozen=True\)"
    for cls, says in ((Bare, frozen), (Inherits, frozen), (Thawed, frozen), (Named, "has a field called 'name'")):
        monkeypatch.setitem(CLOCKS, "odd", cls)
        for use in (lambda: make_clocks({"name": "odd"}), lambda cls=cls: clocks_config(cls())):
            with pytest.raises(SfdError, match=rf"test_clocks\..*\.{cls.__name__} {says}"):
                use()


def test_init_must_return_a_dict():
    class Leaf(Smooth):
        def init(self, key):
            return jnp.zeros(3)

    for use in (lambda: join_params({}, Leaf().init(None)), lambda: Leaf().bind({})):
        with pytest.raises(SfdError, match="Clocks.init must return a dict of arrays"):
            use()


def test_parameters_of_network_and_clocks_are_joined_and_split():
    network, clocks = {"blocks": 1}, {"bend": 2}
    assert join_params(network, {}) is network and split_params(network) == (network, {})
    assert split_params(join_params(network, clocks)) == (network, clocks)
