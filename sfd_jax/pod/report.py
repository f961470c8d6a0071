"""Compile a program for a topology and measure memory, FLOPs, traffic and compile time."""

import dataclasses
import importlib.metadata
import importlib.util
import math
import os
import platform
import re
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from sfd_jax.pod.chips import Topology
from sfd_jax.pod.flops import program_flops
from sfd_jax.pod.hlo import Schedule, Traffic, read_schedule, read_traffic

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes that a program takes of one chip's HBM, and of its host.

    Attributes:
      arguments: of the program: state and batch, or parameters.
      outputs: of the program.
      aliased: outputs that are written over donated arguments.
      temporaries: XLA's allocation for everything else, including gaps.
      code: the program itself.
      live: XLA's peak of live memory; less than `peak`, which includes gaps.
      host: of the host's memory, for this chip.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int
    live: int
    host: int = 0

    @property
    def peak(self) -> int:
        """Memory that must be free on the chip."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One program on one topology.

    Attributes:
      program: description of the program.
      topology: the topology it was compiled for.
      mesh: axis -> size.
      batch: rows at once, over all chips of the mesh.
      parameters: network -> number of parameters.
      memory: of one chip; None if the program does not fit and the compiler gave up.
      needed: bytes that it needs at least on one chip.
      flops: of matrix products and convolutions in one run, per chip (the total divided evenly).
      traffic: of one chip in one run; None if `memory` is.
      schedule: of one chip in one run; None if `memory` is.
      flags: of libtpu's compiler, besides its defaults and LIBTPU_INIT_ARGS.
      lower_seconds, compile_seconds: wall clock of tracing and lowering, and of compiling.
    """

    program: str
    topology: Topology
    mesh: dict[str, int]
    batch: int
    parameters: dict[str, int]
    memory: Memory | None
    needed: int
    flops: float
    traffic: Traffic | None
    lower_seconds: float
    compile_seconds: float
    schedule: Schedule | None = None
    flags: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def fits(self) -> bool:
        return self.memory is not None and self.needed <= self.topology.chip.usable

    def to_dict(self) -> dict[str, Any]:
        """Return all fields and the machine as JSON-able values in bytes, FLOPs and seconds."""
        values = dataclasses.asdict(self)
        values["topology"] = {"name": self.topology.name, "slices": self.topology.slices, "chips": self.topology.count}
        if self.memory:
            values["memory"]["peak"] = self.memory.peak
        chip = self.topology.chip
        values["chip"] = {"memory": chip.memory, "usable": chip.usable, "matrix_rate": chip.matrix_rate}
        return {**values, "fits": self.fits, "machine": machine()}


def measure(
    trace: Callable[[], jax.stages.Traced],
    *,
    program: str,
    topology: Topology,
    mesh: Mesh,
    batch: int,
    parameters: dict[str, int],
    flags: dict[str, str] | None = None,
) -> Measurement:
    """Trace, lower, compile and measure a program.

    Args:
      trace: traces the program for the devices of `topology`.
      program, topology, batch, parameters, flags: as in `Measurement`.
      mesh: the mesh of the program.

    Returns:
      The measurement; for a program that is too large for the chip, `needed` instead of memory and traffic.
    """
    traced, lower_seconds, compile_seconds, answer = timed(trace, flags)
    if isinstance(answer, Exception):
        memory, traffic, schedule, needed = None, None, None, needed_bytes(str(answer))
        if needed is None:
            raise answer
    else:
        memory, text = read_memory(answer), answer.as_text()
        traffic, needed = read_traffic(text), memory.peak
        schedule = read_schedule(text, topology.chip.clock, topology.chip.link_rate)
    flops = program_flops(traced.jaxpr) / mesh.size
    seconds = (lower_seconds, compile_seconds)
    what = (program, topology, dict(mesh.shape), batch, parameters, memory, needed, flops, traffic)
    return Measurement(*what, *seconds, schedule, flags or {})


def timed(
    trace: Callable[[], jax.stages.Traced], flags: dict[str, str] | None = None
) -> tuple[jax.stages.Traced, float, float, jax.stages.Compiled | jax.errors.JaxRuntimeError]:
    """Trace, lower and compile; return the traced program, both times, and the compiled program or XLA's error."""
    begin = time.monotonic()
    traced = trace()
    lowered = traced.lower()
    middle = time.monotonic()
    try:
        answer = lowered.compile(compiler_options=flags or None)
    except jax.errors.JaxRuntimeError as error:
        answer = error
    return traced, middle - begin, time.monotonic() - middle, answer


def read_memory(compiled: jax.stages.Compiled) -> Memory:
    """Return XLA's memory analysis of a compiled program, which is that of one device."""
    stats = compiled.memory_analysis()
    return Memory(
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes,
        aliased=stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
        live=stats.peak_memory_in_bytes,
        host=stats.host_argument_size_in_bytes + stats.host_temp_size_in_bytes,
    )


def needed_bytes(message: str) -> int | None:
    """Return the memory per chip that a program needs, from the compiler's error; None for other errors."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    found = re.search(r"(?:Used|required for HLO temporaries \() ?([\d.]+)([KMG])", message)
    return int(float(found.group(1)) * {"K": 2**10, "M": 2**20, "G": 2**30}[found.group(2)]) if found else None


def machine() -> dict[str, Any]:
    """Return versions and cores of this machine."""
    return {
        "jax": jax.__version__,
        "libtpu": importlib.metadata.version("libtpu") if importlib.util.find_spec("libtpu") else None,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "date": time.strftime("%Y-%m-%d"),
    }


def table(m: Measurement) -> str:
    """Return a measurement as a table, with memory per chip in GiB."""
    chip, gib = m.topology.chip, lambda size: f"{size / GIB:8.3f} GiB"
    shape = " x ".join(f"{size} {axis}" for axis, size in m.mesh.items())
    rows = [
        ("program", f"{m.program}, batch {m.batch} ({m.batch / math.prod(m.mesh.values()):g} per chip)"),
        ("topology", f"{m.topology}: {m.topology.count} chips, mesh {shape}"),
        *((f"parameters, {name}", f"{count / 1e6:,.1f}M") for name, count in m.parameters.items()),
    ]
    if m.memory:
        rows += [
            ("arguments per chip", gib(m.memory.arguments)),
            ("  temporaries", gib(m.memory.temporaries)),
            ("  outputs", f"{gib(m.memory.outputs)}, {m.memory.aliased / GIB:.2f} GiB of them over donated arguments"),
            ("  program", gib(m.memory.code)),
        ]
        rows += [("of its host's memory", gib(m.memory.host))] if m.memory.host else []
    share = f"{m.needed / chip.usable:.0%} of the {chip.usable / GIB:g} GiB that a program may use"
    rows.append(("  peak" if m.memory else "needs at least", f"{gib(m.needed)}, {share}"))
    rows.append(("FLOPs per chip", f"{m.flops:.4g}, {m.flops / m.batch * math.prod(m.mesh.values()):.4g} per row"))
    if m.traffic:
        for kind, count in m.traffic.operations.items():
            rows.append((kind, f"{gib(m.traffic.sent[kind])} in {count:,} operations"))
        if m.traffic.unknown_loops:
            rows.append(
                ("counted once", "loops that end on a condition on the data: " + ", ".join(m.traffic.unknown_loops))
            )
    if m.schedule:
        rows += [
            ("sent while computing", f"{gib(m.schedule.overlapped)}, waited for {m.schedule.waited / GIB:.3f} GiB"),
            ("estimated time", f"{1e3 * m.schedule.seconds:.4g} ms, {_rate(m):.0%} of the matrix rate; not measured"),
        ]
    rows.append(("lowered, compiled", f"{m.lower_seconds:.1f} s, {m.compile_seconds:.1f} s on {os.cpu_count()} cores"))
    rows.append(("verdict", "fits" if m.fits else "does not fit"))
    return two_columns(rows)


def comparison(measurements: dict[str, Measurement]) -> str:
    """Return a table of the same program compiled with several sets of flags."""
    gib = lambda size: f"{size / GIB:.3f}"
    head = ["flags", "peak, GiB", "sent, GiB", "while computing", "waited for", "estimated ms", "compiled in, s"]
    rows = [head]
    for name, m in measurements.items():
        row = [name, gib(m.needed)]
        if m.memory:
            row += [gib(sum(m.traffic.sent.values())), gib(m.schedule.overlapped), gib(m.schedule.waited)]
            row += [f"{1e3 * m.schedule.seconds:.4g}", f"{m.compile_seconds:.0f}"]
        rows.append(row + ["-"] * (len(head) - len(row)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _rate(m: Measurement) -> float:
    return m.flops / m.schedule.seconds / m.topology.chip.matrix_rate


def two_columns(rows: list[tuple[str, str]]) -> str:
    """Return lines of names and values, with aligned values."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
