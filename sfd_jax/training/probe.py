"""The probe: a small network trained together with the curve of learned clocks (diffusion/learned_clocks.py).

Half of a batch lies on the curve: its corrected loss trains the network and the curve, whose gradient comes from the
times, their rates and the points on the path. The other half lies anywhere below the diagonal and trains the network
alone, so that it also knows where the curve might go.
"""

import dataclasses

import jax
import jax.numpy as jnp

from sfd_jax.diffusion.clocks import join_params, split_params
from sfd_jax.diffusion.learned_clocks import POWERS, LocalWeights, TrainedCurve, at_tau, corrected_loss
from sfd_jax.diffusion.losses import LossConfig, draw
from sfd_jax.latents import LatentLayout
from sfd_jax.models.network import Network
from sfd_jax.randomness import keys_by_row
from sfd_jax.ranges import check_fields
from sfd_jax.training.optimizer import OptimizerConfig
from sfd_jax.training.step import TrainConfig
from sfd_jax.training.task import Task


@dataclasses.dataclass(frozen=True)
class ProbeConfig:
    """Size, length and optimizer of the probe: the config group `probe`.

    Attributes:
      width, depth, num_heads: of its network, which is otherwise that of the run.
      steps, global_batch_size, learning_rate: of its training.
      curve_learning_rate: of the curve's parameters.
      kinetic_weight: weight of the curve's kinetic energy.
      reference_offset: of the recipe whose weights over local time are kept (`LocalWeights`).
      path: another run whose curve is taken, instead of training a probe.
    """

    width: int = 384
    depth: int = 6
    num_heads: int = 6
    steps: int = 10_000
    global_batch_size: int = 256
    learning_rate: float = 3e-4
    curve_learning_rate: float = 3e-3
    kinetic_weight: float = 0.05
    reference_offset: float = 0.3
    path: str = ""

    def __post_init__(self):
        check_fields("probe", self)

    @property
    def train(self) -> TrainConfig:
        """Return how `fit` trains the probe."""
        optimizer = OptimizerConfig(
            learning_rate=self.learning_rate, schedule="cosine", warmup_steps=self.steps // 20, clip_norm=1.0
        )
        return TrainConfig(
            optimizer=optimizer,
            steps=self.steps,
            global_batch_size=self.global_batch_size,
            ema_decay=1 - min(20 / self.steps, 0.5),  # of the curve too: its last twentieth
            log_every=max(1, self.steps // 50),
            checkpoint_every=max(1, self.steps // 10),
            keep_last=1,
        )


def probe_task(
    network: Network, layout: LatentLayout, curve: TrainedCurve, loss: LossConfig, probe: ProbeConfig
) -> Task:
    """Return the task of the probe.

    Args:
      network: a small "lightning_dit" with two clocks.
      layout: which channels are texture.
      curve: where it starts.
      loss: time, semantic weight and label dropout are used.
      probe: kinetic weight and reference offset are used.

    Returns:
      A Task with the parameters {"network": ..., "clocks": the curve's}; its metrics are the corrected loss, the
      kinetic energy and the numbers of the curve.
    """
    weights = LocalWeights(loss.time, loss.semantic_weight, probe.reference_offset)
    null_label = network.config.num_classes if network.config.null_label else None

    def init(key: jax.Array) -> dict:
        return join_params(network.init(key), curve.init(key))

    def loss_fn(params: dict, batch: dict, key: jax.Array) -> tuple[jax.Array, dict]:
        params, trained = split_params(params)
        clocks, data, rows = curve.bind(trained), batch["latents"], batch["row_indices"]
        draws = draw(key, data, batch["labels"], config=loss, null_label=null_label, row_indices=rows)
        on_curve = rows % 2 == 0
        # Multiples of the golden ratio modulo 1 from a random start: uniform, and evenly spread over the rows.
        tau = clocks.tau_end * jnp.mod(rows * 0.61803399 + jax.random.uniform(jax.random.fold_in(key, 1)), 1.0)
        anywhere = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys_by_row(jax.random.fold_in(key, 2), rows))
        anywhere = (anywhere.max(axis=1), anywhere.min(axis=1)), (1.0, 1.0)
        places = jax.tree.map(lambda here, there: jnp.where(on_curve, here, there), at_tau(clocks, tau), anywhere)
        predict = lambda *inputs: network.apply(params, *inputs, return_repa=False)
        error = corrected_loss(predict, data, draws.noise, draws.labels, *places, layout=layout, weights=weights)
        energy = clocks.curve.kinetic_energy(curve.start.energy_ratio)
        wait, rest, shape = clocks.curve
        metrics = {"wait": wait, "rest": rest, "kinetic_energy": energy}
        metrics |= {f"shape_{power}": weight for power, weight in zip(POWERS, shape, strict=True)}
        metrics["corrected_loss"] = jnp.sum(jnp.where(on_curve, error, 0.0)), jnp.sum(on_curve)
        return 2 * error.mean() + probe.kinetic_weight * energy, metrics

    return Task("probe", network, init, loss_fn)
