"""The Semantic VAE of SFD: DINOv2 ViT-B/14 patch features (256 x 768) to 16 channels per token.

Paper:    arXiv 2512.04926, section 3; optimisation as released.
Hardware: released on GPUs.
Expected: the paper gives no reconstruction score; on the digits a held-out cosine similarity above 0.9.
Command:  sfd train_semvae --workdir=runs/semvae --config.data.path=latents/train

The argument is "" or "tiny", the same recipe at tiny sizes for tests and laptops; "small", for the encoder of
configs/visual_encoder.py:small on images of 32 px (larger: --config.data.images.image_size=64); or the encoder whose
features are compressed on a grid of 16 x 16, by its `sfd fetch` name: dinov3, dinov3_s, dinov3_l, siglip2, clip, mae.
"""

import ml_collections

from sfd_jax.models.encoders import RELEASED, released_encoder


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """Return the configuration; `argument` is "", "small", "tiny" or a visual encoder."""
    if argument not in ("", "small", "tiny", *RELEASED):
        raise ValueError(f"unknown variant '{argument}'; variants: small, tiny, {', '.join(RELEASED)}")
    encoder = released_encoder(argument if argument in RELEASED else "dinov2_vitb14_reg").config
    group = ml_collections.ConfigDict
    config = group(dict(seed=0))
    config.model = group(
        dict(
            arch="transformer",  # linear | mlp | resnet | transformer
            input_dim=encoder.feature_width,
            bottleneck_dim=16,
            hidden_dim=768,
            num_layers=2,
            num_res_blocks=2,
            transformer_heads=6,
            transformer_blocks=4,
            variational=True,
            compute_dtype="bfloat16",
        )
    )
    config.loss = group(
        dict(
            mse_weight=1.0,
            l1_weight=0.0,
            cosine_weight=1.0,
            cosine_axis="token",  # token (released training) | feature (released evaluation)
            kl_weight=1e-7,
            classification_weight=0.0,
            num_classes=0,
        )
    )
    config.optimizer = group(
        dict(
            learning_rate=5e-5,
            b1=0.9,
            b2=0.999,
            eps=1e-8,
            weight_decay=0.01,
            schedule="constant_cosine",
            warmup_steps=500,
            warmup_fraction=0.01,
            constant_steps=800_000,
            final_fraction=0.1,
            clip_norm=0.0,
            # "bfloat16" takes two bytes a parameter less.
            first_moment_dtype="float32",
        )
    )
    config.train = group(
        dict(
            steps=1_000_000,
            global_batch_size=64,
            accumulation=1,
            ema_decay=0.0,  # released without EMA; 0: the EMA equals the parameters
            log_every=100,
            checkpoint_every=2_000,  # held-out metrics are computed at each
            keep_last=2,
            keep_every=100_000,
            max_bad_steps=20,
            wandb="",  # a project: metrics also go to Weights & Biases
        )
    )
    config.mesh = group(dict(data=-1, fsdp=1))
    config.data = group(
        dict(
            path="",  # stored features: `sfd extract --repa`, or released shards
            held_out_path="",
            # Instead of stored features: a checkpoint of a visual encoder and images to make them from.
            visual_encoder="",
            # Input size of the encoder in pixels: the image of image_size is scaled down, as in `sfd extract`.
            # (The released training cropped the central 224 of 256, the released extraction scaled.)
            view_size=16 * encoder.patch_size,
            images=group(dict(kind="folder", path="", split="train", held_out_split="", image_size=256)),
            workers=8,
            flips=False,
        )
    )
    if argument == "small":
        config.model.update(dict(input_dim=128, hidden_dim=128, bottleneck_dim=8))
        config.model.update(dict(transformer_blocks=2, transformer_heads=4, compute_dtype="float32"))
        config.optimizer.update(dict(learning_rate=1e-3, schedule="constant", warmup_steps=20))
        # The average after n steps holds ema_decay^n of the first weights: with 1 - 5/n that is 0.7 %.
        config.train.update(dict(steps=500, ema_decay=0.99, log_every=50, checkpoint_every=100, keep_every=0))
        config.data.update(dict(workers=0, flips=True))
        config.data.images.image_size = 32
        config.data.view_size = config.data.images.get_ref("image_size")  # it sees images whole
    if argument == "tiny":
        config.model.update(dict(input_dim=24, hidden_dim=24, bottleneck_dim=4, transformer_blocks=1))
        config.optimizer.update(dict(warmup_steps=1, constant_steps=3))
        config.train.update(dict(steps=4, global_batch_size=8, log_every=2, checkpoint_every=2))
        config.data.workers = 0
    return config.lock()
