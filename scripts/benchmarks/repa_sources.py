"""Effect of REPA's three sources of targets on the digits' results, and on the FLOPs of an XL step.

  python scripts/benchmarks/repa_sources.py --demo=demo_out [--model=weak] [--steps=400] [--images=500] [--out=DIR]
  python scripts/benchmarks/repa_sources.py --flops

The first trains the demo's diffusion model (or its weaker one) again on the demo's own latents, with each source and
without REPA, everything else equal, and measures samples of each as the demo does: no guidance, Euler with 25 steps,
one seed. The second compiles nothing: it counts the FLOPs of lowered programs from abstract shapes at the
released sizes, forward and backward for SFD-XL, forward for the frozen networks.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

SOURCES = ("none", "stored", "semvae", "online")


def main() -> int:
    """Print a table, and write the numbers as JSON into --out where given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--demo", type=Path, help="work folder of a finished demo")
    parser.add_argument("--model", choices=("diffusion", "weak"), default="diffusion", help="of configs/digits.py")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder of the runs, which are kept and resumed")
    parser.add_argument("--flops", action="store_true", help="count the FLOPs of an XL step instead")
    args = parser.parse_args()
    if not args.flops and not args.demo:
        parser.error("give --demo=DIR, or --flops")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if args.flops:
        report_flops()
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        rows = {source: run(source, args, (args.out or Path(scratch)).absolute()) for source in SOURCES}
    print(f"\nmodel '{args.model}', {args.steps} steps, {args.images} samples, seed {args.seed}")
    print(f"{'targets':<10}{'right label':>15}{'Frechet distance':>18}{'precision':>11}{'recall':>8}")
    for source, row in rows.items():
        values = (row["read_as_label"], row["frechet_distance"], row["precision"], row["recall"])
        print("{:<10}{:>15.1%}{:>18.2f}{:>11.3f}{:>8.3f}".format(source, *values))
    if args.out:
        (args.out / "repa_sources.json").write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def run(source: str, args, out: Path) -> dict:
    """Train with one source; return the demo's metrics of its samples."""
    from sfd_jax.experiment.config_files import load_config
    from sfd_jax.experiment.demo import results, stages

    folder = out / source
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("texture_vae", "encoder", "semantic_vae", "latents"):
        if not (folder / name).exists():
            (folder / name).symlink_to((args.demo / name).absolute())

    config = load_config("configs/digits.py").copy_and_resolve_references().unlock()
    config.seed = args.seed
    config.sample.update(dict(num=args.images, batch_size=125, solver="euler", num_steps=25, guidance="none"))
    config.diffusion = settings = config[args.model]
    settings.train.update(dict(steps=args.steps, log_every=100, checkpoint_every=args.steps))
    settings.data = load_config("configs/sfd.py:s").data.copy_and_resolve_references().unlock()
    settings.data.update(
        dict(
            repa_source="stored" if source == "none" else source,
            semantic_vae=str(folder / "semantic_vae"),
            visual_encoder=str(folder / "encoder"),
            workers=0,
            flips=False,
        )
    )
    settings.data.images.update(dict(kind="digits", image_size=config.data.image_size))
    if source == "none":
        settings.loss.repa_weight, settings.model.repa_features = 0.0, 0

    print(f"[{source}]", flush=True)
    demo = stages.Demo(config, folder)
    stages.train_diffusion(demo, "diffusion")
    results.make_samples(demo)
    return results.measure(demo)["samples"]


def report_flops() -> None:
    """Print the FLOPs of an XL step for one image, and what each source adds."""
    import jax
    import jax.numpy as jnp

    from sfd_jax.models import Network, dit_config
    from sfd_jax.models.execution import Execution, executing

    def flops(function, *shapes) -> float:
        # Unrolled and without remat: a loop's body would be counted once, recomputation twice.
        with executing(Execution(scan=False)):
            return jax.jit(function).lower(*shapes).cost_analysis()["flops"]

    def shape(*sizes, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(sizes, dtype)

    config = dit_config("XL", input_size=16, in_channels=48, repa_features=768, repa_width=2048)
    dit = Network("lightning_dit", config)

    def loss(params, latents, t, labels):
        velocity, projected = dit.apply(params, latents, t, t, labels, return_repa=True)
        return jnp.mean(velocity**2) + jnp.mean(projected**2)

    inputs = shape(1, 16, 16, 48), shape(1), shape(1, dtype=jnp.int32)
    step = flops(jax.grad(loss), dit.abstract_params(), *inputs)
    sizes = dict(image_size=518, patch_size=14, width=768, depth=12, num_heads=12, num_registers=4)
    encoder = Network("dinov2", sizes)
    online = flops(encoder.apply, encoder.abstract_params(), shape(1, 224, 224, 3))
    vae = Network(
        "semantic_vae",
        dict(
            arch="transformer",
            input_dim=768,
            bottleneck_dim=16,
            hidden_dim=768,
            transformer_heads=6,
            transformer_blocks=4,
        ),
    )
    decode = lambda params, tokens: vae.apply(params, tokens, method="decode")
    semvae = flops(decode, vae.abstract_params(), shape(1, 256, 16))
    print(f"SFD-XL step: {step / 1e9:,.1f} GFLOPs an image (forward, backward; without remat and optimizer)")
    print("stored: + 0")
    print(f"semvae: + {semvae / 1e9:,.2f} GFLOPs = {semvae / step:.2%} (decoder of the Semantic VAE)")
    print(f"online: + {online / 1e9:,.2f} GFLOPs = {online / step:.2%} (DINOv2 ViT-B/14 at 224 px)")


if __name__ == "__main__":
    sys.exit(main())
