"""Images a second of the loader, against the released layout read one image at a time.

  python scripts/benchmarks/loader.py [--images=2048] [--seconds=10] [--workers=0] [--json=FILE]

Makes a data set of full-size latents (32 + 16 channels of 16 x 16, both flips, DINOv2 features) in
the released safetensors layout, repacks it into our store, and reads both in one run, in turns, in
this process. The original loader opens the image's file, takes its slices, normalises them and
stacks the batch, image by image; it is repeated here with numpy (with torch where it is installed).
What is read comes from the page cache in all cases: this is the cost of the loader, not of the disk.

Last comes what training needs: an XL step costs so many FLOPs, a chip of the fastest slice in
README's pod table does so many a second, so every host must be fed so many images.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

# SFD-XL, forward and backward: 6 FLOPs a parameter and token, 256 tokens; attention adds
# 12 * L * D * N a token. REPA's projector and embeddings are left out: they are under 2 %.
XL_FLOPS = 256 * (6 * 675e6 + 12 * 28 * 1152 * 256)
# A v6e-256 slice: 918 TFLOP/s in bf16 a chip, 4 chips a host. Half of the peak is more than is
# reached in practice, so the need is not understated.
SLICE = {"name": "v6e-256", "flops": 918e12, "chips": 256, "chips_a_host": 4, "utilisation": 0.5}


def main() -> int:
    """Measure, print a table, and write the numbers as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=10.0, help="for each loader")
    parser.add_argument("--workers", type=int, default=0, help="processes of our loader")
    parser.add_argument("--json", help="file for the numbers")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        released, lean, full = make_data(Path(folder), args.images)
        rates, disk = measure(released, lean, full, args)
    need = SLICE["flops"] * SLICE["utilisation"] / XL_FLOPS
    needs = {"a chip": need, "a host": need * SLICE["chips_a_host"], "the slice": need * SLICE["chips"]}
    report(rates, disk, needs, args)
    return 0


def make_data(folder: Path, count: int):
    """Write the released layout, and our store without and with features; return the three."""
    from safetensors.numpy import save_file

    from sfd_jax.data.extract import repack
    from sfd_jax.data.published import PublishedLatents

    released = folder / "released"
    released.mkdir()
    random = np.random.default_rng(0)
    for shard in range(-(-count // 1000)):
        size = min(1000, count - 1000 * shard)
        arrays = {"labels": random.integers(0, 1000, size)}
        for name, channels, dtype in (("latents", 32, "f4"), ("latents_sv", 16, "f4"), ("feats_dino", 768, "f2")):
            for suffix in ("", "_flip"):
                values = random.standard_normal((size, channels, 16, 16), np.float32)
                arrays[name + suffix] = values.astype(dtype)
        save_file(arrays, released / f"latents_rank00_shard{shard:03d}.safetensors")
    lean = repack(PublishedLatents(released), folder / "lean", progress=False)
    full = repack(PublishedLatents(released, repa=True), folder / "full", progress=False)
    return released, lean, full


def measure(released: Path, lean, full, args) -> tuple[dict[str, float], dict[str, float]]:
    """Return images a second, and bytes an image on disk, of each loader."""
    from sfd_jax.data.pipeline import latent_transform, make_batches
    from sfd_jax.latents import LatentLayout

    def ours(store, repa):
        batches = make_batches(
            store,
            seed=0,
            global_batch_size=args.batch,
            transform=latent_transform(LatentLayout(32, 16), store.statistics, repa=repa),
            flips=True,
            workers=args.workers,
        )
        return batches(0)

    loaders = {
        "released layout, with features": original(released, lean.statistics, args.batch, True),
        "released layout, latents alone": original(released, lean.statistics, args.batch, False),
        "ours, with features": ours(full, True),
        "ours, latents alone": ours(lean, False),
    }
    spent = dict.fromkeys(loaders, 0.0)
    batches = dict.fromkeys(loaders, 0)
    for iterator in loaders.values():  # warm: page cache, threads, processes
        for _ in range(2):
            next(iterator)
    while min(spent.values()) < args.seconds:  # in turns, so that a busy machine disturbs all alike
        for name, iterator in loaders.items():
            start = time.perf_counter()
            while time.perf_counter() - start < args.seconds / 5:
                next(iterator)
                batches[name] += 1
            spent[name] += time.perf_counter() - start
    rates = {name: batches[name] * args.batch / spent[name] for name in loaders}
    size = sum(path.stat().st_size for path in released.iterdir()) / args.images
    disk = {"released layout, with features": size}
    for name, store in (("ours, with features", full), ("ours, latents alone", lean)):
        disk[name] = sum(shard["bytes"] for shard in store.shards) / len(store)
    return rates, disk


def original(folder: Path, statistics, batch_size: int, features: bool):
    """Yield batches as the released data set makes them: a file opened and sliced for every image."""
    from safetensors import safe_open

    try:
        import torch

        torch.set_num_threads(1)  # as in the workers of its DataLoader
        framework, stack = "pt", torch.stack
        statistic = lambda values: torch.from_numpy(values.copy()).reshape(1, -1, 1, 1)  # noqa: E731
    except ImportError:
        framework, stack = "np", np.stack
        statistic = lambda values: values.reshape(1, -1, 1, 1)  # noqa: E731
    mean = [statistic(values) for values in (statistics.texture_mean, statistics.semantic_mean)]
    std = [statistic(values) for values in (statistics.texture_std, statistics.semantic_std)]
    where = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework) as file:
            where += [(path, row) for row in range(file.get_slice("labels").get_shape()[0])]

    def image(index: int, random: np.random.Generator) -> dict:
        path, row = where[index]
        suffix = "_flip" if random.random() < 0.5 else ""
        with safe_open(path, framework) as file:
            latents = []
            for group, name in enumerate(("latents", "latents_sv")):
                raw = file.get_slice(name + suffix)[row : row + 1]
                latents.append(((raw - mean[group]) / std[group])[0])
            item = {"texture": latents[0], "semantic": latents[1]}
            if features:
                item["features"] = file.get_slice("feats_dino" + suffix)[row : row + 1][0]
            item["label"] = file.get_slice("labels")[row : row + 1][0]
        return item

    random = np.random.default_rng(0)
    while True:
        order = random.permutation(len(where))
        for first in range(0, len(order) - batch_size + 1, batch_size):
            items = [image(index, random) for index in order[first : first + batch_size]]
            yield {name: stack([item[name] for item in items]) for name in items[0]}


def report(rates: dict, disk: dict, needs: dict, args) -> None:
    """Print the table, and write JSON where asked."""
    slowest = rates["released layout, with features"]
    print(f"{'loader':<34}{'images/s':>10}{'times':>8}{'bytes/image':>14}")
    for name, rate in rates.items():
        size = f"{disk[name]:,.0f}" if name in disk else "the same"
        print(f"{name:<34}{rate:>10,.0f}{rate / slowest:>8.1f}{size:>14}")
    print(f"an XL step on {SLICE['name']} at {SLICE['utilisation']:.0%} of peak needs: ", end="")
    print(", ".join(f"{rate:,.0f} images/s {what}" for what, rate in needs.items()))
    if args.json:
        numbers = {"images_per_second": rates, "bytes_per_image": disk, "needed": needs, "slice": SLICE}
        Path(args.json).write_text(json.dumps(numbers | {"settings": vars(args)}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
