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
from collections.abc import Callable

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
    """Hold no fields: there is only one such network."""


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
        for name, channels, plan in (
            ("5b", 192, block_a(32)),
            ("5c", 256, block_a(64)),
            ("5d", 288, block_a(64)),
            ("6a", 288, BLOCK_B),
            ("6b", 768, block_c(128)),
            ("6c", 768, block_c(160)),
            ("6d", 768, block_c(160)),
            ("6e", 768, block_c(192)),
            ("7a", 768, BLOCK_D),
            ("7b", 1280, block_e(average_pool)),
            ("7c", 2048, block_e(max_pool_same)),
        ):
            setattr(self, f"Mixed_{name}", Mixed(channels, plan, rngs=rngs))
        self.fc = dense(2048, 1008, rngs=rngs)

    def __call__(self, images: jax.Array) -> dict[str, jax.Array]:
        """Compute the features of images.

        Args:
          images: (B, H, W, 3), values 0..255 (uint8 or float); resized to 299 x 299 here.

        Returns:
          dict of float32 arrays: pool (B, 2048), spatial (B, 17*17*7 = 2023, channels fastest),
          logits_unbiased (B, 1008): pool times the classifier without its bias.
        """
        return self._features(self.resize(images))

    def resize(self, images: jax.Array) -> jax.Array:
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

    def __init__(
        self,
        channels_in: int,
        channels: int,
        size: int | tuple[int, int],
        *,
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
        rngs: nnx.Rngs,
    ):
        height, width = (size, size) if isinstance(size, int) else size
        pad_h, pad_w = (padding, padding) if isinstance(padding, int) else padding
        # XLA's CPU convolution takes three times as long without padding: pad, and cut off what that adds.
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

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv(x)
        return jax.nn.relu(self.bn(x[:, :, 1:-1] if self.cut else x))


class StoredNorm(nnx.Module):
    """Batch normalisation that only ever reads its stored mean and variance."""

    def __init__(self, channels: int):
        self.weight = nnx.Param(jnp.ones((channels,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((channels,), jnp.float32))
        self.running_mean = nnx.Param(jnp.zeros((channels,), jnp.float32))
        self.running_var = nnx.Param(jnp.ones((channels,), jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        factor = self.weight[...] * jax.lax.rsqrt(self.running_var[...] + 1e-3)
        offset = self.bias[...] - self.running_mean[...] * factor
        return x * factor[None, None, None] + offset[None, None, None]


class Mixed(nnx.Module):
    """A block of parallel branches, joined along the channels.

    Args:
      channels: of its input.
      plan: the branches. Each is a chain of layers (name, channels, size[, stride]), of pools, and of forks: tuples of
        layers with one input, whose outputs are joined. Without a stride the grid keeps its size.
    """

    def __init__(self, channels: int, plan: tuple, *, rngs: nnx.Rngs):
        self.plan = plan
        for chain in plan:
            width = channels
            for step in filter(lambda step: not callable(step), chain):
                for name, out, size, *stride in _layers(step):
                    padding = 0 if stride else (size // 2 if isinstance(size, int) else tuple(s // 2 for s in size))
                    layer = ConvNorm(width, out, size, stride=stride[0] if stride else 1, padding=padding, rngs=rngs)
                    setattr(self, name, layer)
                width = out  # nothing follows a fork

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.concatenate(self.branches(x), axis=-1)

    def branches(self, x: jax.Array) -> list[jax.Array]:
        """Return the outputs of the branches; a fork gives one for each of its layers."""
        outputs = []
        for chain in self.plan:
            ends = [x]
            for step in chain:
                ends = (
                    [step(ends[0])] if callable(step) else [getattr(self, name)(ends[0]) for name, *_ in _layers(step)]
                )
            outputs += ends
        return outputs


def _layers(step) -> tuple:
    return (step,) if isinstance(step[0], str) else step


def average_pool(x: jax.Array) -> jax.Array:
    """3x3 mean that keeps the grid; at the border the mean is over the pixels that exist."""
    return nnx.avg_pool(x, (3, 3), strides=(1, 1), padding="SAME", count_include_pad=False)


def max_pool_same(x: jax.Array) -> jax.Array:
    """3x3 maximum that keeps the grid."""
    return nnx.max_pool(x, (3, 3), strides=(1, 1), padding="SAME")


def max_pool_valid(x: jax.Array) -> jax.Array:
    """3x3 maximum with stride 2, without padding."""
    return nnx.max_pool(x, (3, 3), strides=(2, 2), padding="VALID")


def block_a(pool_channels: int) -> tuple:
    """35 x 35: 1x1, 5x5, double 3x3, pool."""
    return (
        (("branch1x1", 64, 1),),
        (("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)),
        (("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)),
        (average_pool, ("branch_pool", pool_channels, 1)),
    )


# 35 x 35 to 17 x 17
BLOCK_B = (
    (("branch3x3", 384, 3, 2),),
    (("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3, 2)),
    (max_pool_valid,),
)


def block_c(c7: int) -> tuple:
    """17 x 17: 1x1, 7x7 as 1x7 and 7x1, the same twice, pool."""
    across, down = (1, 7), (7, 1)
    double = ((c7, 1), (c7, down), (c7, across), (c7, down), (192, across))
    return (
        (("branch1x1", 192, 1),),
        (("branch7x7_1", c7, 1), ("branch7x7_2", c7, across), ("branch7x7_3", 192, down)),
        tuple((f"branch7x7dbl_{i}", *layer) for i, layer in enumerate(double, start=1)),
        (average_pool, ("branch_pool", 192, 1)),
    )


# 17 x 17 to 8 x 8
BLOCK_D = (
    (("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3, 2)),
    (
        ("branch7x7x3_1", 192, 1),
        ("branch7x7x3_2", 192, (1, 7)),
        ("branch7x7x3_3", 192, (7, 1)),
        ("branch7x7x3_4", 192, 3, 2),
    ),
    (max_pool_valid,),
)


def block_e(pool: Callable[[jax.Array], jax.Array]) -> tuple:
    """8 x 8: 1x1, 3x3 forked into 1x3 and 3x1, double 3x3 forked likewise, pool."""
    fork = lambda name: ((f"{name}a", 384, (1, 3)), (f"{name}b", 384, (3, 1)))
    return (
        (("branch1x1", 320, 1),),
        (("branch3x3_1", 384, 1), fork("branch3x3_2")),
        (("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3), fork("branch3x3dbl_3")),
        (pool, ("branch_pool", 192, 1)),
    )
