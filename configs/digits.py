"""Handwritten digits: the whole SFD pipeline on a laptop, from real images to new ones.

Data:     the 1,797 real digits of scikit-learn (8x8 grey levels), as 32x32 RGB images;
          a fixed 1,437 / 360 train / held-out split; nothing is downloaded.
Method:   arXiv 2512.04926 as released, every stage is the general code with a small network.
Hardware: two CPU cores, under 6 GiB of memory.
Expected: docs/demo.md, "What the demo should print".
Command:  bash scripts/demo.sh    or    sfd demo --config=configs/digits.py --workdir=demo_out

With "tiny" in the argument every stage takes a few steps, for tests; the samples are noise. With "study" the diffusion
model is that of scripts/experiments/: constant learning rate as released, no guidance, stopped before it is saturated.
"""

import runpy
from pathlib import Path

import ml_collections

from sfd_jax.data.extract import ExtractConfig
from sfd_jax.diffusion.sample_config import SampleJob
from sfd_jax.settings import config_group

_sfd = runpy.run_path(str(Path(__file__).with_name("sfd.py")))


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """Return the configuration of the demo; `argument` is "", or variants with commas between."""
    variants = variants_of(argument)
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.data = ml_collections.ConfigDict(dict(kind="digits", path="", image_size=32))
    config.mesh = ml_collections.ConfigDict(dict(data=-1, fsdp=1))

    config.texture_vae = _stage(
        steps=600,
        batch=32,
        learning_rate=3e-3,
        model=dict(ch=8, ch_mult=(1, 2, 4, 4), num_res_blocks=1, z_channels=8, norm_groups=8, variant="ldm"),
        loss=dict(kl_weight=1e-5, l1_weight=1.0, mse_weight=1.0),
    )
    config.encoder = _stage(
        steps=400,
        batch=128,
        learning_rate=1e-3,
        model=dict(image_size=32, patch_size=8, width=128, depth=4, num_heads=4, num_registers=4),
        loss=dict(num_classes=10, label_smoothing=0.1, shift=2),
    )
    config.semantic_vae = _stage(
        steps=300,
        batch=64,
        learning_rate=1e-3,
        model=dict(
            arch="transformer",
            input_dim=128,
            bottleneck_dim=8,
            hidden_dim=128,
            transformer_blocks=2,
            transformer_heads=4,
        ),
        # The released weights: MSE 1, L1 0, cosine 1 over the token axis, KL 1e-7.
        loss=dict(mse_weight=1.0, l1_weight=0.0, cosine_weight=1.0, kl_weight=1e-7, cosine_axis="token"),
    )
    config.extract = config_group(
        ExtractConfig(
            image_size=32,
            tile_size=32,
            flips=False,  # a mirrored digit is not a digit
            repa=True,
            batch_size=128,
            shard_size=512,
            dtype="float32",
        )
    )

    config.diffusion = _diffusion(width=128, depth=6, num_heads=4, repa_depth=2, steps=1000)
    config.weak = _diffusion(width=64, depth=3, num_heads=2, repa_depth=1, steps=300)
    config.sample = config_group(
        SampleJob(num=1000, batch_size=250, atol=1e-3, rtol=1e-2, guidance="autoguidance", guidance_scale=1.5)
    )
    if "study" in variants:
        make_study(config, steps=400)
    if "tiny" in variants:
        _shrink(config)
    return config.lock()


def variants_of(argument: str) -> set[str]:
    """Return the variants that an argument names: "study", "tiny"."""
    variants = set(filter(None, argument.split(",")))
    if unknown := sorted(variants - {"study", "tiny"}):
        raise ValueError(f"unknown variant '{unknown[0]}'; variants: study, tiny")
    return variants


def make_study(config: ml_collections.ConfigDict, steps: int) -> None:
    """Train the diffusion model for studies: `steps` at a constant rate, with five checkpoints to score."""
    config.diffusion.optimizer.update(dict(schedule="constant", learning_rate=1e-3))
    every = steps // 5
    config.diffusion.train.update(dict(steps=steps, ema_decay=0.98, keep_every=every, checkpoint_every=every))
    config.sample.update(dict(guidance="none", guidance_scale=1.0))


def _stage(*, steps, batch, learning_rate, model, loss) -> ml_collections.ConfigDict:
    """Return a training stage in the shape of configs/sfd.py: model, loss, optimizer, train."""
    stage = ml_collections.ConfigDict()
    stage.model = model
    stage.loss = loss
    stage.optimizer = _sfd["get_config"]("s").optimizer.copy_and_resolve_references()
    stage.train = _sfd["get_config"]("s").train.copy_and_resolve_references()
    stage.optimizer.unlock()
    stage.train.unlock()
    stage.optimizer.update(dict(learning_rate=learning_rate, schedule="cosine", warmup_steps=20, clip_norm=1.0))
    stage.train.update(
        dict(
            steps=steps,
            global_batch_size=batch,
            ema_decay=0.99,
            log_every=50,
            checkpoint_every=100,
            keep_last=1,
            keep_every=0,
        )
    )
    return stage


def _diffusion(*, width, depth, num_heads, repa_depth, steps) -> ml_collections.ConfigDict:
    """Return the released recipe (configs/sfd.py) with the digits' sizes."""
    config = _sfd["get_config"]("s").copy_and_resolve_references()
    config.unlock()
    del config.sample, config.mesh, config.data, config.seed
    config.model.update(
        dict(
            width=width,
            depth=depth,
            num_heads=num_heads,
            input_size=4,
            num_classes=10,
            repa_features=128,
            repa_depth=repa_depth,
            repa_width=256,
            mlp_ratio=3.0,
            scan_blocks=False,  # few blocks run faster unrolled on a CPU
            remat="none",
            compute_dtype="float32",
        )
    )
    config.latents.update(dict(texture_channels=8, semantic_channels=8))
    config.optimizer.update(dict(learning_rate=2e-3, schedule="cosine", warmup_steps=50, clip_norm=1.0))
    config.train.update(
        dict(
            steps=steps,
            global_batch_size=64,
            ema_decay=0.99,
            log_every=50,
            checkpoint_every=100,
            keep_last=1,
            keep_every=0,
        )
    )
    return config


def _shrink(config: ml_collections.ConfigDict) -> None:
    """Keep every stage and shrink its sizes and steps."""
    for name in ("texture_vae", "encoder", "semantic_vae", "diffusion", "weak"):
        config[name].optimizer.warmup_steps = 1
        config[name].train.update(dict(steps=4, global_batch_size=16, log_every=2, checkpoint_every=2))
        config[name].train.keep_every = min(config[name].train.keep_every, 2)
    levels = len(config.texture_vae.model.ch_mult)
    config.texture_vae.model.update(dict(ch=8, ch_mult=(1,) * levels, norm_groups=4))
    config.encoder.model.update(dict(width=32, depth=1))
    config.semantic_vae.model.update(dict(input_dim=32, hidden_dim=32, transformer_blocks=1))
    for name in ("diffusion", "weak"):
        model = dict(width=48, depth=1, num_heads=3, repa_features=32, repa_width=32, repa_depth=1)
        config[name].model.update(model)
        config[name].optimizer.schedule = "constant"
    config.weak.train.steps = 2  # this alone makes it weaker, so both take the same compiled step
    config.sample.update(dict(num=40, batch_size=20, solver="euler", num_steps=12))
