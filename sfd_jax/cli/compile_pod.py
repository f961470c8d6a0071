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

Memory is what XLA has laid out for one chip. FLOPs and traffic are counted in the compiled program, every
instruction as often as it runs (a scan's body once a layer); the traffic is the result's bytes on one chip. A loop
that ends by its data, as dopri5's does, is counted once: what is said then is the work of one network call.
"""

import json
from pathlib import Path

from sfd_jax.cli.flags import door_parser, local_path, parse_door
from sfd_jax.errors import SfdError
from sfd_jax.experiment.config_files import load_config
from sfd_jax.ranges import Only

WHAT = ("train", "sample", "decode", "extract", "inception")
RULES = (
    Only("batch_size", "what", ("train",), never=True, hint="its batch is --config.train.global_batch_size"),
    Only("weak fsdp", "what", ("sample", "decode")),
)


def main(argv: list[str]) -> int:
    """Compile, print the table, and return 0 where the program fits, else 1."""
    parser = door_parser("compile_pod", __doc__)
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
    args = parse_door(parser, argv, config="configs/sfd.py:xl", rules=RULES)

    measurement = measure_program(args, args.what)

    from sfd_jax.pod import table

    print(table(measurement))
    write_json(args.json, measurement.to_dict())
    return 0 if measurement.fits else 1


def add_topology_flags(parser) -> None:
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


def measure_program(args, what: str):
    """Compile one of the programs for the topology of the flags and return its Measurement.

    Raises:
      SfdError: no libtpu, no such topology, or a config, batch or mesh that does not go with it.
    """
    import jax

    # Nothing is to run: without this JAX looks for a TPU, and holds one if there is one.
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # else a second measurement would time the cache

    from sfd_jax.pod import Topology, measure, topology_devices

    topology = Topology(args.topology, args.slices)
    program, mesh, batch, networks, lower = PROGRAMS[what](args, topology_devices(topology))
    counts = {name: network.num_params() for name, network in networks.items()}
    name = f"{what} {args.config_name}"
    return measure(lower, program=f"{name}{program}", topology=topology, mesh=mesh, batch=batch, parameters=counts)


def _train(args, devices):
    from sfd_jax.distributed import make_mesh
    from sfd_jax.errors import nearest
    from sfd_jax.experiment.build import layout_from_config, task_from_config, train_config
    from sfd_jax.experiment.targets import REPA_SOURCES
    from sfd_jax.pod import programs

    config, train, layout = args.config, train_config(args.config), layout_from_config(args.config)
    network = task_from_config(config).network
    source = config.data.repa_source if config.loss.repa_weight > 0 else "none"
    if source not in (*REPA_SOURCES, "none"):
        raise SfdError(f"data.repa_source='{source}' is unknown; {nearest(source, REPA_SOURCES)}")
    about = {"repa_source": source, "image_size": config.data.images.image_size}
    targets = programs.training_targets(network, layout, tile_grid=config.data.tile_grid, **about)
    task = task_from_config(config, targets)
    mesh = make_mesh(**config.mesh, devices=devices)
    batch = programs.training_batch(network, train.global_batch_size, **about)
    lower = lambda: programs.lower_training(task, train, mesh, batch)
    return "", mesh, train.global_batch_size, {"diffusion": network}, lower


def _sample(args, devices):
    return _sampler(args, devices, decoding=False)


def _decode(args, devices):
    return _sampler(args, devices, decoding=True)


def _sampler(args, devices, decoding: bool):
    import jax

    from sfd_jax.diffusion.sample_config import SampleJob
    from sfd_jax.distributed import make_mesh
    from sfd_jax.experiment.build import diffusion_settings, layout_from_config, network_from_config
    from sfd_jax.pod import programs

    config, layout = args.config, layout_from_config(args.config)
    sample = SampleJob.from_group(config.sample)
    networks = {"diffusion": network_from_config(config)}
    if sample.guidance == "autoguidance":
        networks["weak"] = network_from_config(load_config(args.weak or _in_size_b(args.config_name)))
    elif args.weak:
        raise SfdError(f"--weak={args.weak} has no effect with sample.guidance={sample.guidance}")
    mesh = make_mesh(fsdp=args.fsdp, devices=devices)
    rows = _a_chip(args, sample.batch_size) * mesh.size
    clocks = diffusion_settings(config)["clocks"]
    clocks = clocks.bind(clocks.init(jax.random.key(0)))

    def lower():
        return programs.lower_sampling(
            networks["diffusion"], networks.get("weak"), layout, clocks, sample, mesh, rows, decoding
        )

    points = "" if sample.solver == "dopri5" else f" of {sample.num_steps} points"
    how = "" if decoding else f", {sample.mode} {sample.solver}{points}, guidance {sample.guidance}"
    return how, mesh, rows, networks | {"texture VAE": programs.texture_vae(layout)}, lower


def _extract(args, devices):
    from sfd_jax.data.extract import ExtractConfig
    from sfd_jax.distributed import make_mesh
    from sfd_jax.experiment.build import layout_from_config
    from sfd_jax.experiment.extraction import make_encoder
    from sfd_jax.pod import programs

    networks = programs.extraction_networks(layout_from_config(args.config))
    pixels = networks["texture_vae"].config.downsampling
    size = args.config.model.input_size * pixels
    config = ExtractConfig(image_size=size, tile_size=args.config.data.tile_grid * pixels)
    encoder = make_encoder(networks, config)
    mesh = make_mesh(devices=_first_host(devices))  # each host has its own program, and encodes its own images
    rows = _a_chip(args, config.batch_size) * mesh.size
    lower = lambda: programs.lower_extraction(encoder, mesh, rows, size)
    return f", {size} px, on each host", mesh, rows, networks, lower


def _inception(args, devices):
    from sfd_jax.distributed import make_mesh
    from sfd_jax.experiment.build import layout_from_config
    from sfd_jax.pod import programs

    vae = programs.texture_vae(layout_from_config(args.config))
    image_size = args.config.model.input_size * vae.config.downsampling
    mesh = make_mesh(devices=devices)
    rows = _a_chip(args, 64) * mesh.size
    lower = lambda: programs.lower_inception(mesh, rows, image_size)
    return f", {image_size} px", mesh, rows, {"inception": programs.inception()}, lower


PROGRAMS = {"train": _train, "sample": _sample, "decode": _decode, "extract": _extract, "inception": _inception}


def _first_host(devices) -> list:
    first = min(device.process_index for device in devices)
    return [device for device in devices if device.process_index == first]


def _a_chip(args, default: int) -> int:
    return default if args.batch_size is None else args.batch_size


def _in_size_b(config_name: str) -> str:
    """Return the name of the same config in size b, e.g. configs/sfd.py:b,tiny for configs/sfd.py:xl,tiny."""
    path, _, argument = config_name.partition(":")
    return f"{path}:{','.join(['b', *argument.split(',')[1:]])}"


if __name__ == "__main__":
    import sys

    from sfd_jax.cli.main import open_door

    sys.exit(open_door(main, "compile_pod", sys.argv[1:]))
