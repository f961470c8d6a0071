"""LightningDiT in plain PyTorch, for comparison with ours: a careful PyTorch implementation.

The same network as `sfd_jax/models/lightning_dit.py` (RMSNorm, SwiGLU, rotary embedding, q/k norm, two clocks,
REPA's projector), with the released state dict's keys, so that our converter's export loads into it. It uses PyTorch's
fast paths: fused scaled-dot-product attention, fused RMSNorm, and by the caller torch.compile and autocast.

Norms, rotary embedding, modulation and residual stream are float32 as in ours; with `dtype=bfloat16` the matmuls
inside the blocks run in bfloat16. Shapes: latents (B, C, H, W) as PyTorch has them; N tokens, D width, K heads.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


class TorchDiT(nn.Module):
    """Predict the velocity of latents (B, C, H, W) from two clocks and labels.

    Args:
      config: a `sfd_jax.models.DiTConfig` with two clocks, q/k norm, SwiGLU, rotary embedding, RMSNorm and shift,
        without learn_sigma (the SFD models).
    """

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        grid = c.input_size // c.patch_size
        self.x_embedder = nn.Module()
        self.x_embedder.proj = nn.Conv2d(c.in_channels, c.width, c.patch_size, c.patch_size)
        self.t_embedder_sem, self.t_embedder_tex = TimeEmbed(c.width // 2), TimeEmbed(c.width // 2)
        self.y_embedder = nn.Module()
        self.y_embedder.embedding_table = nn.Embedding(c.num_classes + int(c.null_label), c.width)
        self.register_buffer("pos_embed", torch.zeros(1, grid * grid, c.width))
        self.feat_rope = nn.Module()
        for name in ("freqs_cos", "freqs_sin"):
            self.feat_rope.register_buffer(name, torch.zeros(grid * grid, c.width // c.num_heads))
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.depth))
        self.final_layer = FinalLayer(c)
        if c.repa_features:
            sizes = (c.width, c.repa_width, c.repa_width, c.repa_features)
            first, second, third = (nn.Linear(a, b) for a, b in zip(sizes[:-1], sizes[1:], strict=True))
            self.repa_projector = nn.Sequential(first, nn.SiLU(), second, nn.SiLU(), third)

    def forward(self, latents, t_semantic, t_texture, labels, return_repa=False):
        c = self.config
        tokens = self.x_embedder.proj(latents).flatten(2).transpose(1, 2) + self.pos_embed
        clocks = torch.cat([self.t_embedder_sem(t_semantic), self.t_embedder_tex(t_texture)], dim=-1)
        condition = F.silu(clocks + self.y_embedder.embedding_table(labels))
        rotary = self.feat_rope.freqs_cos, self.feat_rope.freqs_sin
        repa = None
        for depth, block in enumerate(self.blocks, start=1):
            tokens = block(tokens, condition, rotary)
            if return_repa and depth == c.repa_depth:
                with autocast(c, tokens):
                    repa = self.repa_projector(tokens)
                repa = repa.float()
        patches = self.final_layer(tokens, condition)
        grid, p = c.input_size // c.patch_size, c.patch_size
        patches = patches.reshape(-1, grid, grid, p, p, c.in_channels).permute(0, 5, 1, 3, 2, 4)
        velocity = patches.reshape(-1, c.in_channels, c.input_size, c.input_size)
        return (velocity, repa) if return_repa else velocity


def torch_module(network, params):
    """Return a TorchDiT with our parameters, through the converter of `sfd convert`."""
    from sfd_jax.convert.lightning_dit import TABLE
    from sfd_jax.convert.table import export_state

    module = TorchDiT(network.config)
    state = export_state(TABLE, params, network)
    module.load_state_dict({key: torch.from_numpy(array) for key, array in state.items()})
    return module


def autocast(config, tensor):
    """Return the context in which Linear layers and attention compute in `config.compute_dtype`."""
    return torch.autocast(tensor.device.type, torch.bfloat16, enabled=config.compute_dtype == "bfloat16")


class TimeEmbed(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        omega = torch.exp(-math.log(10000.0) * torch.arange(128, dtype=torch.float32) / 128)
        self.register_buffer("omega", omega, persistent=False)

    def forward(self, t):
        angles = t[:, None] * self.omega
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.norm1, self.norm2 = nn.RMSNorm(c.width, eps=1e-6), nn.RMSNorm(c.width, eps=1e-6)
        self.attn = Attention(c)
        hidden = int(2 / 3 * int(c.width * c.mlp_ratio))
        self.mlp = nn.Module()
        self.mlp.w12, self.mlp.w3 = nn.Linear(c.width, 2 * hidden), nn.Linear(hidden, c.width)
        self.adaLN_modulation = nn.Sequential(nn.Identity(), nn.Linear(c.width, 6 * c.width))

    def forward(self, tokens, condition, rotary):
        modulation = self.adaLN_modulation(condition)[:, None]
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
        x = self.norm1(tokens) * (1 + scale1) + shift1
        with autocast(self.config, x):
            x = self.attn(x, rotary)
        tokens = tokens + gate1 * x
        x = self.norm2(tokens) * (1 + scale2) + shift2
        with autocast(self.config, x):
            gate, value = self.mlp.w12(x).chunk(2, dim=-1)
            x = self.mlp.w3(F.silu(gate) * value)
        return tokens + gate2 * x


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        c = config
        self.num_heads, head = c.num_heads, c.width // c.num_heads
        self.qkv, self.proj = nn.Linear(c.width, 3 * c.width), nn.Linear(c.width, c.width)
        self.q_norm, self.k_norm = nn.RMSNorm(head, eps=1e-6), nn.RMSNorm(head, eps=1e-6)

    def forward(self, x, rotary):
        b, n, d = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)  # (B, K, N, E)
        query, key = rotate(self.q_norm(query.float()), rotary), rotate(self.k_norm(key.float()), rotary)
        out = F.scaled_dot_product_attention(query.to(value.dtype), key.to(value.dtype), value)
        return self.proj(out.transpose(1, 2).reshape(b, n, d))


def rotate(x, rotary):
    """Rotate neighbouring pairs of the last axis of (B, K, N, E)."""
    cos, sin = rotary
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack([-odd, even], dim=-1).flatten(-2) * sin


class FinalLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        c = config
        self.norm_final = nn.RMSNorm(c.width, eps=1e-6)
        self.linear = nn.Linear(c.width, c.patch_size**2 * c.in_channels)
        self.adaLN_modulation = nn.Sequential(nn.Identity(), nn.Linear(c.width, 2 * c.width))

    def forward(self, tokens, condition):
        shift, scale = self.adaLN_modulation(condition)[:, None].chunk(2, dim=-1)
        return self.linear(self.norm_final(tokens) * (1 + scale) + shift)
