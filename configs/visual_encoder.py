"""A small visual encoder with the architecture of DINOv2, trained on labels, where no released one is available.

Paper:    none: SFD uses DINOv2. The demo trains such an encoder.
Hardware: any; the argument "small" runs on a laptop.
Expected: "small" on 360 held-out digits: accuracy of 97 % or more (the demo's encoder).
Command:  sfd train_encoder --config=configs/visual_encoder.py:small --workdir=runs/encoder --config.data.path=IMAGES

The argument is "" (ViT-S/16 for images of 256 px, never trained), "small" (images of 32 px; larger ones with
--config.data.image_size=64), or "tiny", which is "small" on digits for four steps.
"""

import ml_collections
from ml_collections.config_dict import placeholder


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """Return the configuration; `argument` is "", "small" or "tiny"."""
    if argument not in ("", "small", "tiny"):
        raise ValueError(f"unknown variant '{argument}'; variants: small, tiny")
    group = ml_collections.ConfigDict
    config = group(dict(seed=0))
    config.data = group(
        dict(kind="folder", path="", split="train", held_out_split="", image_size=256, workers=8, flips=True)
    )
    config.model = group(
        dict(
            image_size=config.data.get_ref("image_size"),
            patch_size=16,  # as many patches a side as the texture VAE makes latent pixels
            width=384,
            depth=12,
            num_heads=6,
            num_registers=4,
            compute_dtype="bfloat16",
        )
    )
    # num_classes None: as many as the images have. Augmentation: shift in pixels, scale as a fraction.
    config.loss = group(dict(num_classes=placeholder(int), label_smoothing=0.1, shift=16.0, scale=0.2))
    config.optimizer = group(
        dict(
            learning_rate=5e-4,
            b1=0.9,
            b2=0.999,
            eps=1e-8,
            weight_decay=0.05,
            schedule="constant",
            warmup_steps=1000,
            clip_norm=1.0,
            # "bfloat16" takes two bytes a parameter less.
            first_moment_dtype="float32",
        )
    )
    config.train = group(
        dict(
            steps=50_000,
            global_batch_size=256,
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
    if argument:
        config.data.update(dict(image_size=32, workers=0))
        config.model.update(dict(patch_size=8, width=128, depth=4, num_heads=4, compute_dtype="float32"))
        config.loss.update(dict(shift=2.0, scale=0.1))
        config.optimizer.update(dict(learning_rate=1e-3, weight_decay=0.0, warmup_steps=20))
        # After n steps the average keeps ema_decay^n of the first weights: 0.7 % for 1 - 5/n.
        config.train.update(dict(steps=500, global_batch_size=64, ema_decay=0.99, log_every=50, checkpoint_every=100))
    if argument == "tiny":
        config.data.update(dict(kind="digits", held_out_split="held_out", flips=False))
        config.optimizer.warmup_steps = 1
        config.train.update(dict(steps=4, global_batch_size=16, log_every=2, checkpoint_every=2))
    return config.lock()
