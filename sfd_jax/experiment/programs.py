"""From a config to programs compiled ahead of time for a TPU slice, and their measurements; see `sfd_jax.pod`."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sfd_jax import libtpu
from sfd_jax.data.extract import ExtractConfig
from sfd_jax.diffusion.sample_config import SampleJob
from sfd_jax.distributed import make_mesh
from sfd_jax.errors import SfdError, nearest
from sfd_jax.experiment import build
from sfd_jax.experiment.config_files import load_config
from sfd_jax.experiment.extraction import make_encoder
from sfd_jax.experiment.targets import REPA_SOURCES
from sfd_jax.models import Network
from sfd_jax.models.encoders.tiles import RELEASED_GRID
from sfd_jax.pod import Measurement, Topology, measure, programs, topology_devices


@dataclasses.dataclass(frozen=True)
class Program:
    """A program that can be traced.

    Attributes:
      about: details for its name.
      mesh: the devices it is compiled for.
      rows: images at once over all devices.
      networks: those whose weights are on the devices, by name.
      trace: traces the program.
    """

    about: str
    mesh: Mesh
    rows: int
    networks: dict[str, Network]
    trace: Callable[[], jax.stages.Traced]


def measure_program(
    what: str, config_name: str, config: ConfigDict, topology: Topology, *, flags: str = "none", **options: Any
) -> Measurement:
    """Compile a program for a topology and measure it; this process must not use a TPU.

    Args:
      what, config_name, config, options: as `open_program` takes them.
      topology: the slice.
      flags: names of sets of libtpu's flags, joined by "+".

    Raises:
      SfdError: libtpu is missing, the topology is unknown, or as `open_program`.
    """
    program = open_program(what, config_name, config, topology_devices(topology), **options)
    return measure(
        program.trace,
        program=f"{what} {config_name}{program.about}",
        topology=topology,
        mesh=program.mesh,
        batch=program.rows,
        parameters={name: network.num_params() for name, network in program.networks.items()},
        flags=libtpu.flags_of(flags, topology.name.partition(":")[0]),
    )


def open_program(
    what: str,
    config_name: str,
    config: ConfigDict,
    devices: list,
    *,
    batch_size: int | None = None,
    weak: str | None = None,
    fsdp: int | None = None,
) -> Program:
    """Make a program from a config.

    Args:
      what: "train", "sample", "decode", "extract" or "inception".
      config_name: the name of the config, e.g. "configs/sfd.py:xl".
      config: with the groups of configs/sfd.py.
      devices: to compile for, of this machine or of a topology.
      batch_size: images per chip of programs other than "train"; None: the config's, or 64.
      weak: config of AutoGuidance's weaker model; None: the same config in size b.
      fsdp: number of devices that the sampler's parameters are sharded over.

    Raises:
      SfdError: the config, batch or mesh does not fit the devices.
    """
    if what == "train":
        return _train(config_name, config, devices)
    if what == "extract":
        return _extract(config, devices, batch_size)
    if what == "inception":
        return _inception(config, devices, batch_size)
    models = {"diffusion": build.network_from_config(config)}
    if config.sample.guidance == "autoguidance":
        models["weak"] = build.network_from_config(load_config(weak or in_size_b(config_name)))
    elif weak:
        raise SfdError(f"--weak={weak} has no effect with sample.guidance={config.sample.guidance}")
    mesh = make_mesh(fsdp=fsdp or 1, devices=devices)
    return _sampler(config, models, mesh, batch_size, decoding=what == "decode")


def _train(config_name: str, config: ConfigDict, devices: list) -> Program:
    train, layout = build.train_config(config), build.layout_from_config(config)
    network = build.task_from_config(config).network
    source = config.data.repa_source if config.loss.repa_weight > 0 else "none"
    if source not in (*REPA_SOURCES, "none"):
        raise SfdError(f"data.repa_source='{source}' is unknown; {nearest(source, REPA_SOURCES)}")
    about = {"repa_source": source, "image_size": config.data.images.image_size}
    targets = programs.training_targets(network, layout, tile_grid=config.data.tile_grid or RELEASED_GRID, **about)
    teachers = _teachers(config, config_name) if "few_step" in config else {}
    task = build.few_step_from_config(config, teachers) if teachers else build.task_from_config(config, targets)
    mesh, rows = make_mesh(**config.mesh, devices=devices), train.global_batch_size
    batch = programs.training_batch(network, rows, **about)
    trace = lambda: programs.trace_training(task, train, mesh, batch)
    networks = {"diffusion": network} | {name: teacher for name, (teacher, _) in teachers.items()}
    return Program("", mesh, rows, networks, trace)


def _teachers(config: ConfigDict, config_name: str) -> dict[str, tuple[Network, dict]]:
    """Return the frozen networks of few-step training with shapes for parameters; the weaker one has size b."""
    configs = {"teacher": config}
    if config.few_step.guidance == "autoguidance":
        configs["weak"] = load_config(in_size_b(config_name))
    networks = {name: build.network_from_config(each, end_time=False) for name, each in configs.items()}
    return {name: (network, network.abstract_params()) for name, network in networks.items()}


def _sampler(
    config: ConfigDict, models: dict[str, Network], mesh: Mesh, batch_size: int | None, *, decoding: bool
) -> Program:
    sample, layout = SampleJob.from_group(config.sample), build.layout_from_config(config)
    rows = (batch_size or sample.batch_size) * mesh.size
    clocks = build.diffusion_settings(config)["clocks"]
    clocks = clocks.bind(clocks.init(jax.random.key(0)))
    points = "" if sample.solver == "dopri5" else f" of {sample.num_steps} points"
    points = f" of NFE {sample.nfe}" if sample.nfe else points
    about = "" if decoding else f", {sample.mode} {sample.solver}{points}, guidance {sample.guidance}"
    parts = (models["diffusion"], models.get("weak"), layout, clocks, sample, mesh, rows, decoding)
    networks = models | {"texture VAE": programs.texture_vae(layout)}
    return Program(about, mesh, rows, networks, lambda: programs.trace_sampling(*parts))


def _extract(config: ConfigDict, devices: list, batch_size: int | None) -> Program:
    networks = programs.extraction_networks(build.layout_from_config(config))
    pixels = networks["texture_vae"].config.downsampling
    size = config.model.input_size * pixels
    settings = ExtractConfig(image_size=size, tile_size=(config.data.tile_grid or RELEASED_GRID) * pixels)
    encoder = make_encoder(networks, settings)
    first = min(device.process_index for device in devices)
    # Each host runs its own program on its own images.
    mesh = make_mesh(devices=[device for device in devices if device.process_index == first])
    rows = (batch_size or settings.batch_size) * mesh.size
    trace = lambda: programs.trace_extraction(encoder, mesh, rows, size)
    return Program(f", {size} px, on each host", mesh, rows, networks, trace)


def _inception(config: ConfigDict, devices: list, batch_size: int | None) -> Program:
    size = config.model.input_size * programs.texture_vae(build.layout_from_config(config)).config.downsampling
    mesh = make_mesh(devices=devices)
    rows = (batch_size or 64) * mesh.size
    trace = lambda: programs.trace_inception(mesh, rows, size)
    return Program(f", {size} px", mesh, rows, {"inception": programs.inception()}, trace)


def in_size_b(config_name: str) -> str:
    """Return the name of the same config in size b, e.g. configs/sfd.py:b,tiny for configs/sfd.py:xl,tiny."""
    path, _, argument = config_name.partition(":")
    return f"{path}:{','.join(['b', *argument.split(',')[1:]])}"
