"""A folder of your own images: the whole SFD pipeline on a laptop, from real images to new ones.

Data:     `sfd demo --images=FOLDER` with FOLDER/CLASS/IMAGE, cropped to squares of 32 or 64 px.
Method:   that of configs/digits.py; `choose_sizes` chooses sizes and steps.
Hardware: two CPU cores or more, under 6 GiB of memory.
Expected: samples that show their class; copies if the training images are few (see report.md).
Command:  sfd demo --images=FOLDER --image_size=64 --workdir=OUT

The argument is what the sizes are chosen for, "images=300,classes=5,image_size=64,cores=2"; `sfd demo` fills it in.
With "tiny" in it every stage takes a few steps, for tests; the samples are noise.
"""

import runpy
from pathlib import Path

import ml_collections

_digits = runpy.run_path(str(Path(__file__).with_name("digits.py")))
GRID = 8  # latent pixels a side, at both image sizes
DEFAULTS = dict(images=1000, classes=10, image_size=32, cores=2)


def choose_sizes(images: int, classes: int, image_size: int, cores: int) -> dict[str, int]:
    """Choose sizes and steps for your own images.

    Steps grow with the square root of the number of images, since a few are soon memorised, and with the cores, so that
    a run takes about as long on any machine. From 8 cores on, the transformers are twice as wide: four times the work
    per step.

    Args:
      images: number of training images.
      classes: at least 1.
      image_size: 32 or 64 px.
      cores: CPU cores.

    Returns:
      "width" of the transformers; "batch" of all stages but the texture VAE, which takes half; steps of "texture_vae",
      "encoder", "semantic_vae", "diffusion" and "weak"; "samples" to make.
    """
    wide = cores >= 8
    data = min(max(images, 100), 10_000) ** 0.5 / 1000**0.5  # 0.3 to 3.2
    speed = min(max(cores / (8 if wide else 2), 0.5), 4)
    steps = lambda at_1000: max(100, 10 * round(at_1000 * data * speed / 10))
    return dict(
        width=256 if wide else 128,
        batch=32 if images < 1000 else 64,
        texture_vae=steps(2000),
        encoder=steps(500),
        semantic_vae=steps(500),
        diffusion=steps(1400),
        weak=steps(500),
        samples=max(min(24 * classes, 480), min(classes, 1000)),
    )


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """Return the configuration; the module's docstring explains `argument`."""
    numbers, tiny = dict(DEFAULTS), False
    for part in filter(None, argument.split(",")):
        name, equals, value = part.partition("=")
        if part != "tiny" and not (name in numbers and equals and value.isdigit()):
            raise ValueError(f"unknown '{part}' in '{argument}'; give {', '.join(f'{n}=N' for n in numbers)} or tiny")
        if part == "tiny":
            tiny = True
        else:
            numbers[name] = int(value)
    sizes, classes, image_size = choose_sizes(**numbers), numbers["classes"], numbers["image_size"]
    if image_size not in (32, 64):
        raise ValueError(f"image_size={image_size}: must be 32 or 64")

    config = _digits["get_config"]().unlock()
    patch, width = image_size // GRID, sizes["width"]
    config.data = ml_collections.ConfigDict(dict(kind="folder", image_size=image_size))
    # Narrow at high resolution: convolutions there take a CPU longest.
    config.texture_vae.model.update(dict(ch=8, ch_mult=(1, 2, 8) if patch == 4 else (1, 2, 4, 8)))
    config.encoder.model.update(dict(image_size=image_size, patch_size=patch, width=width))
    # With one class the encoder learns the four rotations of an image: stages.py, `Rotated`.
    config.encoder.loss.update(dict(num_classes=classes if classes > 1 else 4, shift=image_size // 16))
    config.semantic_vae.model.update(dict(input_dim=width, hidden_dim=width))
    config.extract.update(dict(image_size=image_size, tile_size=image_size, flips=True))
    for stage in ("diffusion", "weak"):
        model, part = config[stage].model, 1 if stage == "diffusion" else 2
        model.update(dict(input_size=GRID, num_classes=classes, width=width // part, num_heads=width // part // 32))
        model.update(dict(repa_features=width, repa_width=2 * width))
    for stage in ("texture_vae", "encoder", "semantic_vae", "diffusion", "weak"):
        steps = sizes[stage]
        # At the end 0.7 % of the first weights are left in the average that is sampled from.
        ema = min(0.99, 1 - 5 / steps)
        config[stage].train.update(dict(steps=steps, global_batch_size=sizes["batch"], ema_decay=round(ema, 3)))
        config[stage].optimizer.warmup_steps = min(config[stage].optimizer.warmup_steps, steps // 10)
    config.texture_vae.train.global_batch_size = sizes["batch"] // 2
    config.sample.update(dict(num=sizes["samples"], batch_size=min(sizes["samples"], 120)))
    if tiny:
        _digits["_shrink"](config)
    return config.lock()
