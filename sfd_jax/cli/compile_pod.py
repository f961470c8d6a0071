"""Compile the real programs for a TPU slice ahead of time, without a TPU, and say whether they fit.

  sfd compile_pod --config=configs/sfd.py:xl --topology=v5e:4x4
      the training step: memory per chip, FLOPs, traffic between chips, and compile time
  sfd compile_pod --config=configs/sfd.py:xl --topology=v5e:16x16 --slices=2
      --config.train.global_batch_size=4096
      the same on two slices, with data parallelism between them
  sfd compile_pod --what=sample|decode --config=configs/sfd.py:xl --topology=v5e:2x2
      the two programs of the sampler with the config's `sample` group: the ODE with all its models, and the texture
      decoder; both with the weights of all networks on the chip
  sfd compile_pod --what=extract|inception --topology=v5e:2x2
      DINOv2-B, Semantic VAE and texture VAE as `sfd extract` runs them; Inception's features
  sfd compile_pod --topology=v5e:4x4 --flags=none,default,default+all_reduce
      compare sets of libtpu's flags (sfd_jax/tpu_flags.txt; scripts/tpu/launch.sh applies "default")

No array is allocated and no TPU is needed, but libtpu is (`bash scripts/setup.sh pod`). A topology is a chip (v4,
v5e, v5p, v6e), a colon and the shape of the slice. Compiling takes a minute or two on two cores. Exit status: 0 if
the program fits into the chip's memory, 1 if it does not, 2 for wrong flags.

Memory is XLA's allocation on one chip. FLOPs are counted in the traced program and divided by the chips; traffic is
counted in the compiled program, as bytes of results on one chip. Both count every execution (the body of a scan once
per layer), but loops that end on a condition on the data, such as dopri5's, only once: their numbers are of one
network evaluation. The time is an estimate: the compiler's cycles of each operation in the order of the program, and
the transfers between chips that no operation covers, at the chip's link rate.
"""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from sfd_jax import libtpu
from sfd_jax.cli.flags import command_parser, local_path, parse_command
from sfd_jax.errors import SfdError
from sfd_jax.ranges import Only

if TYPE_CHECKING:
    from sfd_jax.pod import Measurement

WHAT = ("train", "sample", "decode", "extract", "inception")
RULES = (
    Only("batch_size", "what", ("train",), never=True, hint="its batch is --config.train.global_batch_size"),
    Only("weak fsdp", "what", ("sample", "decode")),
)


def main(argv: list[str]) -> int:
    """Compile, print the table, and return 0 if the program fits, else 1."""
    parser = command_parser("compile_pod", __doc__)
    add_topology_flags(parser)
    flag = parser.add_argument
    flag("--what", choices=WHAT, default="train", help="which program (default: %(default)s)")
    flag(
        "--batch_size",
        type=int,
        help="images per chip, for programs other than train (default: the config's sample.batch_size, or 64)",
    )
    flag("--weak", metavar="CONFIG", help="config of AutoGuidance's weaker model (default: --config in size b)")
    flag("--fsdp", type=int, default=1, help="for sample and decode: see `sfd sample` (default: %(default)s)")
    flag("--flags", default="none", help="sets of libtpu's flags, compared; SET+SET joins two (default: %(default)s)")
    args = parse_command(parser, argv, config="configs/sfd.py:xl", rules=RULES)

    sets = args.flags.split(",")
    for name in sets:  # an unknown one is refused before another is compiled
        libtpu.flags_of(name, args.topology.partition(":")[0])
    measurements = {name: measured(args, args.what, name) for name in sets}

    from sfd_jax.pod import comparison, table

    print(table(measurements[sets[0]]) if len(sets) == 1 else comparison(measurements))
    numbers = {name: each.to_dict() for name, each in measurements.items()}
    write_json(args.json, numbers[sets[0]] if len(sets) == 1 else numbers)
    return 0 if all(each.fits for each in measurements.values()) else 1


def add_topology_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `sfd plan` shares."""
    flag = parser.add_argument
    flag("--topology", required=True, help="chip and shape of a slice: v5e:4x4, v4:2x2x1, v5p:4x4x4, v6e:8x8, ...")
    flag("--slices", type=int, default=1, help="number of slices (default: %(default)s)")
    flag("--json", type=local_path, metavar="FILE", help="also write the numbers to this file")


def write_json(path: str | None, values: dict) -> None:
    """Write the numbers to a file, if one is given."""
    if path:
        try:
            Path(path).write_text(json.dumps(values, indent=2) + "\n")
        except OSError as error:
            raise SfdError(f"--json={path} cannot be written: {error.strerror}") from error


def measured(args: argparse.Namespace, what: str, flags: str = "none") -> "Measurement":
    """Compile a program for the topology in `args` with sets of libtpu's flags, without using a TPU here."""
    import jax

    # Otherwise JAX would look for a TPU and hold it.
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # otherwise a second measurement would time the cache

    from sfd_jax.experiment.programs import measure_program
    from sfd_jax.pod import Topology

    how = {name: getattr(args, name, None) for name in ("batch_size", "weak", "fsdp")}
    topology = Topology(args.topology, args.slices)
    return measure_program(what, args.config_name, args.config, topology, flags=flags, **how)
