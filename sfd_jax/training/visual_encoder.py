"""Train a small DINOv2-shaped encoder on labels, for images where no released one is at hand.

Class token and mean patch token each pass a linear classifier: the first makes a feature of the image, the
second makes the patch tokens, which SFD compresses, carry what the image shows.

Batches: `pixels` (B, H, W, 3) in [-1, 1], `labels` (B,).
"""

import dataclasses

import jax
import jax.numpy as jnp

from sfd_jax.errors import SfdError
from sfd_jax.models.network import Network
from sfd_jax.randomness import keys_by_row
from sfd_jax.ranges import check_fields
from sfd_jax.training.task import Task
from sfd_jax.training.terms import apply_head, cross_entropy, hits, linear_head

_OUTPUTS = {"cls": lambda out: out["cls_token"], "patches": lambda out: out["patch_tokens"].mean(axis=1)}


@dataclasses.dataclass(frozen=True)
class VisualEncoderLoss:
    """Classification, and how images are varied.

    Attributes:
      num_classes: labels are 0..num_classes-1.
      label_smoothing: share of the target spread over all classes.
      shift: greatest shift along each axis, in pixels.
      scale: greatest change of size, as a fraction.
    """

    num_classes: int
    label_smoothing: float = 0.0
    shift: float = 0.0
    scale: float = 0.0

    def __post_init__(self):
        check_fields("loss", self)
        if self.num_classes < 2:
            raise SfdError(
                f"loss.num_classes={self.num_classes}: the encoder learns to tell classes apart and needs two; "
                "for images of one class take a released encoder (`sfd fetch`)"
            )


def visual_encoder_task(network: Network, settings: VisualEncoderLoss) -> Task:
    """Return the task for a visual encoder with `tokens` ("dinov2") trained with labels.

    Args:
      network: its `image_size` is the size at which it sees the images.
      settings: classes and augmentation.

    Returns:
      A Task whose params are {"network", "heads"}; `load_params` gives the network's alone.
    """

    def init(key: jax.Array) -> dict:
        network_key, *head_keys = jax.random.split(key, 1 + len(_OUTPUTS))
        width, classes = network.config.feature_width, settings.num_classes
        heads = {name: linear_head(k, width, classes) for name, k in zip(_OUTPUTS, head_keys, strict=True)}
        return {"network": network.init(network_key), "heads": heads}

    def loss(params: dict, batch: dict, key: jax.Array):
        pixels, labels = batch["pixels"], batch["labels"]
        if settings.shift or settings.scale:
            pixels = shift_and_scale(keys_by_row(key, batch["row_indices"]), pixels, settings.shift, settings.scale)
        total, metrics = jnp.zeros(()), {}
        for name, logits in _logits(network, params, pixels).items():
            metrics[f"cross_entropy_{name}"] = cross_entropy(logits, labels, settings.label_smoothing).mean()
            metrics[f"accuracy_{name}"] = hits(logits, labels)
            total += metrics[f"cross_entropy_{name}"]
        return total, metrics

    return Task("visual_encoder", network, init, loss)


def measure_visual_encoder(network: Network, params: dict, batch: dict) -> dict[str, jax.Array]:
    """Return whether class token and mean patch token are read rightly, one number a row.

    Args:
      network: the encoder.
      params: the task's.
      batch: `pixels` (B, H, W, 3) in [-1, 1], `labels` (B,).

    Returns:
      "accuracy_cls" and "accuracy_patches", 0 or 1, and "cross_entropy_" of both: (B,) each.
    """
    measures, labels = {}, batch["labels"]
    for name, logits in _logits(network, params, batch["pixels"]).items():
        measures[f"accuracy_{name}"] = (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32)
        measures[f"cross_entropy_{name}"] = cross_entropy(logits, labels)
    return measures


def _logits(network: Network, params: dict, pixels: jax.Array) -> dict[str, jax.Array]:
    """Return what each head says of images as the encoder sees them: whole, at its own size."""
    grid = network.config.image_size // network.config.patch_size
    output = network.apply(params["network"], pixels, grid, method="tokens")
    return {name: apply_head(params["heads"][name], read(output)) for name, read in _OUTPUTS.items()}


def shift_and_scale(keys: jax.Array, pixels: jax.Array, shift: float, scale: float) -> jax.Array:
    """Move and resize each image a little about its centre, bilinear; what comes into view is black.

    Args:
      keys: (B,), the randomness of each row.
      pixels: (B, H, W, 3) in [-1, 1].
      shift: greatest shift along each axis, in pixels.
      scale: greatest change of size, as a fraction.

    Returns:
      (B, H, W, 3) in [-1, 1].
    """
    centre = jnp.array(pixels.shape[1:3]) / 2

    def one(key, image):
        shift_key, scale_key = jax.random.split(key)
        factor = 1.0 + scale * jax.random.uniform(scale_key, minval=-1.0)
        translation = shift * jax.random.uniform(shift_key, (2,), minval=-1.0) + (1.0 - factor) * centre
        return jax.image.scale_and_translate(
            image, image.shape, (0, 1), jnp.stack([factor, factor]), translation, "linear", antialias=False
        )

    # Outside of the image the resampling reads 0, so black has to be 0 there.
    return jax.vmap(one)(keys, pixels + 1.0) - 1.0
