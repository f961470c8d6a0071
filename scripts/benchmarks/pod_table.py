"""Compile every program of the table in docs/pods.md, each in its own process, and print the table.

  python scripts/benchmarks/pod_table.py --out=DIR [--rows=train_xl_v5e_4x4,...]

DIR gets a JSON file of `sfd compile_pod` for each row; rows with a file are not compiled again. The whole table takes
some 30 minutes on two cores. Exit status 1 if a row needs more memory a chip than its limit.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

GIB = 2**30
# row -> flags, and the limit of its peak in GiB a chip.
ROWS = {
    "train_xl_v5e_2x2": ("--config=configs/sfd.py:xl --topology=v5e:2x2", 11),
    "train_xl_v5e_4x4": ("--config=configs/sfd.py:xl --topology=v5e:4x4", 5.5),
    "train_1p0b_v5e_4x4": ("--config=configs/sfd.py:1p0b --topology=v5e:4x4", 8),
    "train_1p6b_v5e_4x4": ("--config=configs/sfd.py:1p6b --topology=v5e:4x4", 11),
    "train_xl_v4_4x4x4": ("--config=configs/sfd.py:xl --topology=v4:4x4x4 --config.train.global_batch_size=1024", 16),
    "train_xl_v5p_4x4x4": (
        "--config=configs/sfd.py:xl --topology=v5p:4x4x4 --config.train.global_batch_size=1024",
        47.5,
    ),
    "train_xl_v6e_8x8": ("--config=configs/sfd.py:xl --topology=v6e:8x8 --config.train.global_batch_size=1024", 16),
    "train_xl_v5e_16x16": ("--config=configs/sfd.py:xl --topology=v5e:16x16 --config.train.global_batch_size=4096", 8),
    "train_xl_2_v5e_16x16": (
        "--config=configs/sfd.py:xl --topology=v5e:16x16 --slices=2 --config.train.global_batch_size=4096",
        8,
    ),
    "sample_dopri5_v5e_2x2": ("--what=sample --config=configs/sfd.py:xl --topology=v5e:2x2", 12),
    "sample_euler_v5e_2x2": (
        "--what=sample --config=configs/sfd.py:xl --topology=v5e:2x2 --config.sample.solver=euler",
        12,
    ),
    "decode_v5e_2x2": ("--what=decode --config=configs/sfd.py:xl --topology=v5e:2x2", 12),
    "extract_v5e_2x2": ("--what=extract --config=configs/sfd.py:xl --topology=v5e:2x2", 12),
    "inception_v5e_2x2": ("--what=inception --config=configs/sfd.py:xl --topology=v5e:2x2", 12),
}
# The other rows of the published tables, as configs/sfd.py has them.
RECIPES = (
    "xl,lr2e4,synchronous",
    "xl,lr2e4,plain",
    "xl,lr2e4,repa",
    "xl,lr2e4,irepa",
    "xl,lr2e4,pca",
    "xl,lr2e4,pca,synchronous",
    "xl,lr2e4,redi",
    "xl,lr2e4,redi,synchronous",
    "xl,dit",
)
ROWS |= {
    f"train_{name.replace(',', '_')}": (f"--config=configs/sfd.py:{name} --topology=v5e:4x4", 6) for name in RECIPES
}
ROWS["train_xl_few_step"] = (
    "--config=configs/sfd.py:xl,few_step --config.few_step.guidance=autoguidance --topology=v5e:4x4",
    15.75,
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, help="folder of the rows' JSON files")
    parser.add_argument("--rows", default=",".join(ROWS), help="rows, separated by commas (default: all)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    within = True
    print(
        "| program | batch a chip | slices, mesh | arguments | temporaries | peak, GiB a chip | limit | TFLOPs a chip "
        "| sent, GiB a chip | compiled in |\n|---|---|---|---|---|---|---|---|---|---|"
    )
    for name in args.rows.split(","):
        if name not in ROWS:
            parser.error(f"no row '{name}'; rows: {', '.join(ROWS)}")
        flags, most = ROWS[name]
        file = args.out / f"{name}.json"
        if not file.exists():
            command = [sys.executable, "-m", "sfd_jax", "compile_pod", *flags.split(), f"--json={file}"]
            done = subprocess.run(command, capture_output=True, text=True)
            if not file.exists():
                print(f"{name}: {done.stderr.strip()}", file=sys.stderr)
                return 2
        row = json.loads(file.read_text())
        within &= row["fits"] and row["needed"] <= most * GIB
        print(line(row, most), flush=True)
    return 0 if within else 1


def line(row: dict, most: float) -> str:
    """Return a row of the table in Markdown."""
    memory, traffic, topology = row["memory"], row["traffic"], row["topology"]
    slices = f"{topology['slices']} x " if topology["slices"] > 1 else ""
    data, fsdp = row["mesh"]["data"], row["mesh"]["fsdp"]
    if not memory:
        least = f"at least {row['needed'] / GIB:.2f}"
        return f"| {row['program']} | | {slices}{topology['name']} | | | {least} | {most} | | | |"
    sent = ", ".join(f"{kind} {size / GIB:.2f}" for kind, size in sorted(traffic["sent"].items()) if size > 0.005 * GIB)
    name = row["program"].replace("configs/sfd.py:", "")
    return (
        f"| {name} | {row['batch'] / (data * fsdp):g} | {slices}{topology['name']}, {data} x {fsdp} "
        f"| {memory['arguments'] / GIB:.2f} | {memory['temporaries'] / GIB:.2f} | {memory['peak'] / GIB:.2f} of "
        f"{row['chip']['usable'] / GIB:g} | {most} | {row['flops'] / 1e12:.1f} | {sent or '-'} "
        f"| {row['compile_seconds']:.0f} s |"
    )


if __name__ == "__main__":
    sys.exit(main())
