"""Paths between noise (t = 0) and data (t = 1).

A path gives the point at time t and the velocity there. Time is an array that broadcasts against
the latents, (B,1,1,C) in the loss, because the two groups of channels have their own clocks.
"""

import dataclasses
from typing import Protocol

import jax


class Path(Protocol):
    """Connect noise to data; any class with these two methods will do."""

    def interpolate(self, data: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
        """Return the point at time t: `noise` at t = 0, `data` at t = 1."""

    def velocity(self, data: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
        """Return the derivative of `interpolate` with respect to t."""


@dataclasses.dataclass(frozen=True)
class LinearPath:
    """Connect noise and data by a straight line: x_t = t data + (1 - t) noise, velocity = data - noise.

    Source: released `transport/path.py`, ICPlan.
    """

    def interpolate(self, data: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
        return t * data + (1.0 - t) * noise

    def velocity(self, data: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
        del t  # constant along the path
        return data - noise
