"""Seconds to compile XL's training step and the sampler's two programs, for a TPU slice and for this processor.

  python scripts/benchmarks/compile_time.py [--config=configs/sfd.py:xl] [--topology=v5e:4x4] [--json=FILE]

Each program is lowered and compiled once from shapes, one after the other, without JAX's cache: the wait of a first
start. A second start finds the programs in the cache. For the processor the batch is 4.
"""

import argparse
import json

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_enable_compilation_cache", False)

from sfd_jax.experiment.config_files import load_config  # noqa: E402
from sfd_jax.experiment.programs import open_program  # noqa: E402
from sfd_jax.pod import Topology, topology_devices  # noqa: E402
from sfd_jax.pod.report import machine, timed  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/sfd.py:xl")
    parser.add_argument("--topology", default="v5e:4x4")
    parser.add_argument("--only", choices=("cpu", "tpu"))
    parser.add_argument("--json")
    args = parser.parse_args()
    rows = []
    for place in ("cpu", "tpu"):
        if args.only in (None, place):
            small = ["--config.train.global_batch_size=4", "--config.sample.batch_size=4"] if place == "cpu" else []
            config = load_config(args.config, small)
            devices = jax.devices()[:1] if place == "cpu" else topology_devices(Topology(args.topology))
            where = "this processor" if place == "cpu" else args.topology
            for what in ("train", "sample", "decode"):
                program = open_program(what, args.config, config, devices)
                _, lower_seconds, compile_seconds, _ = timed(program.trace)
                rows.append(
                    {
                        "program": what,
                        "for": where,
                        "batch": program.rows,
                        "lower": lower_seconds,
                        "compile": compile_seconds,
                    }
                )
                print(
                    f"{what:<7} {where:<15} batch {program.rows:<5} lowered in {lower_seconds:5.1f} s, "
                    f"compiled in {compile_seconds:5.1f} s",
                    flush=True,
                )
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"rows": rows, "machine": machine()}, file, indent=2)


if __name__ == "__main__":
    main()
