"""Semantic VAE: compress the features of a visual encoder, token by token or across tokens.

Maps features (B, N, F) to semantic latents (B, N, Z) and back. Released: transformer, F = 768,
Z = 16, on 256 DINOv2 patch tokens. No positions are added: the features carry them.

Encoder and decoder are lists of layers; `convert/semantic_vae.py` lists their parameters beside the PyTorch keys.

Source: SFD paper, section 3 (Semantic VAE); released code semantic autoencoder.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from sfd_jax.errors import nearest
from sfd_jax.models.attention import SelfAttention
from sfd_jax.models.layers import (
    FAN_IN,
    Mlp,
    check,
    check_dtype,
    dense,
    gelu_exact,
    layer_norm,
)
from sfd_jax.models.posterior import sample_posterior, split_moments
from sfd_jax.ranges import check_fields


@dataclasses.dataclass(frozen=True)
class SemanticVAEConfig:
    """Configure a Semantic VAE; the defaults are the released one.

    Attributes:
      arch: "linear", "mlp", "resnet" or "transformer".
      input_dim: F.
      bottleneck_dim: Z.
      hidden_dim: D.
      num_layers: layers of the gated MLP ("mlp", and beside the residual blocks in "resnet").
      num_res_blocks: residual blocks ("resnet").
      transformer_heads, transformer_blocks: attention heads and blocks ("transformer").
      variational: the encoder gives mean and log-variance; otherwise only the latent.
      compute_dtype: "float32" or "bfloat16", dtype of the matmuls.
    """

    arch: str = "transformer"
    input_dim: int = 768
    bottleneck_dim: int = 16
    hidden_dim: int = 768
    num_layers: int = 2
    num_res_blocks: int = 2
    transformer_heads: int = 6
    transformer_blocks: int = 4
    variational: bool = True
    compute_dtype: str = "float32"

    def __post_init__(self):
        check_fields("model", self)
        check(self.arch in STACKS, f"no Semantic VAE arch '{self.arch}': {nearest(self.arch, STACKS)}")
        check(
            self.arch != "transformer" or self.hidden_dim % self.transformer_heads == 0,
            f"hidden_dim {self.hidden_dim} does not divide by transformer_heads {self.transformer_heads}",
        )
        check_dtype(self.compute_dtype)


class SemanticVAE(nnx.Module):
    """Compress visual features to semantic latents and back."""

    def __init__(self, config: SemanticVAEConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        build_encoder, build_decoder = STACKS[c.arch]
        outputs = c.bottleneck_dim * (2 if c.variational else 1)
        self.encoder = nnx.Sequential(*build_encoder(c, c.input_dim, outputs, rngs))
        self.decoder = nnx.Sequential(*build_decoder(c, c.bottleneck_dim, c.input_dim, rngs))

    def encode(self, features: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Return (mean, logvar), (B, N, Z) float32 each, of features (B, N, F).

        The plain autoencoder's logvar is None and its mean is the latent.
        """
        moments = self.encoder(features).astype(jnp.float32)
        return split_moments(moments) if self.config.variational else (moments, None)

    def decode(self, latents: jax.Array) -> jax.Array:
        """Return features (B, N, F) float32 of semantic latents (B, N, Z), not normalised."""
        return self.decoder(latents).astype(jnp.float32)

    def __call__(
        self, features: jax.Array, noise: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """Return (reconstruction (B, N, F), mean, logvar); noise (B, N, Z) samples the posterior."""
        mean, logvar = self.encode(features)
        return self.decode(sample_posterior(mean, logvar, noise)), mean, logvar


def linear_layers(c: SemanticVAEConfig, features_in: int, features_out: int, rngs: nnx.Rngs) -> list[nnx.Module]:
    return [_linear(c, features_in, features_out, rngs)]


def mlp_layers(c: SemanticVAEConfig, features_in: int, features_out: int, rngs: nnx.Rngs) -> list[nnx.Module]:
    widths = [features_in] + [c.hidden_dim] * (c.num_layers - 1)
    gated = [Gated(c, a, b, rngs=rngs) for a, b in zip(widths[:-1], widths[1:], strict=True)]
    return [*gated, _linear(c, widths[-1], features_out, rngs)]


def resnet_encoder_layers(
    c: SemanticVAEConfig, features_in: int, features_out: int, rngs: nnx.Rngs
) -> list[nnx.Module]:
    d = c.hidden_dim
    return [
        _linear(c, features_in, d, rngs),
        *[ResBlock(c, rngs=rngs) for _ in range(c.num_res_blocks)],
        *[Gated(c, d, d, rngs=rngs) for _ in range(c.num_layers - 1)],
        _linear(c, d, features_out, rngs),
    ]


def resnet_decoder_layers(
    c: SemanticVAEConfig, features_in: int, features_out: int, rngs: nnx.Rngs
) -> list[nnx.Module]:
    # Not quite the encoder reversed: here the first layer is gated too.
    d = c.hidden_dim
    return [
        Gated(c, features_in, d, rngs=rngs),
        *[Gated(c, d, d, rngs=rngs) for _ in range(c.num_layers - 1)],
        *[ResBlock(c, rngs=rngs) for _ in range(c.num_res_blocks)],
        _linear(c, d, features_out, rngs),
    ]


def transformer_layers(c: SemanticVAEConfig, features_in: int, features_out: int, rngs: nnx.Rngs) -> list[nnx.Module]:
    return [
        _linear(c, features_in, c.hidden_dim, rngs),
        *[TransformerBlock(c, rngs=rngs) for _ in range(c.transformer_blocks)],
        layer_norm(c.hidden_dim, rngs=rngs, epsilon=1e-5),
        _linear(c, c.hidden_dim, features_out, rngs),
    ]


# arch -> layers of the encoder, layers of the decoder
STACKS = {
    "linear": (linear_layers, linear_layers),
    "mlp": (mlp_layers, mlp_layers),
    "resnet": (resnet_encoder_layers, resnet_decoder_layers),
    "transformer": (transformer_layers, transformer_layers),
}


class Gated(nnx.Module):
    """silu(gate(x)) * up(x)."""

    def __init__(self, config: SemanticVAEConfig, features_in: int, features_out: int, *, rngs: nnx.Rngs):
        self.gate = _linear(config, features_in, features_out, rngs)
        self.up = _linear(config, features_in, features_out, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.nn.silu(self.gate(x)) * self.up(x)


class ResBlock(nnx.Module):
    """x + MLP(LayerNorm(x))."""

    def __init__(self, config: SemanticVAEConfig, *, rngs: nnx.Rngs):
        self.norm = layer_norm(config.hidden_dim, rngs=rngs, epsilon=1e-5)
        self.mlp = _mlp(config, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.mlp(self.norm(x))


class TransformerBlock(nnx.Module):
    """Pre-LayerNorm attention and MLP."""

    def __init__(self, config: SemanticVAEConfig, *, rngs: nnx.Rngs):
        d = config.hidden_dim
        self.norm1 = layer_norm(d, rngs=rngs, epsilon=1e-5)
        self.attention = SelfAttention(d, config.transformer_heads, rngs=rngs, dtype=jnp.dtype(config.compute_dtype))
        self.norm2 = layer_norm(d, rngs=rngs, epsilon=1e-5)
        self.mlp = _mlp(config, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def _linear(config, features_in, features_out, rngs):
    dtype = jnp.dtype(config.compute_dtype)
    return dense(features_in, features_out, rngs=rngs, init=FAN_IN, dtype=dtype)


def _mlp(config, rngs):
    d, dtype = config.hidden_dim, jnp.dtype(config.compute_dtype)
    return Mlp(d, 4 * d, gelu_exact, rngs=rngs, init=FAN_IN, dtype=dtype)
