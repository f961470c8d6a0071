"""The log density of latents under the probability flow, integrated backwards from data to noise.

With rates r_g of the clocks, d log p / dtau = -trace of the Jacobian of (r_g velocity_g), over all channels.
Hutchinson's probe^T J probe is an unbiased estimate of the trace; a mean over several probes has less variance.

Source: released `transport/transport.py`, `sample_ode_likelihood`, which draws a new probe at every evaluation.
"""

import math

import jax
import jax.numpy as jnp

from sfd_jax.diffusion import solvers
from sfd_jax.diffusion.clocks import Clocks
from sfd_jax.diffusion.dopri5 import dopri5
from sfd_jax.diffusion.guidance import VelocityFn
from sfd_jax.diffusion.sample_config import SolverConfig
from sfd_jax.diffusion.sampling import staged_points
from sfd_jax.errors import SfdError
from sfd_jax.latents import LatentLayout
from sfd_jax.randomness import keys_by_row


def rademacher_by_row(key: jax.Array, row_indices: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Draw probes of -1 and 1, (B, *shape) float32, one for each of `row_indices` (B,)."""
    return jax.vmap(lambda row_key: jax.random.rademacher(row_key, shape, jnp.float32))(keys_by_row(key, row_indices))


def log_likelihood(
    velocity_fn: VelocityFn,
    latents: jax.Array,
    probe: jax.Array,
    *,
    layout: LatentLayout,
    clocks: Clocks,
    solver: SolverConfig = SolverConfig(),
) -> tuple[jax.Array, jax.Array]:
    """Estimate the log density of latents; pure and traceable.

    Args:
      velocity_fn: the velocity, as for `sampling.sample`.
      latents: (B,H,W,C) float32 data, normalised.
      probe: (B,H,W,C) of -1 and 1, see `rademacher_by_row`.
      layout: which channels are texture.
      clocks: those the network was trained with.
      solver: method and tolerances, in staged mode.

    Returns:
      log_likelihood: (B,) in nats, of the normalised latents; NaN where dopri5 gave up.
      noise: (B,H,W,C), the end of the flow.

    Raises:
      SfdError: the solver is in released mode, or one of the stochastic equation.
    """
    if solver.mode != "staged" or solver.sde:
        raise SfdError("a likelihood follows the probability flow in staged mode: give mode='staged' and an ODE solver")
    batch, axes = len(latents), tuple(range(1, latents.ndim))
    edges = tuple(clocks.tau_end - tau for tau in reversed(clocks.edges))  # of the reversed time
    stages = len(edges) - 1

    def backwards(state, time, segment):
        tau = jnp.clip(clocks.tau_end - time, 0.0, clocks.tau_end)
        semantic, texture = clocks.rates(tau, stages - 1 - segment)
        rates = layout.per_channel(texture, semantic).reshape(batch, *(1,) * (latents.ndim - 2), -1)
        flow = lambda x: rates * velocity_fn(x, *clocks.times(tau)).astype(jnp.float32)
        velocity, along_probe = jax.jvp(flow, (state[:, :-1].reshape(latents.shape),), (probe,))
        trace = jnp.sum(probe * along_probe, axis=axes)
        return -jnp.concatenate([velocity.reshape(batch, -1), trace[:, None]], axis=1)

    field = solvers.Field(backwards, lambda time, segment: jnp.ones((batch, 1)))
    state = jnp.concatenate([latents.reshape(batch, -1), jnp.zeros((batch, 1))], axis=1)
    if solver.solver == "dopri5":
        # Here the field contains the rates, which jump at the edges: no slope may be reused across an edge.
        tolerances = dict(atol=solver.atol, rtol=solver.rtol, max_nfe=solver.max_nfe)
        solution = dopri5(field, state, edges, jumps=[True] * len(edges), **tolerances)
    else:
        points = staged_points(edges, solver.points(stages), solver.timestep_shift)
        solution = solvers.integrate_grid(field, state, points, method=solver.solver)
    noise = solution.final[:, :-1]
    prior = -(noise.shape[1] * math.log(2 * math.pi) + jnp.sum(noise**2, axis=1)) / 2
    return prior + solution.final[:, -1], noise.reshape(latents.shape)
