"""Clocks: their values and rates, the breakpoints included, and what follows from them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sfd_jax.diffusion.clocks import Clocks, FixedOffset, Sequential, Synchronous, make_clocks
from sfd_jax.errors import SfdError


class Smooth(Clocks):
    """A stand-in for a learned pair: semantics lead, nothing is flat, one kink in the middle."""

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
def test_clocks_run_from_0_to_1_and_never_back(clocks):
    tau = jnp.linspace(0, clocks.tau_end, 101)
    for clock in clocks.times(tau):
        assert clock[0] == 0 and abs(clock[-1] - 1) < 2e-7 and (jnp.diff(clock) >= 0).all()


def test_rates_look_from_inside_the_stage():
    clocks = FixedOffset(0.3)
    tau = jnp.float32([0, 0.3, 0.3, 1.0, 1.0, 1.3])
    semantic, texture = clocks.rates(tau, jnp.int32([0, 0, 1, 1, 2, 2]))
    np.testing.assert_array_equal(semantic, [1, 1, 1, 1, 0, 0])
    np.testing.assert_array_equal(texture, [0, 0, 1, 1, 1, 1])


def test_published_rates_are_the_released_masks():
    # Texture where tau >= delta_t, semantics where tau <= 1: both ends belong to stage II.
    below, above = np.nextafter(np.float32(0.3), 0), np.nextafter(np.float32(1), 2)
    tau = jnp.float32([0, below, 0.3, 1, above, 1.3, 1.4])
    semantic, texture = FixedOffset(0.3).published_rates(tau)
    np.testing.assert_array_equal(semantic, [1, 1, 1, 1, 0, 0, 0])
    np.testing.assert_array_equal(texture, [0, 0, 1, 1, 1, 1, 1])


def test_rates_of_a_learned_pair_are_its_derivative():
    clocks = Smooth()
    semantic, texture = clocks.rates(jnp.float32([0.5, 1.0, 1.0]), jnp.int32([0, 0, 1]))
    # 1e-5: at the kink the rate is read a margin of 1e-6 beside it
    np.testing.assert_allclose(semantic, [0.75, 0.5, 0.5], atol=1e-5)
    np.testing.assert_allclose(texture, [0.25, 0.25, 0.75], atol=1e-5)


def test_sequential_synchronous_and_training_times():
    sequential = Sequential()
    assert sequential.edges == (0.0, 1.0, 2.0)
    np.testing.assert_array_equal(sequential.times(jnp.float32([0.5, 1, 1.5]))[1], [0, 0, 0.5])
    assert Synchronous().edges == (0.0, 1.0)
    np.testing.assert_array_equal(Synchronous().rates(jnp.zeros(1), jnp.zeros(1, int)), [[1], [1]])
    # Training draws t in (0, 1) and stretches it: tau = 1.3 t.
    semantic, texture = FixedOffset(0.3).training_times(jnp.float32([0.2, 0.5, 0.9]))
    np.testing.assert_allclose(semantic, [0.26, 0.65, 1], atol=1e-7)
    np.testing.assert_allclose(texture, [0, 0.35, 0.87], atol=1e-7)


def test_tau_at_inverts_the_clocks_even_while_tracing():
    found = []
    jax.jit(lambda x: found.append(FixedOffset(0.3).tau_at(0.1)) or x)(1.0)
    np.testing.assert_allclose(found[0], (0.1, 0.4), atol=1e-6)
    np.testing.assert_allclose(Smooth().tau_at(0.5), (2 - 2**0.5, 4 / 3), atol=1e-6)


def test_make_clocks():
    assert make_clocks("fixed_offset", delta_t=0.5) == FixedOffset(0.5)
    assert make_clocks("fixed_offset", delta_t=0) == make_clocks("synchronous") == Synchronous()
    assert make_clocks("sequential") == Sequential()
    with pytest.raises(SfdError, match="did you mean 'sequential'"):
        make_clocks("sequentail")
    with pytest.raises(SfdError, match="delta_t=1.2"):
        make_clocks("fixed_offset", delta_t=1.2)
