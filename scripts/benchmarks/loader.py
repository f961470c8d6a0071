"""Images a second of the loader, against the released layout read one image at a time.

  python scripts/benchmarks/loader.py [--images=2048] [--seconds=10] [--workers=0] [--json=FILE]

Makes a data set of full-size latents (32 + 16 channels of 16 x 16, both flips, DINOv2 features) in
the released safetensors layout, repacks it into our store, and reads both in one run, in turns, in
this process. The original loader opens the image's file, takes its slices, normalises them and
stacks the batch, image by image, in one thread; it is repeated here with torch, as it is (with numpy
where torch is missing). Ours reads ahead in two threads, or in --workers processes. What is read comes
from the page cache in all cases: this is the cost of the loader, not of the disk.

Each loader is set beside the original twice: beside what the original reads to train with REPA (latents
and features), and, for latents alone, beside the same bytes. `cpu us/image` is the processor time of all
threads, which other jobs on the machine and the number of its cores disturb less than images a second.

Last comes what training needs: an XL step costs so many FLOPs, and a slice does so many a second, so
every host must be fed so many images.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

# SFD-XL with REPA's projector, forward and backward, an image: counted by repa_sources.py --flops.
XL_FLOPS = 742.2e9
# The slices of the pod table that XL is trained on: chips, peak FLOP/s of a chip in bf16, global batch. All have
# 4 chips a host. The two slices of v5e:16x16 are the fastest as a whole, v6e has the hungriest hosts.
SLICES = {
    "v6e:8x8": (64, 918e12, 1024),
    "v5p:4x4x4": (64, 459e12, 1024),
    "v5e:16x16": (256, 197e12, 4096),
    "2 x v5e:16x16": (512, 197e12, 4096),
}
CHIPS_A_HOST = 4
UTILISATION = 0.5  # more than is reached in practice, so that the need is not understated

WITH_FEATURES, LATENTS_ALONE = "released layout, with features", "released layout, latents alone"
TURNS = 5


def main() -> int:
    """Measure, print a table, and write the numbers as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=10.0, help="for each loader")
    parser.add_argument("--workers", type=int, default=0, help="processes of our loader")
    parser.add_argument("--json", help="file for the numbers")
    parser.add_argument("--data", type=Path, help="folder of the made data, kept for a run of as many images")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        released, lean, full = make_data(args.data or Path(folder), args.images)
        rates, cpu, disk = measure(released, lean, full, args)
    report(rates, cpu, disk, args)
    return 0


def make_data(folder: Path, count: int):
    """Write the released layout, and our store without and with features; return the three."""
    from safetensors.numpy import save_file

    from sfd_jax.data.extract import repack
    from sfd_jax.data.published import PublishedLatents

    released = folder / "released"
    released.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for shard in range(-(-count // 1000)):
        size, path = min(1000, count - 1000 * shard), released / f"latents_rank00_shard{shard:03d}.safetensors"
        if path.exists():
            continue
        arrays = {"labels": random.integers(0, 1000, size)}
        for name, channels, dtype in (("latents", 32, "f4"), ("latents_sv", 16, "f4"), ("feats_dino", 768, "f2")):
            for suffix in ("", "_flip"):
                values = random.standard_normal((size, channels, 16, 16), np.float32)
                arrays[name + suffix] = values.astype(dtype)
        save_file(arrays, path)
    lean = repack(PublishedLatents(released), folder / "lean", progress=False)
    full = repack(PublishedLatents(released, repa=True), folder / "full", progress=False)
    return released, lean, full


def measure(released: Path, lean, full, args) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """Return images a second, seconds of processor time an image, and bytes an image on disk, of each loader."""
    from sfd_jax.data.pipeline import latent_transform, make_batches
    from sfd_jax.latents import LatentLayout

    def ours(store, repa):
        return lambda: make_batches(
            store,
            seed=0,
            global_batch_size=args.batch,
            transform=latent_transform(LatentLayout(32, 16), store.statistics, repa=repa),
            flips=True,
            workers=args.workers,
        )(0)

    loaders = {
        WITH_FEATURES: lambda: original(released, lean.statistics, args.batch, True),
        LATENTS_ALONE: lambda: original(released, lean.statistics, args.batch, False),
        "ours, with features": ours(full, True),
        "ours, latents alone": ours(lean, False),
    }
    wall, cpu, batches = (dict.fromkeys(loaders, 0.0) for _ in range(3))
    for _ in range(TURNS):  # in turns, so that a busy machine disturbs all alike
        for name, make in loaders.items():
            iterator = make()
            # Files, threads and processes; and what was read ahead before the clock starts, which is not counted.
            for _ in range(6 + 3 * args.workers if name.startswith("ours") else 1):
                next(iterator)
            start, start_cpu = time.perf_counter(), time.process_time()
            while time.perf_counter() - start < args.seconds / TURNS:
                next(iterator)
                batches[name] += 1
            wall[name] += time.perf_counter() - start
            cpu[name] += time.process_time() - start_cpu
            iterator.close()  # nothing reads ahead in another's turn
    rates = {name: batches[name] * args.batch / wall[name] for name in loaders}
    cpu = {name: cpu[name] / batches[name] / args.batch for name in loaders}
    size = sum(path.stat().st_size for path in released.iterdir()) / args.images
    disk = {WITH_FEATURES: size}
    for name, store in (("ours, with features", full), ("ours, latents alone", lean)):
        disk[name] = sum(shard["bytes"] for shard in store.shards) / len(store)
    return rates, cpu, disk


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


def report(rates: dict, cpu: dict, disk: dict, args) -> None:
    """Print the tables, and write JSON where asked."""
    print(f"{'loader':<32}{'images/s':>10}{'cpu us/image':>14}{'beside the original':>21}{'same bytes':>12}"
          f"{'bytes/image':>13}")  # fmt: skip
    for name, rate in rates.items():
        same = rates[LATENTS_ALONE if name.endswith("alone") else WITH_FEATURES]
        # The processor time of worker processes is not this process's.
        spent = "" if args.workers and name.startswith("ours") else f"{cpu[name] * 1e6:,.0f}"
        print(f"{name:<32}{rate:>10,.0f}{spent:>14}{rate / rates[WITH_FEATURES]:>20.1f}x{rate / same:>11.1f}x"
              f"{disk.get(name, disk[WITH_FEATURES]):>13,.0f}")  # fmt: skip
    needs = {}
    print(f"an XL step at {UTILISATION:.0%} of peak:")
    for name, (chips, flops, batch) in SLICES.items():
        need = chips * flops * UTILISATION / XL_FLOPS
        needs[name] = {"images_per_second": need, "a_host": need * CHIPS_A_HOST / chips, "step_seconds": batch / need}
        print(f"  {name:<14} batch {batch}: {1000 * batch / need:.0f} ms, {need:,.0f} images/s, "
              f"{need * CHIPS_A_HOST / chips:,.0f} for each of {chips // CHIPS_A_HOST} hosts")  # fmt: skip
    if args.json:
        numbers = {"images_per_second": rates, "cpu_seconds_per_image": cpu, "bytes_per_image": disk, "needed": needs}
        Path(args.json).write_text(json.dumps(numbers | {"settings": vars(args)}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
