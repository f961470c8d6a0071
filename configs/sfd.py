"""Semantic-First Diffusion on ImageNet 256x256: the released recipe.

Paper:    arXiv 2512.04926 (CVPR 2026), final runs: 80 epochs = 400k steps, 800 epochs = 4M steps.
Hardware: released on GPUs; here a TPU slice from v5e:2x2 up, or GPUs. `sfd plan` estimates the needs of a slice;
          docs/pods.md has the memory per chip for several slices.
Expected: FID-50k, balanced labels, released numbers (not ours), without guidance / with AutoGuidance
          xl    80 epochs 3.43 / 1.30 (weak model b at  70k steps, scale 1.6)
          xl   800 epochs 2.54 / 1.06 (weak model b at  70k steps, scale 1.5)
          1p0b  80 epochs 2.84 / 1.19 (weak model b at  60k steps, scale 1.5)
          1p0b 800 epochs 2.38 / 1.04 (weak model b at 120k steps, scale 1.5)
          FID without guidance of the ablations, size xl with lr2e4, 80 epochs:
          plain 8.17, repa 7.08, synchronous 5.24, semantics first 3.03 (delta_t=1: 5.41), pca 4.06;
          redi,synchronous 5.33, redi 4.41; with VA-VAE's texture latents synchronous 4.52, semantics first 4.14
          dit 9.62, with CFG 2.27 (scale 1.5): table 2 of the DiT paper, DiT-XL/2 after 7M steps
Command:  sfd train --config=configs/sfd.py:xl --workdir=runs/xl --config.data.path=latents/train

The argument is a size (s, b, l, xl, 1p0b, 1p6b), or `small`: the recipe for a laptop or one GPU and for latents of the
other `small` configs (docs/your_own_images.md), with classes and grid of the latents; then, after commas, any of
  lr2e4  the "80 epochs, lr 2e-4" recipe: beta2 0.95, REPA weight 0.5 by the mean of cosine and MSE;
  weak   the AutoGuidance model: stops at 70k steps (small: half as wide and deep, a quarter of the steps);
  dinov3, dinov3_s, dinov3_l, siglip2, clip, mae
         REPA with the features of that encoder, computed from images; `sfd fetch NAME` downloads it;
  synchronous
         one clock for both groups (another lead: --config.clocks.delta_t=0.5);
  learned_clocks
         learn the pair of clocks with a small network first (docs/learned_clocks.md), 0.06 % of the FLOPs for xl;
  plain  LightningDiT: the texture latent alone, without REPA; repa: the same with REPA;
  pca    8 principal components of the features instead of the Semantic VAE (`sfd extract --pca=8`);
  redi   ReDi: pca without REPA, as ReDi was published;
  dit    DiT (arXiv 2212.09748): its blocks, patch 2, and noise prediction along DDPM's schedule on the texture latent
         of an f8 VAE with 4 channels. Unlike there, time is continuous and the learned sigma is not trained;
  512    images of 512 px: twice the latent grid, four times the tokens (docs/data.md);
  irepa  iREPA (arXiv 2512.10794): a convolution as projector, spatially normalised features (docs/repa.md);
  few_step
         distils a trained model, --config.teacher=CKPT [--config.weak=CKPT], into one that samples in 1 to 4 network
         evaluations (docs/few_step.md); the network is the teacher's;
  tiny   the same recipe at tiny sizes, for tests and laptops.
"""

import ml_collections
from ml_collections.config_dict import placeholder

from sfd_jax.convert.hub import cache_dir
from sfd_jax.diffusion.few_step import FewStepConfig
from sfd_jax.diffusion.learned_clocks import Learned
from sfd_jax.diffusion.sample_config import SampleJob
from sfd_jax.experiment.previews import PreviewConfig
from sfd_jax.models.encoders import RELEASED, released_encoder
from sfd_jax.settings import config_group, part_group
from sfd_jax.training.probe import ProbeConfig

SIZES = ("s", "b", "l", "xl", "1p0b", "1p6b")
SMALL = "small"
TEXTURE_ALONE = ("plain", "repa", "dit")
WITHOUT_REPA = ("plain", "redi", "dit")
VARIANTS = ("lr2e4", "weak", "512", "irepa", "tiny", "synchronous", "learned_clocks", "plain", "repa", "pca", "redi")
VARIANTS += ("dit", "few_step", *RELEASED)
# At most one of each row: the others contradict it.
EXCLUSIVE = (
    tuple(RELEASED),
    ("plain", "repa", "pca", "redi", "dit"),
    *((clocks, system) for clocks in ("synchronous", "learned_clocks") for system in TEXTURE_ALONE),
    ("synchronous", "learned_clocks"),
    *((encoder, system) for encoder in (*RELEASED, "irepa") for system in WITHOUT_REPA),
    *((variant, "few_step") for variant in (*RELEASED, "irepa", "weak", "dit", "learned_clocks")),
)


def get_config(argument: str = "xl") -> ml_collections.ConfigDict:
    """Return the configuration for a size and variants, e.g. "xl", "b,weak", "small" or "xl,tiny"."""
    size, *variants = argument.lower().split(",")
    if size not in (*SIZES, SMALL):
        raise ValueError(f"unknown size '{size}' in '{argument}'; sizes: {', '.join(SIZES)}, {SMALL}")
    for variant in variants:
        if variant not in VARIANTS:
            raise ValueError(f"unknown variant '{variant}' in '{argument}'; variants: {', '.join(VARIANTS)}")
    for row in EXCLUSIVE:
        if len(both := [name for name in row if name in variants]) > 1:
            raise ValueError(f"'{argument}': {' and '.join(both)} contradict each other, give one of them")

    config = ml_collections.ConfigDict()
    config.seed = 0

    # --- Network -------------------------------------------------------------------------------------
    config.model = ml_collections.ConfigDict(
        dict(
            size="S" if size == SMALL else size.replace("b", "B") if size[0] == "1" else size.upper(),
            input_size=16,  # latent grid side, in latent pixels
            patch_size=1,
            num_classes=1000,
            two_clocks=True,
            time_input="clock",  # clock | ddpm_step (DiT)
            use_qknorm=True,
            use_swiglu=True,
            use_rope=True,
            use_rmsnorm=True,
            use_shift=True,
            repa_features=768,  # width of DINOv2 ViT-B/14; 0 builds no projector
            repa_depth=2,  # blocks before the projector
            repa_projector="mlp",  # mlp | conv (iREPA)
            repa_width=2048,
            scan_blocks=ml_collections.config_dict.placeholder(bool),  # None: one loop, but unrolled on a GPU
            fused_attention=True,  # where the devices have a kernel that is faster (docs/performance.md)
            remat="auto",  # none | dots | full: what the backward pass recomputes; auto: what fits
            compute_dtype="bfloat16",
        )
    )
    config.latents = ml_collections.ConfigDict(dict(texture_channels=32, semantic_channels=16))

    # --- Method --------------------------------------------------------------------------------------
    # fixed_offset | synchronous | sequential, or custom ones (docs/extend.md), each with its own settings.
    config.clocks = ml_collections.ConfigDict(dict(name="fixed_offset", delta_t=0.3))
    config.loss = ml_collections.ConfigDict(
        dict(
            semantic_weight=2.0,
            cosine_weight=1.0,
            repa_weight=1.0,
            repa_kind="cos",  # cos | mse | cos_mse
            repa_spatial_norm=0.0,  # gamma of iREPA's normalisation of the features; 0: none
            time="logit_normal",  # logit_normal (released) | uniform (paper)
            label_dropout=0.1,
            terms={},  # custom terms, name -> settings: docs/extend.md
        )
    )

    # --- Optimisation: counts are optimizer steps ------------------------------------------------------
    config.optimizer = ml_collections.ConfigDict(
        dict(
            learning_rate=1e-4,
            b1=0.9,
            b2=0.999,
            eps=1e-8,
            weight_decay=0.0,
            schedule="constant",
            warmup_steps=0,
            # Largest norm of the gradient; 0, as released: no clipping. Where the loss jumps (bfloat16, a large
            # learning rate) 1.0 is usual; `grad_norm` in the log shows how often it would act.
            clip_norm=0.0,
            # "bfloat16" takes two bytes a parameter less.
            first_moment_dtype="float32",
        )
    )
    config.train = ml_collections.ConfigDict(
        dict(
            steps=400_000,
            global_batch_size=256,
            accumulation=1,
            ema_decay=0.9999,
            average_on_host=False,
            log_every=100,
            checkpoint_every=5_000,
            keep_last=2,
            keep_every=50_000,
            max_bad_steps=20,  # non-finite steps in a row before the run stops
            wandb="",  # a project: metrics also go to Weights & Biases
        )
    )
    # -1: all devices that the other axis leaves; both -1: see make_mesh.
    config.mesh = ml_collections.ConfigDict(dict(data=-1, fsdp=-1))
    config.data = ml_collections.ConfigDict(
        dict(
            path="",  # folder of latent shards, written by `sfd extract`
            workers=8,
            flips=True,
            repa_source="stored",  # stored | semvae | online: the source of REPA's targets (docs/repa.md)
            semantic_vae="",  # checkpoint, for semvae
            visual_encoder="",  # checkpoint of a visual encoder, for online
            tile_grid=placeholder(int),  # side of the visual encoder's tiles, in latent pixels; None: as extracted
            # For online: the images that the latents were made from.
            images=dict(kind="folder", path="", split="train", image_size=256),
        )
    )

    # --- Sampling ------------------------------------------------------------------------------------
    # Defaults of `sfd sample` with this model; `sfd sample --help` explains each. On the digits, staged dopri5 has
    # converged with 31 network evaluations, Euler with 100 nearly; on XL, Euler-100 scores as well as the released
    # dopri5 (docs/sampling.md).
    config.sample = config_group(SampleJob(batch_size=64, guidance="autoguidance", guidance_scale=1.5))
    # Samples and scores at some checkpoints: docs/training.md, "Watching a run".
    config.preview = config_group(PreviewConfig())

    if size == SMALL:
        _make_small(config, weak="weak" in variants)
    if "lr2e4" in variants:
        config.optimizer.learning_rate = 2e-4
        config.optimizer.b2 = 0.95
        config.loss.repa_weight = 0.5
        config.loss.repa_kind = "cos_mse"
    if "irepa" in variants:
        config.model.repa_projector = "conv"
        config.loss.repa_spatial_norm = 0.6
    for encoder in RELEASED.keys() & variants:
        config.model.repa_features = released_encoder(encoder).config.feature_width
        config.data.update(dict(repa_source="online", visual_encoder=str(cache_dir() / encoder)))
    if "learned_clocks" in variants:
        learn_clocks(config, small=size == SMALL)
    _choose_system(config, variants, sizes=size != SMALL)
    if "512" in variants and size != SMALL:  # small takes the grid of its latents
        config.model.input_size *= 2
        config.data.images.image_size = 512
    if "weak" in variants and size != SMALL:
        config.train.steps = 70_000
        config.train.keep_every = 10_000
    if "few_step" in variants:
        _make_few_step(config)
    if "tiny" in variants:
        _shrink(config)
    return config.lock()


def learn_clocks(config: ml_collections.ConfigDict, *, small: bool) -> None:
    """Learn the clocks first; the probe takes 0.06 % of xl's training FLOPs, or 4 % of a small model's."""
    config.clocks = part_group(Learned, name="learned")  # the curve at the start
    config.probe = config_group(ProbeConfig())
    if small:
        config.probe.update(dict(width=64, depth=2, num_heads=2, steps=500, global_batch_size=64))
        config.probe.update(dict(learning_rate=2e-3, curve_learning_rate=6e-2))


def _choose_system(config: ml_collections.ConfigDict, variants: list[str], sizes: bool) -> None:
    """Change SFD to another row of the published tables; with `sizes` also to the sizes of its latents."""
    if {"synchronous", *TEXTURE_ALONE} & {*variants}:
        config.model.two_clocks = False
        config.clocks = ml_collections.ConfigDict(dict(name="synchronous"))
    if {*TEXTURE_ALONE} & {*variants}:
        config.latents.semantic_channels = 0
    if {*WITHOUT_REPA} & {*variants}:
        config.model.repa_features = 0
        config.loss.repa_weight = 0.0
    if {"pca", "redi"} & {*variants}:
        config.latents.semantic_channels = 8
    if "dit" in variants:
        config.model.update(dict(use_qknorm=False, use_swiglu=False, use_rope=False, use_rmsnorm=False))
        config.model.update(dict(learn_sigma=True, time_input="ddpm_step"))
        config.loss.update(dict(cosine_weight=0.0, time="uniform", path=dict(name="ddpm")))
        config.loss.prediction = dict(name="noise")
        config.sample.guidance = "cfg"
        if sizes:
            config.latents.texture_channels = 4
            config.model.update(dict(input_size=32, patch_size=2))
            config.train.steps = 7_000_000


def _make_few_step(config: ml_collections.ConfigDict) -> None:
    """Learn the mean velocities of a teacher's flow instead of the velocities of the data."""
    config.teacher, config.weak = "", ""  # checkpoints; `weak` guides the teacher
    config.few_step = config_group(FewStepConfig())
    config.model.update(dict(end_time=True, null_label=True, repa_features=0))
    config.loss.update(dict(repa_weight=0.0, label_dropout=0.0))
    config.sample = config_group(SampleJob(batch_size=config.sample.batch_size, solver="few_step", nfe=4))


def _make_small(config: ml_collections.ConfigDict, weak: bool) -> None:
    """Keep the method, and take sizes and counts for a few thousand small images on a laptop."""
    width, depth, num_heads, steps = (96, 3, 3, 250) if weak else (192, 6, 6, 1000)
    config.model.update(dict(width=width, depth=depth, num_heads=num_heads))
    # As the latents have them.
    config.model.update(dict(num_classes=placeholder(int), input_size=placeholder(int)))
    config.model.update(dict(repa_features=128, repa_depth=2, repa_width=256))
    # Few blocks: unrolled they run faster on a processor.
    config.model.update(dict(scan_blocks=False, remat="none", compute_dtype="float32"))
    config.latents.update(dict(texture_channels=8, semantic_channels=8))
    config.optimizer.update(dict(learning_rate=1e-3, warmup_steps=50, clip_norm=1.0))
    # The average after n steps holds ema_decay^n of the first weights: with 1 - 5/n that is 0.7 %.
    config.train.update(dict(steps=steps, global_batch_size=64, ema_decay=1 - 5 / steps))
    config.train.update(dict(log_every=50, checkpoint_every=250, keep_last=1, keep_every=0))
    config.data.workers = 0
    config.data.images.image_size = 32
    config.sample.update(dict(num=100, guidance="cfg", atol=1e-3, rtol=1e-2))


def _shrink(config: ml_collections.ConfigDict) -> None:
    """Shrink all sizes and keep all options of the recipe."""
    with config.unlocked():
        config.model.update(dict(width=48, depth=3, num_heads=4, input_size=4, num_classes=10, repa_width=32))
        config.model.repa_features = 24 if config.model.repa_features else 0
        config.latents.update(dict(texture_channels=8, semantic_channels=4 if config.latents.semantic_channels else 0))
        config.train.update(dict(steps=4, global_batch_size=8, log_every=2, checkpoint_every=2))
        config.data.workers = 0
        config.data.images.image_size = 32
        config.sample.update(dict(num=8, batch_size=4, num_steps=5))
        if "probe" in config:
            config.probe.update(dict(width=24, depth=1, num_heads=2, steps=4, global_batch_size=8))
