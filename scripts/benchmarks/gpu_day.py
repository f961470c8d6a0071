"""All measurements that need a GPU, in one command of under eight minutes: parity, speed, memory.

  bash scripts/benchmarks/gpu_day.sh [--out=DIR] [--pack=DIR] [--parts=NAME,...] [--budget=450]
  bash scripts/benchmarks/gpu_day.sh --dry_run        the same on this CPU with tiny networks

Parts run one after another, each in its own process, the most important first. Each has a time limit; a part that fails
or runs out of time keeps its numbers so far, and the next parts still run. DIR (by default $OUT, else gpu_day_out) gets
gpu_day.json with all numbers, gpu_day.md with one table for docs/performance.md, and gpu_day.log, each kept up to date.
Networks are XL in bfloat16, the benchmarks' default on a GPU; batches are smaller on cards below 100 GiB.

No network is needed. Python must have JAX with CUDA, Flax, Optax and Orbax. Other missing packages are installed from
the wheels in build/wheels into a temporary folder. Download them first, on a machine with a network:

  pip download --no-deps --only-binary=:all: -d build/wheels ml_collections torchdiffeq torch-fidelity

Without PyTorch with CUDA only our numbers are measured, and without a parity pack (--pack, $SFD_PARITY_DIR,
shared/parity or build/parity) `sfd verify` is left out. Where this folder is a copy without git, give --commit.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _common import machine, share_memory, table

ROOT = Path(__file__).resolve().parents[2]
REQUIRED = ("flax", "optax", "orbax", "ml_collections", "absl", "etils", "PIL", "tqdm")
COMPARED = ("torch", "torchdiffeq", "torch_fidelity", "torchvision")
LEAST_SECONDS = 15  # a part that would get less is not started

# Name: time limit in seconds, packages of the comparison, command, its sizes, and those of a dry run.
HERE, TINY = "scripts/benchmarks", "--size=S --depth=1 --batch=1 --rounds=1"
TRAIN, VERIFY = f"{HERE}/train_step.py --batch={{batch}}", "-m sfd_jax verify --pack={pack}"
SAMPLE, TINY_SAMPLE = f"{HERE}/sample.py --no_compile --batch={{batch}}", f"{TINY} --solver=euler --nfe=6"
MOST_CASES, TINY_CASES = "--cases=[!f]*,full_b", "--cases=semvae_mlp"
TINY_IMAGES = "--images=2 --image_size=32 --rounds=1"
PARTS = {
    "verify_float32": (100, "", VERIFY, MOST_CASES, TINY_CASES),
    "train_step": (130, "torch", f"{TRAIN} --no_compile", "", TINY),
    "sample": (110, "torch torchdiffeq", SAMPLE, "--rounds=2 --checked=4", TINY_SAMPLE),
    "choices": (150, "", f"{HERE}/choices.py --batch={{batch}}", "", f"{TINY} --steps=1"),
    "features": (60, "torch torch_fidelity torchvision", f"{HERE}/features.py", "--images=512", TINY_IMAGES),
    "verify_bfloat16": (70, "", f"{VERIFY} --dtype=bfloat16", MOST_CASES, TINY_CASES),
    "train_step_compiled": (150, "torch", TRAIN, "--rounds=3", f"{TINY} --no_compile"),
    "verify_xl": (60, "", VERIFY, "--cases=full_xl", TINY_CASES),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--out", type=Path, default=Path(os.environ.get("OUT", "gpu_day_out")))
    flag("--budget", type=float, default=450, help="seconds for everything; 450 leaves some for start and end")
    flag("--parts", help=f"some of {','.join(PARTS)}")
    flag("--pack", type=Path, help="folder of the parity pack")
    flag("--wheels", type=Path, default=ROOT / "build" / "wheels")
    flag("--commit", help="commit of this copy, where there is no git")
    flag("--dry_run", action="store_true", help="tiny networks on the CPU, to check that everything runs")
    flag("--spent", type=float, default=0.0, help=argparse.SUPPRESS)  # seconds before Python
    flag("--probe", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.probe:
        return print(json.dumps(probe()))
    wanted = args.parts.split(",") if args.parts else list(PARTS)
    if unknown := set(wanted) - set(PARTS):
        parser.error(f"no part {', '.join(unknown)}: there are {', '.join(PARTS)}")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "gpu_day.log").unlink(missing_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("gpu_day: terminated; what was measured is kept"))
    with tempfile.TemporaryDirectory(prefix="gpu_day_") as work:
        Day(args, Path(work)).measure([name for name in PARTS if name in wanted])


class Day:
    """The results so far, and the time left."""

    def __init__(self, args, work: Path):
        self.args, self.work, self.deadline = args, work, time.monotonic() + args.budget - args.spent
        self.machine, self.notes, self.parts = {}, [], {}
        self.env = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(work / "site")]),
            "PYTHONUNBUFFERED": "1",
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # PyTorch is in the same process
            "JAX_COMPILATION_CACHE_DIR": str(work / "cache"),
            "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"),
        }
        if args.dry_run:
            self.env["JAX_PLATFORMS"] = "cpu"

    def measure(self, names: list[str]) -> None:
        """Describe the machine, print what will run, and run it."""
        self.install()
        asked = self.run("probe", [__file__, "--probe"], 90)
        if asked["status"] != "done":
            raise SystemExit(f"gpu_day: JAX does not start: {asked['status']}\n{asked['log'][-2000:]}")
        found = json.loads(asked["log"].splitlines()[-1])
        missing = found["missing"]
        if lacking := [name for name in REQUIRED if name in missing]:
            wheels = self.args.wheels
            raise SystemExit(
                f"gpu_day: {sys.executable} lacks {', '.join(lacking)}: put wheels into {wheels}, see --help"
            )
        if found["backend"] != "gpu" and not self.args.dry_run:
            raise SystemExit(f"gpu_day: JAX sees no GPU, only {found['device']}; --dry_run runs tiny networks on a CPU")
        card = find_card()
        self.machine = found | {"card": card, "commit": self.args.commit or commit(), "dry_run": self.args.dry_run}
        print(self.title())
        if not found["torch_works"]:
            self.say("No PyTorch with CUDA was found: only our numbers are measured.")
        elif lacking := [name for name in COMPARED if name in missing]:
            self.say(f"Not installed, so some comparisons are missing: {', '.join(lacking)}.")
        folders = (self.args.pack, os.environ.get("SFD_PARITY_DIR"), ROOT / "shared/parity", ROOT / "build/parity")
        pack = next((Path(folder).resolve() for folder in folders if folder and Path(folder).is_dir()), None)
        if pack is None:
            self.say("No parity pack was found (--pack): `sfd verify` was left out.")
            names = [name for name in names if not name.startswith("verify")]
        print(f"In at most {self.args.budget:.0f} s: {', '.join(names)}", flush=True)
        batch = 64 if card["gib"] > 100 else 32 if card["gib"] > 60 else 8
        for name in names:
            limit, packages, command, full, tiny = PARTS[name]
            sizes, limit = (tiny, self.args.budget) if self.args.dry_run else (full, limit)
            command = f"{command} {sizes}".format(pack=pack, batch=batch).split()
            versus = bool(packages and found["torch_works"] and not set(packages.split()) & set(missing))
            self.run_part(name, command + ["--versus=torch"] * versus, limit)
            if versus and not self.parts[name].get("numbers"):  # ours alone; its programs are in the compilation cache
                self.run_part(f"{name}_alone", command, limit)
        print(self.table())
        print(f"Results: {self.args.out}/gpu_day.json, gpu_day.md and gpu_day.log")

    def install(self) -> None:
        """Install the wheels of missing packages."""
        here = {d.name.lower().replace("-", "_") for d in importlib.metadata.distributions()}
        wheels = sorted(self.args.wheels.glob("*.whl"))
        if missing := [str(wheel) for wheel in wheels if wheel.name.split("-")[0].lower() not in here]:
            flags = ["--no-index", "--no-deps", "--no-compile", "--quiet", "--target", str(self.work / "site")]
            done = self.run("install", ["-m", "pip", "install", *flags, *missing], 60)
            self.say(f"Wheels installed for this run: {len(missing)} ({done['status']}).")

    def run(self, name: str, command: list[str], limit: float) -> dict:
        """Run a command for at most `limit` seconds, then kill it and its children."""
        start, log = time.monotonic(), self.work / f"{name}.log"
        with open(log, "w") as file:
            options = {"cwd": ROOT, "env": self.env, "stdout": file, "stderr": subprocess.STDOUT}
            process = subprocess.Popen([sys.executable, *command], start_new_session=True, **options)
            try:
                code = process.wait(limit)
                status = f"failed with exit status {code}" if code else "done"
            except subprocess.TimeoutExpired:
                status = f"out of time after {limit:.0f} s"
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        text = log.read_text(errors="replace")
        with open(self.args.out / "gpu_day.log", "a") as file:
            file.write(f"=== {name}: {' '.join(command)}: {status}\n{text}\n")
        return {"command": command, "status": status, "seconds": time.monotonic() - start, "log": text}

    def run_part(self, name: str, command: list[str], limit: float) -> None:
        """Run a part, keep its numbers, and write all results so far."""
        limit = min(limit, self.deadline - time.monotonic())
        part = {"command": command, "status": "not started: no time was left"}
        if limit >= LEAST_SECONDS:
            print(f"{name}: at most {limit:.0f} s ...", end=" ", flush=True)
            numbers, is_script = self.work / f"{name}.json", command[0] != "-m"
            part = self.run(name, command + [f"--json={numbers}"] * is_script, limit)
            with contextlib.suppress(OSError, ValueError):  # none, or cut off while it was written
                part["numbers"] = json.loads(numbers.read_text()) if is_script else read_checks(part["log"])
            part["log"] = part["log"][-2000:] if part["status"] != "done" else ""
            print(f"{part['status']}, {part['seconds']:.0f} s", flush=True)
        self.parts[name] = part
        record = {"machine": self.machine, "notes": self.notes, "parts": self.parts}
        replace(self.args.out / "gpu_day.json", json.dumps(record, indent=1))
        replace(self.args.out / "gpu_day.md", self.table())

    def title(self) -> str:
        """Return a description of the machine in one line."""
        m, name = self.machine, self.machine["card"]["name"] or self.machine["device"]
        versions = ", ".join(f"{name} {version}" for name, version in m["versions"].items())
        tiny = "**Dry run with tiny networks: no measurement.** " if m["dry_run"] else ""
        return f"{tiny}{name}, {m['cores']} cores, {m['date']}, commit {m['commit']}; {versions}."

    def table(self) -> str:
        """Return the results so far as a Markdown table."""
        head = ["part", "what", "seconds", "relative to ours, or to the first choice", "more"]
        rows = [row for name, part in self.parts.items() for row in rows_of(name, part)]
        return "\n".join([self.title(), "", table(head, rows), "", *(f"- {note}" for note in self.notes)]) + "\n"

    def say(self, sentence: str) -> None:
        print(sentence, flush=True)
        self.notes.append(sentence)


def rows_of(name: str, part: dict) -> list[list]:
    """Return a part's rows of the table, also if it failed."""
    numbers = part.get("numbers")
    if part["status"] != "done":
        name = f"{name} ({part['status']})"
    if not numbers:
        return [[name, "", "", "", part.get("log", "").strip().rpartition("\n")[2][:100]]]
    if "comparisons" in numbers:
        said = f"{numbers['comparisons']} comparisons, {len(numbers['broken'])} bounds broken"
        return [[name, said, part["seconds"], "", ", ".join(numbers["broken"][:5])]]
    settings, more = numbers["settings"], numbers.get("details", {})
    sizes = ", ".join(f"{key} {settings[key]}" for key in ("size", "batch", "dtype", "images") if settings.get(key))
    return [
        [f"{name}: {sizes}", key, f"{each['median']:.4g}", numbers["ratios"].get(key, ""), more.get(key, "")]
        for key, each in numbers["seconds"].items()
    ]


def read_checks(log: str) -> dict | None:
    """Count the comparisons that `sfd verify` printed, also if it was cut off."""
    checks = re.findall(r"^(\S+ +.{34}) +\S+ +\S+ (ok|BROKEN)", log, re.M)
    broken = [" ".join(check.split()) for check, verdict in checks if verdict != "ok"]
    return {"comparisons": len(checks), "broken": broken} if checks else None


def probe() -> dict:
    """Describe devices and packages; the process ends to release the GPU."""
    missing = [name for name in REQUIRED + COMPARED if not importlib.util.find_spec(name)]
    share_memory()
    found = machine() | {"missing": missing, "torch_works": "torch" not in missing}
    if found["torch_works"] and found["backend"] == "gpu":
        import torch

        found["torch_works"] = torch.cuda.is_available()
    return found


def find_card() -> dict:
    """Return the first card's name with its driver, and its GiB, by nvidia-smi; "" and 0 without one."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader,nounits"]
    try:
        name, driver, mib = subprocess.check_output(query, text=True, timeout=30).splitlines()[0].split(", ")
        return {"name": f"{name}, driver {driver}", "gib": float(mib) / 1024}
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return {"name": "", "gib": 0.0}


def commit() -> str:
    try:
        options = {"cwd": ROOT, "text": True, "stderr": subprocess.DEVNULL}
        return subprocess.check_output(["git", "describe", "--always", "--dirty"], **options).strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def replace(path: Path, text: str) -> None:
    """Write a file atomically."""
    draft = path.with_name(path.name + ".part")
    draft.write_text(text)
    draft.replace(path)


if __name__ == "__main__":
    main()
