"""Compile the real programs for a TPU slice that is not here, and say whether they fit.

  sfd compile_pod --config=configs/sfd.py:xl --topology=v5e:4x4
      the training step: its memory a chip, FLOPs, traffic between chips, and the time to compile
  sfd compile_pod --config=configs/sfd.py:xl --topology=v5e:16x16 --slices=2
      --config.train.global_batch_size=4096
      the same on two slices, with data parallelism between them
  sfd compile_pod --what=sample|decode --config=configs/sfd.py:xl --topology=v5e:2x2
      the two programs of the sampler, the config's `sample` group: the ODE with all its models, and the texture's
      decoder; either with the weights of all of them on the chip
  sfd compile_pod --what=extract|inception --topology=v5e:2x2
      DINOv2-B, Semantic VAE and texture VAE as `sfd extract` runs them; Inception's features

Nothing is allocated and no TPU is needed; libtpu is (`bash scripts/setup.sh pod`). A topology is a chip (v4, v5e,
v5p, v6e), a colon and the slice's shape. Compiling takes a minute or two on two cores. Exit status 0 where the
program fits into the chip's memory, 1 where it does not, 2 where something is wrong with what was asked.

Memory is what XLA has laid out for one chip. FLOPs are counted in the traced program and split evenly, traffic in
the compiled one, both as often as they happen (a scan's body once a layer); the traffic is the result's bytes on one
chip. A loop that ends by its data, as dopri5's does, is counted once: what is said then is of one network evaluation.
"""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

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
    """Compile, print the table, and return 0 where the program fits, else 1."""
    parser = command_parser("compile_pod", __doc__)
    add_topology_flags(parser)
    flag = parser.add_argument
    flag("--what", choices=WHAT, default="train", help="which program (default: %(default)s)")
    flag(
        "--batch_size",
        type=int,
        help="images a chip for the other programs than train (default: the config's sample.batch_size, or 64)",
    )
    flag("--weak", metavar="CONFIG", help="config of AutoGuidance's weaker model (default: --config in size b)")
    flag("--fsdp", type=int, default=1, help="for sample and decode: as in `sfd sample` (default: %(default)s)")
    args = parse_command(parser, argv, config="configs/sfd.py:xl", rules=RULES)

    measurement = measured(args, args.what)

    from sfd_jax.pod import table

    print(table(measurement))
    write_json(args.json, measurement.to_dict())
    return 0 if measurement.fits else 1


def add_topology_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `sfd plan` has too."""
    flag = parser.add_argument
    flag("--topology", required=True, help="chip and shape of a slice: v5e:4x4, v4:2x2x1, v5p:4x4x4, v6e:8x8, ...")
    flag("--slices", type=int, default=1, help="so many of them (default: %(default)s)")
    flag("--json", type=local_path, metavar="FILE", help="also write the numbers there")


def write_json(path: str | None, values: dict) -> None:
    """Write the numbers where the user wants them, if anywhere."""
    if path:
        try:
            Path(path).write_text(json.dumps(values, indent=2) + "\n")
        except OSError as error:
            raise SfdError(f"--json={path} cannot be written: {error.strerror}") from error


def measured(args: argparse.Namespace, what: str) -> "Measurement":
    """Compile a program for the topology of the flags, without looking for a TPU that may be here."""
    import jax

    # Nothing is to run: without this JAX looks for a TPU, and holds one if there is one.
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # else a second measurement would time the cache

    from sfd_jax.experiment.programs import measure_program
    from sfd_jax.pod import Topology

    how = {name: getattr(args, name, None) for name in ("batch_size", "weak", "fsdp")}
    return measure_program(what, args.config_name, args.config, Topology(args.topology, args.slices), **how)
