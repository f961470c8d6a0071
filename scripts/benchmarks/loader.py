"""Images a second of the loader, against the released layout read one image at a time.

  python scripts/benchmarks/loader.py --versus=torch [--images=2048] [--seconds=2] [--workers=0] [--cold] [--json=FILE]

Makes a data set of full-size latents (32 + 16 channels of 16 x 16, both flips, DINOv2 features) in
the released safetensors layout, repacks it into our store, and reads both in one run, in turns, in
this process. The original loader opens the image's file, takes its slices, normalises them and
stacks the batch, image by image, in one thread; it is reimplemented here with torch. The values of its first
images must equal ours. Our loader reads ahead in two threads, or in --workers processes. All data come from
the page cache: this measures the cost of the loader, not of the disk. With --cold the files are removed from it
before each turn, which then reads every image at most once.

Each of our loaders is compared with the original twice: with what the original reads to train with REPA
(latents and features), and with the same bytes. `cpu us/image` is the processor time of all threads, which
other jobs on the machine and the number of its cores disturb less than images a second.

The last table is what training needs: from the FLOPs of an XL step and the FLOP/s of a slice, the images a
second for each host.
"""

import os
import tempfile
import time
from pathlib import Path

import numpy as np
from _common import finish, make_parser, need, peak_memory, spread, summary, table

# SFD-XL with REPA's projector, forward and backward, for one image: counted by repa_sources.py --flops.
XL_FLOPS = 742.2e9
# The slices of the pod table for training XL: chips, peak FLOP/s of a chip in bf16, global batch. All have 4 chips a
# host. Two slices of v5e:16x16 are the fastest in total; v6e needs the most images for each host.
SLICES = {
    "v6e:8x8": (64, 918e12, 1024),
    "v5p:4x4x4": (64, 459e12, 1024),
    "v5e:16x16": (256, 197e12, 4096),
    "2 x v5e:16x16": (512, 197e12, 4096),
}
CHIPS_A_HOST = 4
UTILISATION = 0.5  # more than is reached in practice, so that the need is not underestimated

WITH_FEATURES, LATENTS_ALONE = "released layout, with features", "released layout, latents alone"
OURS = {
    "sfd_jax, with features": WITH_FEATURES,
    "sfd_jax, latents alone": LATENTS_ALONE,
}  # -> the original with the same bytes


# Tolerance relative to the largest value, and number of images: bfloat16 is within 2^-8 of a value.
SAME, COMPARED = 1e-2, 8


def main() -> None:
    parser = make_parser(__doc__)
    flag = parser.add_argument
    flag("--images", type=int, default=2048)
    flag("--batch", type=int, default=256)
    flag("--seconds", type=float, default=2.0, help="length of a loader's turn")
    flag("--workers", type=int, default=0, help="processes of our loader")
    flag("--cold", action="store_true", help="read from the disk instead of the page cache (Linux)")
    flag("--data", type=Path, help="folder of the generated data, kept for later runs with as many images")
    args = parser.parse_args()
    if args.versus:
        need("torch")
    with tempfile.TemporaryDirectory() as folder:
        released, lean, full = make_data(args.data or Path(folder), args.images)
        notes = [compare(released, full, args)] if args.versus else []
        wall, cpu = measure(released, lean, full, args)
        disk = {
            name: sum(shard["bytes"] for shard in store.shards) / len(store)
            for name, store in zip(OURS, (full, lean), strict=True)
        }
        disk[WITH_FEATURES] = sum(path.stat().st_size for path in released.iterdir()) / args.images
    report(wall, cpu, disk, args, notes)


def make_data(folder: Path, count: int):
    """Write the released layout, and our store without and with features; return the three."""
    from safetensors.numpy import save_file

    from sfd_jax.data.extract import Share, repack
    from sfd_jax.data.released import ReleasedLatents

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
    quiet = Share(progress=False)
    lean = repack(ReleasedLatents(released), folder / "lean", share=quiet)
    full = repack(ReleasedLatents(released, repa=True), folder / "full", share=quiet)
    return released, lean, full


def our_batches(store, args, repa: bool):
    """Return an iterator over our loader's batches."""
    from sfd_jax.data.pipeline import latent_transform, make_batches
    from sfd_jax.latents import LatentLayout

    transform = latent_transform(LatentLayout(32, 16), store.statistics, repa=repa)
    make = make_batches(
        store, seed=0, global_batch_size=args.batch, transform=transform, flips=True, workers=args.workers
    )
    return make(0)


def compare(released: Path, full, args) -> str:
    """Read images of one of our batches as the original does; exit where they differ by more than rounding."""
    image, _ = original_image(released, full.statistics, True)
    batch, worst = next(our_batches(full, args, True)), 0.0
    for row in range(COMPARED):
        ours = batch["latents"][row].transpose(2, 0, 1), batch["repa_features"][row].T.astype(np.float32)
        differences = []
        for suffix in ("", "_flip"):
            item = {
                name: np.asarray(values, np.float32) for name, values in image(int(batch["index"][row]), suffix).items()
            }
            theirs = np.concatenate([item["texture"], item["semantic"]]), item["features"].reshape(ours[1].shape)
            differences.append(max(np.abs(a - b).max() / np.abs(b).max() for a, b in zip(ours, theirs, strict=True)))
        worst = max(worst, float(min(differences)))
    if not worst < SAME:
        raise SystemExit(
            f"the two loaders do not read the same images ({worst:.1e}; at most {SAME:g}): nothing is timed"
        )
    return f"largest relative difference of {COMPARED} images before timing: {worst:.1e} (ours are stored in bfloat16)"


def measure(released: Path, lean, full, args) -> tuple[dict[str, dict], dict[str, dict]]:
    """Return each loader's wall and processor seconds for one image, with their spread over the turns."""
    loaders = {}
    if args.versus:
        loaders[WITH_FEATURES] = lambda: original(released, lean.statistics, args.batch, True)
        loaders[LATENTS_ALONE] = lambda: original(released, lean.statistics, args.batch, False)
    for name, (store, repa) in zip(OURS, ((full, True), (lean, False)), strict=True):
        loaders[name] = lambda store=store, repa=repa: our_batches(store, args, repa)
    wall, cpu = ({name: [] for name in loaders} for _ in range(2))
    for _ in range(args.rounds):  # in turns, so that a busy machine disturbs all equally
        for name, make in loaders.items():
            iterator, batches = make(), 0
            # Not counted: the opening of files and start of threads and processes, and batches that were read ahead.
            for _ in range(0 if args.cold else 6 + 3 * args.workers if name in OURS else 1):
                next(iterator)
            if args.cold:
                drop_cache([released, lean.directory, full.directory])
            start, start_cpu = time.perf_counter(), time.process_time()
            last = args.images // args.batch if args.cold else np.inf
            while time.perf_counter() - start < args.seconds and batches < last:
                next(iterator)
                batches += 1
            images = batches * args.batch
            wall[name].append((time.perf_counter() - start) / images)
            cpu[name].append((time.process_time() - start_cpu) / images)
            iterator.close()  # no reading ahead in another loader's turn
    return tuple({name: summary(turns) for name, turns in each.items()} for each in (wall, cpu))


def drop_cache(folders: list[Path]) -> None:
    """Remove the files of folders from the page cache."""
    for path in (path for folder in folders for path in folder.iterdir()):
        with open(path, "rb") as file:
            os.fsync(file.fileno())  # only clean pages are dropped
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def original_image(folder: Path, statistics, features: bool):
    """Return image(index, suffix) -> arrays of one image as the released data set reads it, and their number."""
    import torch
    from safetensors import safe_open

    torch.set_num_threads(1)  # as in the workers of its DataLoader
    statistic = lambda values: torch.from_numpy(values.copy()).reshape(1, -1, 1, 1)  # noqa: E731
    mean = [statistic(values) for values in (statistics.texture_mean, statistics.semantic_mean)]
    std = [statistic(values) for values in (statistics.texture_std, statistics.semantic_std)]
    where = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            where += [(path, row) for row in range(file.get_slice("labels").get_shape()[0])]

    def image(index: int, suffix: str) -> dict:
        path, row = where[index]
        with safe_open(path, "pt") as file:
            latents = []
            for group, name in enumerate(("latents", "latents_sv")):
                raw = file.get_slice(name + suffix)[row : row + 1]
                latents.append(((raw - mean[group]) / std[group])[0])
            item = {"texture": latents[0], "semantic": latents[1]}
            if features:
                item["features"] = file.get_slice("feats_dino" + suffix)[row : row + 1][0]
            item["label"] = file.get_slice("labels")[row : row + 1][0]
        return item

    return image, len(where)


def original(folder: Path, statistics, batch_size: int, features: bool):
    """Yield batches as the released data set makes them: a file opened and sliced for every image."""
    import torch

    image, number = original_image(folder, statistics, features)
    random = np.random.default_rng(0)
    while True:
        order = random.permutation(number)
        for first in range(0, number - batch_size + 1, batch_size):
            items = [
                image(index, "_flip" if random.random() < 0.5 else "") for index in order[first : first + batch_size]
            ]
            yield {name: torch.stack([item[name] for item in items]) for name in items[0]}


def report(wall: dict, cpu: dict, disk: dict, args, notes: list[str]) -> None:
    rows, ratios = [], {}
    for name, each in wall.items():
        # The processor time of worker processes is not included in this process's.
        spent = "" if args.workers and name in OURS else 1e6 * cpu[name]["median"]
        rows.append(
            [name, f"{1 / each['median']:,.0f}", spread(each), spent, f"{disk[name]:,.0f}" if name in disk else ""]
        )
    for name, same in OURS.items() if args.versus else ():
        for other in {"what the original reads for REPA": WITH_FEATURES, "the same bytes": same}.items():
            ratios[f"{name}, over {other[0]}"] = wall[other[1]]["median"] / wall[name]["median"]
    needs = {}
    for name, (chips, flops, batch) in SLICES.items():
        need_all = chips * flops * UTILISATION / XL_FLOPS
        needs[name] = {
            "batch": batch,
            "step_seconds": batch / need_all,
            "images_per_second": need_all,
            "a_host": need_all * CHIPS_A_HOST / chips,
        }
    tables = [
        f"{args.images} images, batches of {args.batch}, {args.rounds} turns of {args.seconds:g} s, "
        f"from the {'disk' if args.cold else 'page cache'}",
        table(["loader", "images/s", "spread of s/image", "cpu us/image", "bytes/image"], rows),
    ]
    if ratios:
        tables.append(table(["speed of", "ratio of medians"], [[n, f"{r:.1f}"] for n, r in ratios.items()]))
    tables += [
        f"What an XL step at {UTILISATION:.0%} of a slice's peak reads",
        table(
            ["slice", "batch", "step, ms", "images/s", "a host"],
            [
                [
                    name,
                    n["batch"],
                    *(f"{x:,.0f}" for x in (1e3 * n["step_seconds"], n["images_per_second"], n["a_host"])),
                ]
                for name, n in needs.items()
            ],
        ),
    ]
    record = {
        "benchmark": "loader",
        "settings": {k: v for k, v in vars(args).items() if k not in ("json", "data")},
        "seconds": wall,
        "cpu_seconds": cpu,
        "bytes_per_image": disk,
        "needed": needs,
        "ratios": ratios,
        "peak_gib": peak_memory(),
    }
    finish(record, tables, notes, args.json)


if __name__ == "__main__":
    main()
