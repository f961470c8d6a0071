"""Train a small encoder with the architecture of DINOv2 on labels, where no released encoder is available.

The class token and the mean patch token each have a linear classifier. The first makes the class token a feature
of the image; the second makes the patch tokens, which SFD compresses, carry what the image shows.

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
    """Configure classification and augmentation.

    Attributes:
      num_classes: labels are 0..num_classes-1.
      label_smoothing: fraction of the target spread over all classes.
      shift: maximum shift along each axis, in pixels.
      scale: maximum change of size, as a fraction.
    """

    num_classes: int
    label_smoothing: float = 0.0
    shift: float = 0.0
    scale: float = 0.0

    def __post_init__(self):
        check_fields("loss", self)
        if self.num_classes < 2:
            raise SfdError(
                f"loss.num_classes={self.num_classes}: the encoder learns to distinguish classes and needs two; "
                "for images of one class use a released encoder (`sfd fetch`)"
            )


def visual_encoder_task(network: Network, settings: VisualEncoderLoss) -> Task:
    """Return the task of training a visual encoder with a method `tokens` ("dinov2") on labels.

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
    """Return per image whether its class token and mean patch token are classified correctly.

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
    """Return each head's logits of whole images, resized to the encoder's own size."""
    grid = network.config.image_size // network.config.patch_size
    output = network.apply(params["network"], pixels, grid, method="tokens")
    return {name: apply_head(params["heads"][name], read(output)) for name, read in _OUTPUTS.items()}


def shift_and_scale(keys: jax.Array, pixels: jax.Array, shift: float, scale: float) -> jax.Array:
    """Shift each image and scale it about its centre, bilinearly; uncovered pixels are black.

    Args:
      keys: (B,), the randomness of each row.
      pixels: (B, H, W, 3) in [-1, 1].
      shift: maximum shift along each axis, in pixels.
      scale: maximum change of size, as a fraction.

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

    # Resampling reads 0 outside the image, so black has to be 0.
    return jax.vmap(one)(keys, pixels + 1.0) - 1.0
