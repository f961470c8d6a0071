"""Texture VAE: the convolutional autoencoder between pixels and texture latents.

Maps pixels (B, H, W, 3) in [-1, 1] to a posterior on raw latents (B, h, w, Z), h = H / 2^(levels-1),
and back. "Raw" means not normalised: `latents.LatentStatistics` does that. The released one is f16d32:
five levels, Z = 32; Stability's, with which DiT and SiT were trained, f8: four levels, Z = 4. Two variants: LDM's,
and MAR's, whose decoder has no attention in its up path.

Parameters keep the names of the PyTorch keys, one for one, with `/` for `.`:

  */kernel (KH,KW,I,O), bias         conv weight (O,I,KH,KW), bias
  */scale, bias (GroupNorm)          weight, bias
  {encoder,decoder}/conv_in, conv_out, norm_out
  {encoder,decoder}/mid/{block_1,attn_1,block_2}/...
  encoder/down/{i}/block/{j}/{norm1,conv1,norm2,conv2,nin_shortcut}
  encoder/down/{i}/attn/{j}/{norm,q,k,v,proj_out}     only at the levels with attention
  encoder/down/{i}/downsample/conv                    all levels but the last
  decoder/up/{i}/block/{j}/..., attn/{j}/...          i counts from the FINEST level
  decoder/up/{i}/upsample/conv                        all levels but the finest
  quant_conv, post_quant_conv                         (1,1,2Z,2Z) and (1,1,Z,Z); only with use_quant_conv

`loss.*` (LPIPS, discriminator) of the released files is not part of the network.

Source: latent-diffusion, ldm/modules/diffusionmodules/model.py (from taming-transformers); MAR,
models/vae.py.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from sfd_jax.models.execution import PLAIN
from sfd_jax.models.layers import check, check_divides, check_dtype, conv, group_norm
from sfd_jax.models.posterior import sample_posterior, split_moments
from sfd_jax.models.stack import run_equal
from sfd_jax.ranges import check_fields


@dataclasses.dataclass(frozen=True)
class TextureVAEConfig:
    """Configure a texture VAE; the defaults are the released f16d32.

    Attributes:
      z_channels: Z.
      ch: channels of the finest level.
      ch_mult: multiple of `ch` at each level, finest first; each level but one halves the grid.
      num_res_blocks: residual blocks a level in the encoder; the decoder has one more.
      attention_levels: levels whose blocks are each followed by attention; negative ones count
        from the coarsest. (The coarsest is 16x16 for the released 256 px.)
      variant: "ldm", or "mar" (no attention in the decoder's up path).
      norm_groups: groups of every GroupNorm; must divide every channel count.
      use_quant_conv: 1x1 convolutions of the moments and of the latents; SD3's and FLUX's have none.
      compute_dtype: "float32" or "bfloat16", dtype of the convolutions.
    """

    z_channels: int = 32
    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    attention_levels: tuple[int, ...] = (-1,)
    variant: str = "ldm"
    norm_groups: int = 32
    use_quant_conv: bool = True
    compute_dtype: str = "float32"

    def __post_init__(self):
        check_fields("model", self)
        check(
            self.variant in ("ldm", "mar"),
            f"no texture VAE variant '{self.variant}': choose ldm or mar",
        )
        check(len(self.ch_mult) > 0, "ch_mult is empty: give one multiple for each level")
        for width in self.widths:
            check(
                width % self.norm_groups == 0,
                f"norm_groups {self.norm_groups} does not divide the {width} channels of a level (ch {self.ch} x "
                f"{width // self.ch}): choose fewer groups",
            )
        levels = len(self.ch_mult)
        for level in self.attention_levels:
            check(
                -levels <= level < levels,
                f"attention_levels holds {level}, but there are {levels} levels",
            )
        check_dtype(self.compute_dtype)

    @property
    def downsampling(self) -> int:
        """Return H / h, the factor between pixels and latents."""
        return 2 ** (len(self.ch_mult) - 1)

    @property
    def widths(self) -> list[int]:
        """Return the channels of each level, finest first."""
        return [self.ch * mult for mult in self.ch_mult]

    def has_attention(self, level: int) -> bool:
        """Tell whether the blocks of this level (0 is the finest) are followed by attention."""
        return level in {a % len(self.ch_mult) for a in self.attention_levels}


def to_bytes(pixels: jax.Array) -> jax.Array:
    """Turn pixels in [-1, 1] into uint8: clamp(127.5 x + 128, 0, 255), truncated.

    The offset is 128, not 127.5, so that truncation rounds: the released sampler's formula.
    """
    return jnp.clip(127.5 * pixels + 128.0, 0.0, 255.0).astype(jnp.uint8)


class TextureVAE(nnx.Module):
    """Encode pixels to raw texture latents and decode them back."""

    def __init__(self, config: TextureVAEConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        z, dtype = c.z_channels, jnp.dtype(c.compute_dtype)
        self.encoder = Encoder(c, rngs=rngs)
        self.decoder = Decoder(c, rngs=rngs)
        if c.use_quant_conv:
            self.quant_conv = conv(2 * z, 2 * z, 1, rngs=rngs, dtype=dtype)
            self.post_quant_conv = conv(z, z, 1, rngs=rngs, dtype=dtype)

    def encode(self, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return (mean, logvar), (B, h, w, Z) float32 each, of pixels (B, H, W, 3) in [-1, 1].

        Raises:
          SfdError: H or W does not divide by the downsampling factor.
        """
        for side in pixels.shape[1:3]:
            check_divides(side, self.config.downsampling, "the texture VAE's downsampling")
        moments = self.encoder(pixels)
        if self.config.use_quant_conv:
            moments = self.quant_conv(moments)
        return split_moments(moments.astype(jnp.float32))

    def decode(self, raw_latents: jax.Array) -> jax.Array:
        """Return pixels (B, H, W, 3) float32, about [-1, 1], of raw latents (B, h, w, Z)."""
        if self.config.use_quant_conv:
            raw_latents = self.post_quant_conv(raw_latents)
        return self.decoder(raw_latents).astype(jnp.float32)

    def __call__(self, pixels: jax.Array, noise: jax.Array | None = None) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return (reconstruction, mean, logvar); noise (B, h, w, Z) samples the posterior."""
        mean, logvar = self.encode(pixels)
        return self.decode(sample_posterior(mean, logvar, noise)), mean, logvar


class Encoder(nnx.Module):
    """Pixels (B, H, W, 3) to moments (B, h, w, 2Z)."""

    def __init__(self, config: TextureVAEConfig, *, rngs: nnx.Rngs):
        c, dtype = config, jnp.dtype(config.compute_dtype)
        self.conv_in = conv(3, c.ch, 3, rngs=rngs, dtype=dtype)
        widths = [c.ch, *c.widths]
        self.down = nnx.List(
            Level(c, level, before, c.num_res_blocks, c.has_attention(level), "downsample", rngs=rngs)
            for level, before in enumerate(widths[:-1])
        )
        channels = widths[-1]
        self.mid = Middle(c, channels, rngs=rngs)
        self.norm_out = group_norm(channels, c.norm_groups, rngs=rngs)
        self.conv_out = conv(channels, 2 * c.z_channels, 3, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(jax.nn.silu(self.norm_out(self.mid(x))))


class Decoder(nnx.Module):
    """Latents (B, h, w, Z) to pixels (B, H, W, 3)."""

    def __init__(self, config: TextureVAEConfig, *, rngs: nnx.Rngs):
        c, dtype = config, jnp.dtype(config.compute_dtype)
        widths = [*c.widths, c.widths[-1]]
        self.conv_in = conv(c.z_channels, widths[-1], 3, rngs=rngs, dtype=dtype)
        self.mid = Middle(c, widths[-1], rngs=rngs)
        ldm = c.variant == "ldm"
        up = [
            Level(c, i, widths[i + 1], c.num_res_blocks + 1, ldm and c.has_attention(i), "upsample", rngs=rngs)
            for i in reversed(range(len(c.widths)))
        ]
        # Stored finest first, as in the released files; run coarsest first.
        self.up = nnx.List(reversed(up))
        channels = widths[0]
        self.norm_out = group_norm(channels, c.norm_groups, rngs=rngs)
        self.conv_out = conv(channels, 3, 3, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.mid(self.conv_in(x))
        for level in reversed(list(self.up)):
            x = level(x)
        return self.conv_out(jax.nn.silu(self.norm_out(x)))


class Level(nnx.Module):
    """Residual blocks at one grid size, each with or without attention, then a `change` to the next level's grid."""

    execution = PLAIN

    def __init__(
        self,
        config: TextureVAEConfig,
        level: int,
        channels_in: int,
        num_blocks: int,
        attention: bool,
        change: str,
        *,
        rngs: nnx.Rngs,
    ):
        c, channels = config, config.widths[level]
        widths = [channels_in] + [channels] * (num_blocks - 1)
        self.block = nnx.List([ResBlock(c, width, channels, rngs=rngs) for width in widths])
        self.attn = nnx.List([Attention(c, channels, rngs=rngs) for _ in widths if attention])
        if change == "downsample" and level < len(c.widths) - 1:
            self.downsample = Downsample(c, channels, rngs=rngs)
        if change == "upsample" and level > 0:
            self.upsample = Upsample(c, channels, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        attentions = self.attn or [None] * len(self.block)
        blocks = [nnx.Sequential(*filter(None, pair)) for pair in zip(self.block, attentions, strict=True)]
        first = int(self.block[0].projects)  # its parameters have other shapes
        x = run_equal(blocks[first:], self.execution, blocks[0](x) if first else x)
        if hasattr(self, "downsample"):
            x = self.downsample(x)
        if hasattr(self, "upsample"):
            x = self.upsample(x)
        return x


class Middle(nnx.Module):
    """Block, attention, block at the coarsest grid."""

    def __init__(self, config: TextureVAEConfig, channels: int, *, rngs: nnx.Rngs):
        self.block_1 = ResBlock(config, channels, channels, rngs=rngs)
        self.attn_1 = Attention(config, channels, rngs=rngs)
        self.block_2 = ResBlock(config, channels, channels, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.block_2(self.attn_1(self.block_1(x)))


class ResBlock(nnx.Module):
    """Two convolutions, each after GroupNorm and SiLU, beside a shortcut."""

    def __init__(self, config: TextureVAEConfig, channels_in: int, channels: int, *, rngs: nnx.Rngs):
        groups, dtype = config.norm_groups, jnp.dtype(config.compute_dtype)
        self.norm1 = group_norm(channels_in, groups, rngs=rngs)
        self.conv1 = conv(channels_in, channels, 3, rngs=rngs, dtype=dtype)
        self.norm2 = group_norm(channels, groups, rngs=rngs)
        self.conv2 = conv(channels, channels, 3, rngs=rngs, dtype=dtype)
        self.projects = channels_in != channels
        if self.projects:
            self.nin_shortcut = conv(channels_in, channels, 1, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.conv1(jax.nn.silu(self.norm1(x)))
        h = self.conv2(jax.nn.silu(self.norm2(h)))
        return (self.nin_shortcut(x) if self.projects else x) + h


class Attention(nnx.Module):
    """Single-head attention over all positions of the grid, beside a shortcut."""

    execution = PLAIN

    def __init__(self, config: TextureVAEConfig, channels: int, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.compute_dtype)
        self.norm = group_norm(channels, config.norm_groups, rngs=rngs)
        self.q = conv(channels, channels, 1, rngs=rngs, dtype=dtype)
        self.k = conv(channels, channels, 1, rngs=rngs, dtype=dtype)
        self.v = conv(channels, channels, 1, rngs=rngs, dtype=dtype)
        self.proj_out = conv(channels, channels, 1, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        b, h, w, c = x.shape
        normed = self.norm(x)
        q, k, v = (f(normed).reshape(b, h * w, 1, c) for f in (self.q, self.k, self.v))
        return x + self.proj_out(self.execution.attention(q, k, v).reshape(b, h, w, c))


class Downsample(nnx.Module):
    """Halve the grid by a stride-2 convolution, padded only at the bottom and right."""

    def __init__(self, config: TextureVAEConfig, channels: int, *, rngs: nnx.Rngs):
        padding, dtype = ((0, 1), (0, 1)), jnp.dtype(config.compute_dtype)
        self.conv = conv(channels, channels, 3, strides=2, padding=padding, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(x)


class Upsample(nnx.Module):
    """Double the grid by repeating each pixel, then convolve."""

    def __init__(self, config: TextureVAEConfig, channels: int, *, rngs: nnx.Rngs):
        self.conv = conv(channels, channels, 3, rngs=rngs, dtype=jnp.dtype(config.compute_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2))
