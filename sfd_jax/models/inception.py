"""Inception v3 of 2015-12-05, the network that FID, sFID and the Inception score are defined on.

It is not torchvision's: average pools leave padding out of the mean, the last block pools by
maximum, the classifier has 1008 outputs, and images are resized the way TensorFlow 1 did. All of it
computes in float32 at highest precision: scores are compared to two decimals.

Parameters keep the names of the PyTorch file (`pt_inception-2015-12-05`), with `/` for `.`:

  {layer}/conv/kernel (KH,KW,I,O)                 {layer}.conv.weight (O,I,KH,KW)
  {layer}/bn/weight, bias, running_mean, running_var (O,)   the same; `num_batches_tracked` is skipped
  fc/kernel (2048,1008), fc/bias                  fc.weight (1008,2048), fc.bias

where {layer} is Conv2d_1a_3x3, ..., Mixed_5b/branch1x1, ..., Mixed_7c/branch_pool.

Source: Szegedy et al., arXiv 1512.00567; pytorch-fid, inception.py, for how the 2015 graph differs;
guided-diffusion, evaluations/evaluator.py, for the features that are read.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from sfd_jax.models.kernels import precision_of
from sfd_jax.models.layers import FAN_IN, dense
from sfd_jax.models.resize import resize_bilinear_tf1

IMAGE_SIZE = 299
SPATIAL_CHANNELS = 7


@dataclasses.dataclass(frozen=True)
class InceptionConfig:
    """Nothing to choose: there is one such network."""


class Inception(nnx.Module):
    """Features and logits of images, as the ADM evaluation suite reads them."""

    def __init__(self, config: InceptionConfig, *, rngs: nnx.Rngs):
        self.config = config

        def conv(*args, **options):
            return ConvNorm(*args, rngs=rngs, **options)

        self.Conv2d_1a_3x3 = conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = conv(32, 32, 3)
        self.Conv2d_2b_3x3 = conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = conv(64, 80, 1)
        self.Conv2d_4a_3x3 = conv(80, 192, 3)
        self.Mixed_5b = BlockA(192, 32, rngs=rngs)
        self.Mixed_5c = BlockA(256, 64, rngs=rngs)
        self.Mixed_5d = BlockA(288, 64, rngs=rngs)
        self.Mixed_6a = BlockB(288, rngs=rngs)
        self.Mixed_6b = BlockC(768, 128, rngs=rngs)
        self.Mixed_6c = BlockC(768, 160, rngs=rngs)
        self.Mixed_6d = BlockC(768, 160, rngs=rngs)
        self.Mixed_6e = BlockC(768, 192, rngs=rngs)
        self.Mixed_7a = BlockD(768, rngs=rngs)
        self.Mixed_7b = BlockE(1280, average_pool, rngs=rngs)
        self.Mixed_7c = BlockE(2048, max_pool_same, rngs=rngs)
        self.fc = dense(2048, 1008, rngs=rngs)

    def __call__(self, images):
        """Compute the features of images.

        Args:
          images: (B, H, W, 3), values 0..255 (uint8 or float); resized to 299 x 299 here.

        Returns:
          dict of float32 arrays: pool (B, 2048), spatial (B, 17*17*7 = 2023, channels fastest),
          logits_unbiased (B, 1008): pool times the classifier without its bias.
        """
        return self._features(self.resize(images))

    def resize(self, images):
        """Resize images (B, H, W, 3) of 0..255 to 299 x 299 as TensorFlow 1 did, values kept."""
        return resize_bilinear_tf1(images, IMAGE_SIZE, IMAGE_SIZE)

    def _features(self, images):
        x = (images - 128.0) / 128.0
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = max_pool_valid(x)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = max_pool_valid(x)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        branches = self.Mixed_6d.branches(x)
        # sFID reads the first channels of the concatenation, which are the 1x1 branch's.
        spatial = branches[0][..., :SPATIAL_CHANNELS]
        x = self.Mixed_6e(jnp.concatenate(branches, axis=-1))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        pool = x.mean(axis=(1, 2))
        return {
            "pool": pool,
            "spatial": spatial.reshape(spatial.shape[0], -1),
            "logits_unbiased": jnp.matmul(pool, self.fc.kernel[...], precision="highest"),
        }


class ConvNorm(nnx.Module):
    """Convolution without bias, batch normalisation with stored statistics, ReLU."""

    def __init__(self, channels_in, channels, size, *, stride=1, padding=0, rngs):
        height, width = (size, size) if isinstance(size, int) else size
        pad_h, pad_w = (padding, padding) if isinstance(padding, int) else padding
        # XLA's CPU convolution takes three times as long where nothing is padded: pad, and cut what that adds.
        self.cut = padding == 0 and stride == 1 and width > 1
        pad_w += self.cut
        self.conv = nnx.Conv(
            channels_in,
            channels,
            (height, width),
            strides=stride,
            padding=((pad_h, pad_h), (pad_w, pad_w)),
            use_bias=False,
            kernel_init=FAN_IN,
            precision=precision_of(jnp.float32),
            rngs=rngs,
        )
        self.bn = StoredNorm(channels)

    def __call__(self, x):
        x = self.conv(x)
        return jax.nn.relu(self.bn(x[:, :, 1:-1] if self.cut else x))


class StoredNorm(nnx.Module):
    """Batch normalisation that only ever reads its stored mean and variance."""

    def __init__(self, channels):
        self.weight = nnx.Param(jnp.ones((channels,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((channels,), jnp.float32))
        self.running_mean = nnx.Param(jnp.zeros((channels,), jnp.float32))
        self.running_var = nnx.Param(jnp.ones((channels,), jnp.float32))

    def __call__(self, x):
        factor = self.weight[...] * jax.lax.rsqrt(self.running_var[...] + 1e-3)
        offset = self.bias[...] - self.running_mean[...] * factor
        return x * factor[None, None, None] + offset[None, None, None]


class Mixed(nnx.Module):
    """A block of parallel branches, joined along the channels."""

    def __call__(self, x):
        return jnp.concatenate(self.branches(x), axis=-1)


class BlockA(Mixed):
    """35 x 35: 1x1, 5x5, double 3x3, pool."""

    def __init__(self, channels, pool_channels, *, rngs):
        self.branch1x1 = ConvNorm(channels, 64, 1, rngs=rngs)
        self.branch5x5_1 = ConvNorm(channels, 48, 1, rngs=rngs)
        self.branch5x5_2 = ConvNorm(48, 64, 5, padding=2, rngs=rngs)
        self.branch3x3dbl_1 = ConvNorm(channels, 64, 1, rngs=rngs)
        self.branch3x3dbl_2 = ConvNorm(64, 96, 3, padding=1, rngs=rngs)
        self.branch3x3dbl_3 = ConvNorm(96, 96, 3, padding=1, rngs=rngs)
        self.branch_pool = ConvNorm(channels, pool_channels, 1, rngs=rngs)

    def branches(self, x):
        return [
            self.branch1x1(x),
            self.branch5x5_2(self.branch5x5_1(x)),
            self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
            self.branch_pool(average_pool(x)),
        ]


class BlockB(Mixed):
    """35 x 35 to 17 x 17."""

    def __init__(self, channels, *, rngs):
        self.branch3x3 = ConvNorm(channels, 384, 3, stride=2, rngs=rngs)
        self.branch3x3dbl_1 = ConvNorm(channels, 64, 1, rngs=rngs)
        self.branch3x3dbl_2 = ConvNorm(64, 96, 3, padding=1, rngs=rngs)
        self.branch3x3dbl_3 = ConvNorm(96, 96, 3, stride=2, rngs=rngs)

    def branches(self, x):
        return [
            self.branch3x3(x),
            self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
            max_pool_valid(x),
        ]


class BlockC(Mixed):
    """17 x 17: 1x1, 7x7 as 1x7 and 7x1, the same twice, pool."""

    def __init__(self, channels, c7, *, rngs):
        across = dict(size=(1, 7), padding=(0, 3), rngs=rngs)
        down = dict(size=(7, 1), padding=(3, 0), rngs=rngs)
        self.branch1x1 = ConvNorm(channels, 192, 1, rngs=rngs)
        self.branch7x7_1 = ConvNorm(channels, c7, 1, rngs=rngs)
        self.branch7x7_2 = ConvNorm(c7, c7, **across)
        self.branch7x7_3 = ConvNorm(c7, 192, **down)
        self.branch7x7dbl_1 = ConvNorm(channels, c7, 1, rngs=rngs)
        self.branch7x7dbl_2 = ConvNorm(c7, c7, **down)
        self.branch7x7dbl_3 = ConvNorm(c7, c7, **across)
        self.branch7x7dbl_4 = ConvNorm(c7, c7, **down)
        self.branch7x7dbl_5 = ConvNorm(c7, 192, **across)
        self.branch_pool = ConvNorm(channels, 192, 1, rngs=rngs)

    def branches(self, x):
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        return [
            self.branch1x1(x),
            self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x))),
            self.branch7x7dbl_5(self.branch7x7dbl_4(double)),
            self.branch_pool(average_pool(x)),
        ]


class BlockD(Mixed):
    """17 x 17 to 8 x 8."""

    def __init__(self, channels, *, rngs):
        self.branch3x3_1 = ConvNorm(channels, 192, 1, rngs=rngs)
        self.branch3x3_2 = ConvNorm(192, 320, 3, stride=2, rngs=rngs)
        self.branch7x7x3_1 = ConvNorm(channels, 192, 1, rngs=rngs)
        self.branch7x7x3_2 = ConvNorm(192, 192, (1, 7), padding=(0, 3), rngs=rngs)
        self.branch7x7x3_3 = ConvNorm(192, 192, (7, 1), padding=(3, 0), rngs=rngs)
        self.branch7x7x3_4 = ConvNorm(192, 192, 3, stride=2, rngs=rngs)

    def branches(self, x):
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        return [
            self.branch3x3_2(self.branch3x3_1(x)),
            self.branch7x7x3_4(seven),
            max_pool_valid(x),
        ]


class BlockE(Mixed):
    """8 x 8: 1x1, 3x3 forked into 1x3 and 3x1, double 3x3 forked alike, pool."""

    def __init__(self, channels, pool, *, rngs):
        across = dict(size=(1, 3), padding=(0, 1), rngs=rngs)
        down = dict(size=(3, 1), padding=(1, 0), rngs=rngs)
        self.branch1x1 = ConvNorm(channels, 320, 1, rngs=rngs)
        self.branch3x3_1 = ConvNorm(channels, 384, 1, rngs=rngs)
        self.branch3x3_2a = ConvNorm(384, 384, **across)
        self.branch3x3_2b = ConvNorm(384, 384, **down)
        self.branch3x3dbl_1 = ConvNorm(channels, 448, 1, rngs=rngs)
        self.branch3x3dbl_2 = ConvNorm(448, 384, 3, padding=1, rngs=rngs)
        self.branch3x3dbl_3a = ConvNorm(384, 384, **across)
        self.branch3x3dbl_3b = ConvNorm(384, 384, **down)
        self.branch_pool = ConvNorm(channels, 192, 1, rngs=rngs)
        self.pool = pool

    def branches(self, x):
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return [
            self.branch1x1(x),
            self.branch3x3_2a(single),
            self.branch3x3_2b(single),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(self.pool(x)),
        ]


def average_pool(x):
    """3x3 mean that keeps the grid; at the border the mean is over the pixels that exist."""
    return nnx.avg_pool(x, (3, 3), strides=(1, 1), padding="SAME", count_include_pad=False)


def max_pool_same(x):
    """3x3 maximum that keeps the grid."""
    return nnx.max_pool(x, (3, 3), strides=(1, 1), padding="SAME")


def max_pool_valid(x):
    """3x3 maximum with stride 2, without padding."""
    return nnx.max_pool(x, (3, 3), strides=(2, 2), padding="VALID")
