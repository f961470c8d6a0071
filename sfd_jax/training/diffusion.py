"""Train the two-clock diffusion transformer: the loss of `diffusion/losses.py` around a network.

Batches: `latents` (B, H, W, C) normalised, `labels` (B,) int32, and with REPA `repa_features` (B, N, F),
or the inputs that these are computed from (frozen_features.py).

Parameters: the network's own tree; where the clocks are trained too, {"network": ..., "clocks": ...}.
"""

import jax

from sfd_jax.diffusion.clocks import Clocks, Synchronous, join_params, split_params
from sfd_jax.diffusion.losses import LossConfig, draw, loss_metrics, velocity_loss
from sfd_jax.errors import SfdError
from sfd_jax.latents import LatentLayout
from sfd_jax.models.network import Network
from sfd_jax.training.frozen_features import FrozenFeatures
from sfd_jax.training.task import Task


def diffusion_task(
    network: Network,
    layout: LatentLayout,
    clocks: Clocks,
    config: LossConfig,
    targets: FrozenFeatures | None = None,
) -> Task:
    """Return the task for a "lightning_dit" network.

    Args:
      network: predicts the velocity, and projects features where `config.repa_weight` > 0.
      layout: which channels are texture.
      clocks: the pair of clocks that training times are mapped to.
      config: of the loss.
      targets: computes REPA's targets inside the step; None takes those of the batch.

    Returns:
      A Task whose metrics are the loss's terms, and the error of each group of channels by quarter of its
      own clock.

    Raises:
      SfdError: network, layout, clocks and loss contradict each other; both values are named.
    """
    check_parts(network, layout, clocks, config)
    dit = network.config
    repa = config.repa_weight > 0
    null_label = dit.num_classes if dit.null_label else None

    targets = targets if repa else None

    def init(key: jax.Array) -> dict:
        return join_params(network.init(key), clocks.init(jax.random.fold_in(key, 1)))

    def loss(params: dict, batch: dict, key: jax.Array, *frozen: dict):
        params, trained = split_params(params)
        features = None
        if repa:
            features = targets.compute(*frozen, batch) if targets else batch["repa_features"]
        draws = draw(
            key,
            batch["latents"],
            batch["labels"],
            config=config,
            null_label=null_label,
            row_indices=batch["row_indices"],
        )
        terms = velocity_loss(
            lambda *inputs: network.apply(params, *inputs, return_repa=config.reads_hidden),
            batch["latents"],
            draws,
            layout=layout,
            clocks=clocks.bind(trained),
            config=config,
            repa_features=features,
        )
        return terms.total.mean(), loss_metrics(terms)

    return Task("diffusion", network, init, loss, frozen=targets.params if targets else None)


def check_parts(network: Network, layout: LatentLayout, clocks: Clocks, config: LossConfig) -> None:
    """Raise SfdError where the parts of the method contradict each other; uses no device."""
    dit = network.config
    if layout.channels != dit.in_channels:
        raise SfdError(
            f"model.in_channels={dit.in_channels}, but the latents have {layout.texture_channels} texture and "
            f"{layout.semantic_channels} semantic channels"
        )
    if config.repa_weight > 0 and not dit.repa_features:
        raise SfdError(
            f"loss.repa_weight={config.repa_weight} needs a projector, but model.repa_features="
            f"{dit.repa_features} means none; give the features' width, or set loss.repa_weight=0"
        )
    if config.repa_spatial_norm > 0 and dit.input_size == dit.patch_size:
        raise SfdError(
            f"loss.repa_spatial_norm={config.repa_spatial_norm} needs several tokens: model.input_size="
            f"{dit.input_size} and model.patch_size={dit.patch_size} make one; set loss.repa_spatial_norm=0"
        )
    for name, term in config.terms.items():
        if term.reads_hidden and not dit.repa_features:
            raise SfdError(
                f"loss term '{name}' reads projected hidden states, but model.repa_features={dit.repa_features} means "
                "no projector; give a width"
            )
    if config.label_dropout > 0 and not dit.null_label:
        raise SfdError(
            f"loss.label_dropout={config.label_dropout} needs a null label, but model.null_label={dit.null_label}"
        )
    if not dit.two_clocks and not isinstance(clocks, Synchronous):
        raise SfdError(
            f"model.two_clocks={dit.two_clocks} reads one clock, but {clocks} has two different ones; "
            "set clocks.name=synchronous or model.two_clocks=True"
        )
