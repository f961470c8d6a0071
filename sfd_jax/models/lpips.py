"""LPIPS: perceptual distance of two images, by the features of a VGG16 trained on ImageNet.

Pixels (B, H, W, 3) in [-1, 1] go through five slices of VGG16 (up to relu1_2, relu2_2, relu3_3, relu4_3,
relu5_3). At each slice both images' features are made unit vectors over channels; their squared
differences, weighted by channel, are averaged over positions; the five are summed.

Parameters (ours <- PyTorch key of the `lpips` package and of taming-transformers):

  slices/{i}/{j}/kernel (3,3,I,O), bias     net.slice{i+1}.{n}.{weight,bias}, n the layer's number in VGG16
  weights/{i} (1,1,C,1)                     lin{i}.model.1.weight (1,C,1,1), not negative

Source: Zhang et al. 2018 (arXiv 1801.03924), version 0.1, `net="vgg"`; taming-transformers,
taming/modules/losses/lpips.py.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sfd_jax.models.layers import check, conv
from sfd_jax.ranges import check_fields

# ImageNet's mean and std for pixels in [-1, 1], as the original rounds them.
SHIFT = np.array([-0.030, -0.088, -0.188], np.float32).reshape(1, 1, 1, 3)
SCALE = np.array([0.458, 0.448, 0.450], np.float32).reshape(1, 1, 1, 3)


@dataclasses.dataclass(frozen=True)
class LpipsConfig:
    """Configure the network's size; the defaults are VGG16's.

    Attributes:
      channels: of each slice.
      depths: convolutions of each slice.
    """

    channels: tuple[int, ...] = (64, 128, 256, 512, 512)
    depths: tuple[int, ...] = (2, 2, 3, 3, 3)

    def __post_init__(self):
        check_fields("model", self)
        check(
            len(self.channels) == len(self.depths) > 0,
            f"LPIPS with {len(self.channels)} channels and {len(self.depths)} depths: give one of each for every slice",
        )


class Lpips(nnx.Module):
    """Perceptual distance of two batches of images."""

    def __init__(self, config: LpipsConfig, *, rngs: nnx.Rngs):
        self.config = config
        inputs = (3, *config.channels[:-1])
        self.slices = nnx.List(
            nnx.List(conv(before if i == 0 else after, after, 3, rngs=rngs) for i in range(depth))
            for before, after, depth in zip(inputs, config.channels, config.depths, strict=True)
        )
        self.weights = nnx.List(nnx.Param(jnp.full((1, 1, c, 1), 1.0 / c)) for c in config.channels)

    def __call__(self, pixels: jax.Array, others: jax.Array) -> jax.Array:
        """Return the distance of each pair, (B,) float32.

        Args:
          pixels, others: (B, H, W, 3), about [-1, 1]; H and W at least 16.
        """
        distance = jnp.zeros(len(pixels))
        for weights, ours, theirs in zip(self.weights, self.features(pixels), self.features(others), strict=True):
            squares = (_unit(ours) - _unit(theirs)) ** 2
            distance += jnp.matmul(squares, weights[0, 0], precision="highest").mean(axis=(1, 2, 3))
        return distance

    def features(self, pixels: jax.Array) -> list[jax.Array]:
        """Return the features (B, h, w, C) at the end of each slice."""
        x = (pixels - SHIFT) / SCALE
        features = []
        for i, slice_ in enumerate(self.slices):
            x = nnx.max_pool(x, (2, 2), strides=(2, 2)) if i else x
            for convolution in slice_:
                x = jax.nn.relu(convolution(x))
            features.append(x)
        return features


def _unit(features):
    return features / (jnp.sqrt(jnp.sum(features**2, axis=3, keepdims=True)) + 1e-10)
