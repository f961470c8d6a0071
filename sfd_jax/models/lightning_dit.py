"""LightningDiT: the diffusion transformer of LightningDiT and of Semantic-First Diffusion.

Predicts the velocity of a composite latent from the latent, its two clocks and a class label.
Conventions: t = 0 is noise, t = 1 is data; arrays channels last. Axis letters: B batch, H W latent
grid, C channels, P patch, N tokens, D width, K heads, E head width, M MLP width, L layers.

The residual stream, normalisation, modulation, rotary embedding and softmax are float32;
`compute_dtype` is the dtype of the matmuls inside the blocks and the REPA projector.

Parameters (ours <- PyTorch key; Linear weights are transposed, `blocks/` leaves are stacked along a
leading axis L over `blocks.{i}.`):

  patch_embed/kernel (P,P,C,D), bias (D,)          x_embedder.proj.{weight (D,C,P,P), bias}
  time_embed_semantic/linear1/kernel (256,D/2)     t_embedder_sem.mlp.0.{weight,bias}
  time_embed_semantic/linear2/kernel (D/2,D/2)     t_embedder_sem.mlp.2
  time_embed_texture/linear1, linear2              t_embedder_tex.mlp.0, .2
  time_embed/linear1 (256,D), linear2 (D,D)        t_embedder.mlp.0, .2 (one clock, instead)
  label_embed/embedding (classes [+1], D)          y_embedder.embedding_table.weight
  blocks/norm1/scale, norm2/scale (L,D)            norm1.weight, norm2.weight (only with use_rmsnorm)
  blocks/attention/qkv/kernel (L,D,3D), bias       attn.qkv
  blocks/attention/q_norm/scale, k_norm/scale (L,E)  attn.q_norm.weight, k_norm.weight
                                                   (+ bias where use_rmsnorm is off)
  blocks/attention/proj/kernel (L,D,D), bias       attn.proj
  blocks/mlp/w12/kernel (L,D,2M), w3 (L,M,D)       mlp.w12, mlp.w3 (use_swiglu)
  blocks/mlp/fc1/kernel (L,D,M), fc2 (L,M,D)       mlp.fc1, mlp.fc2 (otherwise)
  blocks/modulation/kernel (L,D,6D or 4D), bias    adaLN_modulation.1
  final/norm/scale (D,)                            final_layer.norm_final.weight (use_rmsnorm)
  final/modulation/kernel (D,2D), bias             final_layer.adaLN_modulation.1
  final/linear/kernel (D,P*P*C or P*P*2C), bias    final_layer.linear
  repa_projector/linear1, linear2, linear3         repa_projector.0, .2, .4
  repa_projector/conv/kernel (3,3,D,F), bias       repa_projector (a Conv2d; not in released files)

`pos_embed` and `feat_rope.*` of the released files are fixed tables (positions.py), not parameters.

Source: SFD paper section 3; released code models/lightningdit.py and models/swiglu_ffn.py; the convolution as
projector is iREPA's (arXiv 2512.10794, section 4).
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from sfd_jax.errors import SfdError, nearest
from sfd_jax.models.attention import SelfAttention
from sfd_jax.models.execution import PLAIN
from sfd_jax.models.layers import (
    ZEROS,
    Mlp,
    PatchEmbed,
    SwiGlu,
    check,
    check_dtype,
    conv,
    dense,
    gelu_tanh,
    layer_norm,
    normal,
    rms_norm,
    unpatchify,
)
from sfd_jax.models.positions import Rotary, rotary_2d, sincos_2d, time_features
from sfd_jax.models.stack import run_stack, stack
from sfd_jax.ranges import check_fields
from sfd_jax.settings import setting

# The released code's table. Its "1p0B" is the paper's XXL, which the paper gives as 32 x 1280 x 16.
SIZES = {
    "S": dict(depth=12, width=384, num_heads=6),
    "B": dict(depth=12, width=768, num_heads=12),
    "L": dict(depth=24, width=1024, num_heads=16),
    "XL": dict(depth=28, width=1152, num_heads=16),
    "1p0B": dict(depth=24, width=1536, num_heads=24),
    "1p6B": dict(depth=28, width=1792, num_heads=28),
}


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """Configure a LightningDiT; the defaults are SFD's, without REPA.

    Attributes:
      width, depth, num_heads: D, L, K.
      input_size: side of the latent grid before patching.
      patch_size: P.
      in_channels: C, texture and semantics together.
      num_classes: labels are 0..num_classes-1; the null label is num_classes.
      null_label: the label table has a row for the null label.
      two_clocks: one time embedding for each clock, D/2 wide; otherwise one that reads t_texture.
      time_input: what they embed: the "clock", or the "ddpm_step" in [0, 999] that belongs to it, as DiT does.
      end_time: also read the clocks at the end of an interval, for few-step sampling (docs/few_step.md).
      use_qknorm: normalise queries and keys per head before the rotation.
      use_swiglu: SwiGLU of hidden width int(2/3 mlp_ratio D), instead of GELU of mlp_ratio D.
      use_rope: 2D rotary embedding (beside the position table, which is always added).
      use_rmsnorm: RMSNorm with a learned scale, instead of LayerNorm without parameters.
      use_shift: modulation has shift, scale and gate; without it scale and gate (blocks only).
      learn_sigma: the last layer has 2C channels, of which the second half is dropped.
      repa_features: F, width of the projected features; 0 for no projector.
      repa_depth: the projector reads the hidden states after this many blocks.
      repa_projector: "mlp" of three layers for each token, or "conv", a 3x3 convolution over the grid.
      repa_width: hidden width of the MLP.
      compute_dtype: "float32" or "bfloat16".
    """

    width: int
    depth: int
    num_heads: int
    input_size: int = 16
    patch_size: int = 1
    in_channels: int = 48
    num_classes: int = 1000
    null_label: bool = True
    two_clocks: bool = True
    time_input: str = setting("clock", "what the time embeddings read", choices=("clock", "ddpm_step"))
    end_time: bool = False
    use_qknorm: bool = True
    use_swiglu: bool = True
    use_rope: bool = True
    use_rmsnorm: bool = True
    use_shift: bool = True
    learn_sigma: bool = False
    mlp_ratio: float = 4.0
    repa_features: int = 0
    repa_depth: int = 2
    repa_projector: str = setting("mlp", "from hidden states to features", choices=("mlp", "conv"))
    repa_width: int = 2048
    compute_dtype: str = "float32"

    def __post_init__(self):
        check_fields("model", self)
        d, k = self.width, self.num_heads
        check(d % k == 0, f"width {d} does not divide by num_heads {k}: choose another number of heads")
        check(d % 4 == 0, f"width {d} must divide by 4: half of it encodes the row, half the column")
        check(
            not self.use_rope or (d // k) % 4 == 0,
            f"head width {d // k} (width {d} / num_heads {k}) must divide by 4 with use_rope",
        )
        check(
            self.input_size % self.patch_size == 0,
            f"input_size {self.input_size} does not divide by patch_size {self.patch_size}",
        )
        check(
            not self.repa_features or self.repa_depth <= self.depth,
            f"repa_depth {self.repa_depth} must lie in 1..depth ({self.depth})",
        )
        check_dtype(self.compute_dtype)

    @property
    def kept_by_dots(self) -> int:
        """Return the bytes of one row that the blocks keep with remat "dots": the outputs of matmuls with weights."""
        hidden = int(self.width * self.mlp_ratio)
        wide = 2 * int(2 / 3 * hidden) if self.use_swiglu else hidden
        tokens = (self.input_size // self.patch_size) ** 2
        features = 5 * self.width + wide  # qkv, proj, w12, w3
        return self.depth * tokens * features * jnp.dtype(self.compute_dtype).itemsize


def dit_config(size: str, **overrides) -> DiTConfig:
    """Return the config of a released size ("S", "B", "L", "XL", "1p0B", "1p6B").

    Raises:
      SfdError: no such size, or an override that is not a field of DiTConfig.
    """
    if size not in SIZES:
        raise SfdError(f"no LightningDiT size '{size}': {nearest(size, SIZES)}")
    fields = {field.name for field in dataclasses.fields(DiTConfig)}
    for key in overrides:
        check(key in fields, f"DiTConfig has no field '{key}': {nearest(key, fields)}")
    return DiTConfig(**{**SIZES[size], **overrides})


class LightningDiT(nnx.Module):
    """Predict the velocity of a latent; a freshly initialised network returns zero."""

    execution = PLAIN

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        self.patch_embed = PatchEmbed(c.patch_size, c.in_channels, c.width, rngs=rngs)
        if c.two_clocks:
            self.time_embed_semantic = TimeEmbed(c.width // 2, rngs=rngs)
            self.time_embed_texture = TimeEmbed(c.width // 2, rngs=rngs)
        else:
            self.time_embed = TimeEmbed(c.width, rngs=rngs)
        if c.end_time and c.two_clocks:
            self.way_embed_semantic = TimeEmbed(c.width // 2, rngs=rngs, zero=True)
            self.way_embed_texture = TimeEmbed(c.width // 2, rngs=rngs, zero=True)
        elif c.end_time:
            self.way_embed = TimeEmbed(c.width, rngs=rngs, zero=True)
        rows = c.num_classes + int(c.null_label)
        self.label_embed = nnx.Embed(rows, c.width, embedding_init=normal(0.02), rngs=rngs)
        self.blocks = stack(lambda rngs: Block(c, rngs=rngs), c.depth, rngs)
        self.final = FinalLayer(c, rngs=rngs)
        if c.repa_features:
            projector = {"mlp": MlpProjector, "conv": ConvProjector}[c.repa_projector]
            self.repa_projector = projector(c, rngs=rngs)

    def __call__(
        self,
        latents: jax.Array,
        t_semantic: jax.Array,
        t_texture: jax.Array,
        labels: jax.Array,
        ends: tuple[jax.Array, jax.Array] | None = None,
        *,
        return_repa: bool = False,
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        """Predict the velocity, or with `ends` the mean velocity of each group until its clock's end.

        Args:
          latents: (B, H, W, C), texture first, on the path between noise and data.
          t_semantic, t_texture: (B,) in [0, 1]; a single-clock network reads only t_texture.
          labels: (B,) int32 in [0, num_classes], the last being the null label.
          ends: the clocks (semantic, texture) at the end of the interval, (B,) each; needs `end_time`. None is the
            interval of length 0, where the mean velocity is the velocity.
          return_repa: also return the projected hidden states.

        Returns:
          velocity (B, H, W, C) float32; with `return_repa` the pair (velocity, repa (B, N, F)).

        Raises:
          SfdError: latents of another grid or channel count, `return_repa` without a projector, or `ends` without
            `end_time`.
        """
        c = self.config
        expected = (c.input_size, c.input_size, c.in_channels)
        check(
            latents.shape[1:] == expected,
            f"latents are {latents.shape}; this network is built for (B, H, W, C) = (B, {expected})",
        )
        check(
            not return_repa or c.repa_features > 0,
            "this network has no REPA projector: set repa_features",
        )
        check(ends is None or c.end_time, "this network has no embedding of the interval's end: set end_time")
        grid = c.input_size // c.patch_size
        tokens = self.patch_embed(latents.astype(jnp.float32))
        tokens = tokens + sincos_2d(c.width, grid)[None]
        condition = self._embed_times(t_semantic, t_texture) + self.label_embed(labels)
        if c.end_time:
            end_semantic, end_texture = (t_semantic, t_texture) if ends is None else ends
            condition = condition + self._embed_ways(end_semantic - t_semantic, end_texture - t_texture)
        condition = jax.nn.silu(condition)
        rotary = rotary_2d(c.width // c.num_heads, grid) if c.use_rope else None

        run = functools.partial(run_stack, self.blocks, self.execution, extras=(condition, rotary))
        if return_repa:
            # Two loops around the depth that REPA reads: carrying a copy through one loop instead
            # would double what the backward pass keeps.
            tokens = run(tokens, stop=c.repa_depth)
            repa = self.repa_projector(tokens)
            tokens = run(tokens, start=c.repa_depth)
        else:
            tokens = run(tokens)

        velocity = unpatchify(self.final(tokens, condition), grid, c.patch_size)
        velocity = velocity[..., : c.in_channels]  # drops what learn_sigma added
        return (velocity, repa) if return_repa else velocity

    def _embed_times(self, t_semantic, t_texture):
        if self.config.time_input == "ddpm_step":  # see DDPMPath; the data are one step before step 0
            t_semantic, t_texture = (jnp.maximum(1000 * (1 - t) - 1, 0) for t in (t_semantic, t_texture))
        if not self.config.two_clocks:
            return self.time_embed(t_texture)
        halves = [self.time_embed_semantic(t_semantic), self.time_embed_texture(t_texture)]
        return jnp.concatenate(halves, axis=-1)

    def _embed_ways(self, semantic, texture):
        if not self.config.two_clocks:
            return self.way_embed(texture)
        return jnp.concatenate([self.way_embed_semantic(semantic), self.way_embed_texture(texture)], axis=-1)


class TimeEmbed(nnx.Module):
    """Embed a clock: 256 sinusoidal features, Linear, SiLU, Linear; float32. With `zero` it starts as zero."""

    def __init__(self, width: int, *, rngs: nnx.Rngs, zero: bool = False):
        self.linear1 = dense(256, width, rngs=rngs, init=normal(0.02))
        self.linear2 = dense(width, width, rngs=rngs, init=ZEROS if zero else normal(0.02))

    def __call__(self, t: jax.Array) -> jax.Array:
        return self.linear2(jax.nn.silu(self.linear1(time_features(t, 256))))


class Block(nnx.Module):
    """Attention and MLP, each normalised, modulated by the condition and gated (adaLN-zero)."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        c = config
        dtype = jnp.dtype(c.compute_dtype)
        hidden = int(c.width * c.mlp_ratio)
        self.use_shift = c.use_shift
        self.norm1 = block_norm(c, rngs)
        self.norm2 = block_norm(c, rngs)
        self.attention = SelfAttention(
            c.width,
            c.num_heads,
            make_norm=functools.partial(head_norm, c) if c.use_qknorm else None,
            rngs=rngs,
            dtype=dtype,
        )
        if c.use_swiglu:
            self.mlp = SwiGlu(c.width, int(2 / 3 * hidden), rngs=rngs, dtype=dtype)
        else:
            self.mlp = Mlp(c.width, hidden, gelu_tanh, rngs=rngs, dtype=dtype)
        parts = 6 if c.use_shift else 4
        self.modulation = dense(c.width, parts * c.width, rngs=rngs, init=ZEROS)

    def __call__(self, tokens: jax.Array, condition: jax.Array, rotary: Rotary | None) -> jax.Array:
        """Map tokens (B, N, D) float32 under the condition (B, D), already through SiLU."""
        modulation = self.modulation(condition)[:, None, :]
        if self.use_shift:
            shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(modulation, 6, axis=-1)
        else:
            scale1, gate1, scale2, gate2 = jnp.split(modulation, 4, axis=-1)
            shift1 = shift2 = jnp.zeros_like(scale1)
        x = self.norm1(tokens) * (1 + scale1) + shift1
        tokens = tokens + gate1 * self.attention(x, rotary)
        x = self.norm2(tokens) * (1 + scale2) + shift2
        return tokens + gate2 * self.mlp(x)


class FinalLayer(nnx.Module):
    """Normalise, modulate and project tokens (B, N, D) to patches (B, N, P*P*C), float32."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        c = config
        channels = c.in_channels * (2 if c.learn_sigma else 1)
        self.norm = block_norm(c, rngs)
        self.modulation = dense(c.width, 2 * c.width, rngs=rngs, init=ZEROS)
        self.linear = dense(c.width, c.patch_size**2 * channels, rngs=rngs, init=ZEROS)

    def __call__(self, tokens: jax.Array, condition: jax.Array) -> jax.Array:
        shift, scale = jnp.split(self.modulation(condition)[:, None, :], 2, axis=-1)
        return self.linear(self.norm(tokens) * (1 + scale) + shift)


class MlpProjector(nnx.Module):
    """Project hidden states (B, N, D) to the visual encoder's features (B, N, F); training only."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        c = config
        dtype = jnp.dtype(c.compute_dtype)
        self.linear1 = dense(c.width, c.repa_width, rngs=rngs, dtype=dtype)
        self.linear2 = dense(c.repa_width, c.repa_width, rngs=rngs, dtype=dtype)
        self.linear3 = dense(c.repa_width, c.repa_features, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jax.nn.silu(self.linear2(jax.nn.silu(self.linear1(x))))
        return self.linear3(x).astype(jnp.float32)


class ConvProjector(nnx.Module):
    """Project as `MlpProjector` does, by a 3x3 convolution over the square token grid with a border of zeros."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        c = config
        self.conv = conv(c.width, c.repa_features, 3, rngs=rngs, dtype=jnp.dtype(c.compute_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        b, n, d = x.shape
        grid = math.isqrt(n)
        return self.conv(x.reshape(b, grid, grid, d)).reshape(b, n, -1).astype(jnp.float32)


def head_norm(config: DiTConfig, head_width: int, rngs: nnx.Rngs) -> nnx.RMSNorm | nnx.LayerNorm:
    """Build the norm of queries or keys; LayerNorm here has parameters and PyTorch's epsilon."""
    if config.use_rmsnorm:
        return rms_norm(head_width, rngs=rngs)
    return layer_norm(head_width, rngs=rngs, epsilon=1e-5)


def block_norm(config: DiTConfig, rngs: nnx.Rngs) -> nnx.RMSNorm | nnx.LayerNorm:
    """Build the norm before a modulation: RMSNorm with scale, or LayerNorm without parameters."""
    if config.use_rmsnorm:
        return rms_norm(config.width, rngs=rngs)
    return layer_norm(config.width, rngs=rngs, affine=False)
