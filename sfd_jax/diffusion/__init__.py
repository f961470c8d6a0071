"""The method of Semantic-First Diffusion as pure functions of arrays.

Convention everywhere: t = 0 is noise, t = 1 is data, velocity = data - noise. Global
time tau runs from 0 to tau_end and a pair of clocks maps it to the time of each group of channels.

  clocks    tau -> (t_semantic, t_texture), with breakpoints; used by the loss and the sampler
  learned_clocks  a curve of clocks with trained parameters, and the loss that compares curves
  paths     from noise to data: linear, gvp, vp
  predictions  what the network predicts: velocity, noise or score
  losses    the training loss
  guidance  network and labels -> velocity function
  solvers   fixed-step integrators, each one compiled loop
  dopri5    adaptive integrators
  sde       stochastic sampling, a diffusion for each group
  likelihood  the log density of latents
  sampling  velocity function and noise -> latents
  few_step  mean velocities over intervals of global time
  sample_config  the settings of sampling

This package receives a velocity function and never imports `models`.
"""

from sfd_jax.diffusion.clocks import CLOCKS, Clocks, FixedOffset, Sequential, Synchronous, clocks_config, make_clocks
from sfd_jax.diffusion.learned_clocks import Learned
from sfd_jax.diffusion.losses import Draws, LossConfig, LossTerms, draw, loss_metrics, velocity_loss
from sfd_jax.diffusion.paths import LinearPath, Path
from sfd_jax.diffusion.sample_config import SampleConfig, SampleJob, SolverConfig
from sfd_jax.diffusion.sampling import SamplingStats, sample, trajectory

__all__ = [
    "CLOCKS",
    "Clocks",
    "Draws",
    "FixedOffset",
    "Learned",
    "LinearPath",
    "LossConfig",
    "LossTerms",
    "Path",
    "SampleConfig",
    "SampleJob",
    "SamplingStats",
    "Sequential",
    "SolverConfig",
    "Synchronous",
    "clocks_config",
    "draw",
    "loss_metrics",
    "make_clocks",
    "sample",
    "trajectory",
    "velocity_loss",
]
