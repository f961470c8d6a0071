"""A texture VAE of the released shape (f16d32), trained by reconstruction and KL alone.

Paper:    SD-VAE f16d32 as in LightningDiT (arXiv 2501.01423); released weights need LPIPS and a discriminator
          and score rFID 0.26. This recipe is for your own data, and its images are softer.
Hardware: any; the arguments "small" and "digits" run on a laptop.
Expected: digits: held-out PSNR of about 32 dB (the demo trains this recipe and measured 31.7 over all pixels).
Command:  sfd train_texture_vae --config=configs/texture_vae.py --workdir=runs/vae --config.data.path=IMAGES

The argument is "", "small" (f8d8 for images of 32 px; larger ones with --config.data.image_size=64), "digits" or
"tiny" ("digits" for four steps).
"""

import ml_collections


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """Return the configuration; `argument` is "", "small", "digits" or "tiny"."""
    if argument not in ("", "small", "digits", "tiny"):
        raise ValueError(f"unknown variant '{argument}'; variants: small, digits, tiny")
    group = ml_collections.ConfigDict
    config = group(dict(seed=0))
    config.model = group(
        dict(
            z_channels=32,
            ch=128,
            ch_mult=(1, 1, 2, 2, 4),
            num_res_blocks=2,
            variant="ldm",  # ldm | mar
            norm_groups=32,
            compute_dtype="bfloat16",
        )
    )
    config.loss = group(dict(l1_weight=1.0, mse_weight=0.0, kl_weight=1e-6, perceptual_weight=1.0))
    config.lpips = ""  # checkpoint of LPIPS (`sfd convert`), the perceptual distance; empty: none
    config.optimizer = group(
        dict(
            learning_rate=1e-4,
            b1=0.9,
            b2=0.999,
            eps=1e-8,
            weight_decay=0.0,
            schedule="constant",
            warmup_steps=0,
            clip_norm=1.0,
            # "bfloat16" takes two bytes a parameter less.
            first_moment_dtype="float32",
        )
    )
    config.train = group(
        dict(
            steps=400_000,
            global_batch_size=64,
            accumulation=1,
            ema_decay=0.999,
            log_every=100,
            checkpoint_every=5_000,
            keep_last=2,
            keep_every=0,
            max_bad_steps=20,
            wandb="",  # a project: metrics also go to Weights & Biases
        )
    )
    config.mesh = group(dict(data=-1, fsdp=1))
    config.data = group(
        dict(kind="folder", path="", split="train", held_out_split="", image_size=256, workers=8, flips=True)
    )
    if argument == "small":
        config.model.update(dict(z_channels=8, ch=16, ch_mult=(1, 2, 4, 4), num_res_blocks=1, norm_groups=8))
        config.model.compute_dtype = "float32"
        config.loss.update(dict(mse_weight=1.0, kl_weight=1e-5))
        config.optimizer.update(dict(learning_rate=2e-3, warmup_steps=50))
        # The average after n steps holds ema_decay^n of the first weights: with 1 - 5/n that is 0.7 %.
        config.train.update(dict(steps=1000, global_batch_size=32, ema_decay=0.995, log_every=50, checkpoint_every=250))
        config.data.update(dict(image_size=32, workers=0))
    elif argument:
        config.model.update(dict(z_channels=8, ch=8, ch_mult=(1, 2, 4, 4), num_res_blocks=1, norm_groups=8))
        config.model.compute_dtype = "float32"
        config.loss.update(dict(mse_weight=1.0, kl_weight=1e-5))
        config.optimizer.update(dict(learning_rate=3e-3, schedule="cosine", warmup_steps=20))
        config.train.update(dict(steps=600, global_batch_size=32, ema_decay=0.99, log_every=50, checkpoint_every=100))
        config.data.update(dict(kind="digits", held_out_split="held_out", image_size=32, workers=0, flips=False))
    if argument == "tiny":
        config.optimizer.warmup_steps = 1
        config.train.update(dict(steps=4, log_every=2, checkpoint_every=2))
    return config.lock()
