"""Train the Semantic VAE: reconstruct a visual encoder's features from a few channels for each token.

Batches: `features` (B, N, F), or `pixels` (B, H, W, 3) to compute them from; `labels` (B,) where the latent is
also classified.

Source: SFD paper, section 3 (Semantic VAE), and the released training script.
"""

import dataclasses

import jax
import jax.numpy as jnp

from sfd_jax.diffusion.losses import cosine_distance
from sfd_jax.errors import SfdError
from sfd_jax.models.network import Network
from sfd_jax.models.posterior import sample_posterior
from sfd_jax.randomness import normal_by_row
from sfd_jax.ranges import check_fields
from sfd_jax.training.frozen_features import FrozenFeatures
from sfd_jax.training.task import Task
from sfd_jax.training.terms import apply_head, cross_entropy, gaussian_kl, hits, linear_head

# Axis of (B, N, F) along which the cosine is taken.
COSINE_AXES = {"token": 1, "feature": 2}


@dataclasses.dataclass(frozen=True)
class SemanticVAELoss:
    """Weights of the loss; the defaults are the released ones.

    Attributes:
      mse_weight, l1_weight: squared and absolute error, means over everything.
      cosine_weight: 1 - cosine similarity along `cosine_axis`.
      cosine_axis: "token" as in the released training, or "feature" as in its evaluation.
      kl_weight: KL to the unit Gaussian, summed over tokens and channels of a sample.
      classification_weight: cross-entropy of a linear classifier on the mean latent, itself averaged over
        tokens; 0 trains no classifier.
      num_classes: its classes.
    """

    mse_weight: float = 1.0
    l1_weight: float = 0.0
    cosine_weight: float = 1.0
    cosine_axis: str = "token"
    kl_weight: float = 1e-7
    classification_weight: float = 0.0
    num_classes: int = 0

    def __post_init__(self):
        check_fields("loss", self)
        if not (self.mse_weight or self.l1_weight or self.cosine_weight):
            raise SfdError(
                "loss.mse_weight=0, loss.l1_weight=0 and loss.cosine_weight=0: nothing trains the reconstruction; give "
                "one of them a weight"
            )
        if self.cosine_axis not in COSINE_AXES:
            raise SfdError(f"loss.cosine_axis '{self.cosine_axis}': choose token or feature")
        if self.classification_weight and self.num_classes < 2:
            raise SfdError(
                f"loss.classification_weight={self.classification_weight} needs loss.num_classes of at least 2, "
                f"not {self.num_classes}"
            )


def semantic_vae_task(network: Network, weights: SemanticVAELoss, source: FrozenFeatures | None = None) -> Task:
    """Return the task for a "semantic_vae" network.

    Args:
      network: variational or plain; the plain one has no KL term.
      weights: of the loss.
      source: computes the features inside the step; None takes those of the batch.

    Returns:
      A Task whose params are the network's, or {"network", "heads"} with a classifier.
    """
    classifies = weights.classification_weight > 0

    def init(key: jax.Array) -> dict:
        if not classifies:
            return network.init(key)
        network_key, head_key = jax.random.split(key)
        head = linear_head(head_key, network.config.bottleneck_dim, weights.num_classes)
        return {"network": network.init(network_key), "heads": {"latent": head}}

    def loss(params: dict, batch: dict, key: jax.Array, *frozen: dict):
        network_params = params["network"] if classifies else params
        features = _features(source, batch, frozen)
        mean, logvar = network.apply(network_params, features, method="encode")
        latents = sample_posterior(mean, logvar, normal_by_row(key, batch["row_indices"], mean.shape[1:]))
        reconstruction = network.apply(network_params, latents, method="decode")

        error = reconstruction - features
        cosine = {name: cosine_distance(reconstruction, features, axis).mean() for name, axis in COSINE_AXES.items()}
        terms = {"mse": jnp.square(error).mean(), "l1": jnp.abs(error).mean()}
        total = weights.mse_weight * terms["mse"] + weights.l1_weight * terms["l1"]
        total += weights.cosine_weight * cosine[weights.cosine_axis]
        metrics = terms | {f"cosine_{name}": value for name, value in cosine.items()}
        if logvar is not None:
            metrics["kl"] = gaussian_kl(mean, logvar).mean()
            total += weights.kl_weight * metrics["kl"]
        if classifies:
            logits = apply_head(params["heads"]["latent"], mean.mean(axis=1))
            metrics["classification"] = cross_entropy(logits, batch["labels"]).mean()
            metrics["accuracy"] = hits(logits, batch["labels"])
            total += weights.classification_weight * metrics["classification"]
        return total, metrics

    return Task("semantic_vae", network, init, loss, frozen=source.params if source else None)


def measure_semantic_vae(
    network: Network, params: dict, batch: dict, *frozen: dict, source: FrozenFeatures | None = None
) -> dict[str, jax.Array]:
    """Measure the reconstruction from the mean latent, one number for each row.

    Args:
      network: the "semantic_vae".
      params: the task's.
      batch: `features` (B, N, F), or the inputs that `source` computes them from.
      frozen, source: as in the task.

    Returns:
      "mse", "l1", "cosine" (similarity along features, as in the released evaluation) and, where the
      network has a posterior, "kl": (B,) each.
    """
    params = params.get("network", params)
    features = _features(source, batch, frozen)
    mean, logvar = network.apply(params, features, method="encode")
    reconstruction = network.apply(params, mean, method="decode")
    error = reconstruction - features
    measures = {
        "mse": jnp.square(error).mean(axis=(1, 2)),
        "l1": jnp.abs(error).mean(axis=(1, 2)),
        "cosine": 1.0 - cosine_distance(reconstruction, features, COSINE_AXES["feature"]),
    }
    return measures if logvar is None else measures | {"kl": gaussian_kl(mean, logvar)}


def _features(source: FrozenFeatures | None, batch: dict, frozen: tuple) -> jax.Array:
    features = source.compute(*frozen, batch) if source else batch["features"]
    return features.astype(jnp.float32)
