"""Topologies, measurements, plans and their two commands; and one small program compiled for real."""

import dataclasses
import importlib.util
import json
import re

import jax
import numpy as np
import pytest

from sfd_jax import libtpu
from sfd_jax.cli import compile_pod
from sfd_jax.cli import plan as plan_command
from sfd_jax.errors import SfdError
from sfd_jax.experiment.config_files import load_config
from sfd_jax.experiment.programs import in_size_b, open_program
from sfd_jax.pod import make_plan, report, table
from sfd_jax.pod.chips import CHIPS, Topology, topology_devices
from sfd_jax.pod.hlo import Schedule, Traffic
from sfd_jax.pod.plan import plan_table

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu: `bash scripts/setup.sh pod`"
)


@pytest.mark.parametrize(
    "name, chips",
    [("v5e:1x1", 1), ("v5e:4x8", 32), ("v6e:2x4", 8), ("v5p:2x2x2", 8), ("v4:2x2x1", 4), ("v4:4x4x8", 128)],
)
def test_topologies_count_their_chips(name, chips):
    assert Topology(name).count == chips and Topology(name, slices=3).count == 3 * chips


@pytest.mark.parametrize(
    "name, slices, said",
    [
        ("v5x:4x4", 1, "no chip 'v5x'; did you mean 'v5"),
        ("v5e:3x3", 1, "v5e has slices of 1x1, 2x2, 2x4"),
        ("v5e", 1, "v5e has slices of"),
        ("v4:4x4", 1, "v4 has slices of 2x2x1"),
        ("v5p:8x4x4", 1, "three multiples of 4 up to 24 in ascending order"),
        ("v5e:4x4", 0, "slices=0"),
    ],
)
def test_unknown_topologies_name_the_known_ones(name, slices, said):
    with pytest.raises(SfdError, match=said):
        Topology(name, slices)


def test_a_missing_libtpu_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    with pytest.raises(SfdError, match="scripts/setup.sh pod"):
        compile_pod.main(["--topology=v5e:2x2", "--config=configs/sfd.py:xl,tiny"])


GIB = 2**30


def measurement(peak_gib=4.0, **changes):
    """Return a measured step of 5 GFLOPs and 4 rows per chip on 4 chips."""
    memory = report.Memory(
        arguments=GIB, outputs=GIB, aliased=GIB, temporaries=int((peak_gib - 1) * GIB), code=0, live=GIB
    )
    fields = dict(
        program="train",
        topology=Topology("v5e:2x2"),
        mesh={"data": 1, "fsdp": 4},
        batch=16,
        parameters={"diffusion": 7_000_000},
        memory=memory,
        needed=memory.peak,
        flops=5e9,
        traffic=Traffic({"all-gather": GIB}, {"all-gather": 3}, ()),
        lower_seconds=1.0,
        compile_seconds=2.0,
    )
    return report.Measurement(**{**fields, **changes})


def test_peak_is_compared_with_usable_memory():
    # Arguments and outputs share their memory here; 15.75 GiB of a v5e's 16 can be used.
    assert measurement(4.0).needed == 4 * GIB
    assert measurement(15.75).fits and not measurement(15.76).fits
    too_large = measurement(memory=None, needed=20 * GIB, traffic=None)
    assert not too_large.fits
    assert "does not fit" in table(too_large) and "20.000 GiB" in table(too_large)


@pytest.mark.parametrize(
    "message, size",
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (20.50G) "
            "exceeds available HBM (15.75G).",
            20.5 * GIB,
        ),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.25G of 15.75G hbm.", 17.25 * GIB),
        ("INVALID_ARGUMENT: something else (3.00G)", None),
    ],
)
def test_memory_is_read_from_the_compilers_error(message, size):
    assert report.needed_bytes(message) == size


def test_a_plan_is_arithmetic():
    plan = make_plan(
        measurement(),
        utilisation=0.5,
        images=100,
        texture_shape=(2, 2, 3),
        semantic_shape=(2, 2, 1),
        repa_shape=(4, 5),
        keep_last=2,
        keep_every=10,
        epochs=(8,),
    )
    assert plan.step_seconds == 5e9 / (197e12 * 0.5)
    assert plan.images_a_second == 16 / plan.step_seconds
    # Two orientations of 16 bfloat16 values, a label and an index; 20 float16 features for each orientation.
    assert plan.latent_bytes == 100 * (2 * 16 * 2 + 4 + 8)
    assert plan.repa_bytes == 100 * 2 * 20 * 2
    assert plan.checkpoint_bytes == 7_000_000 * 16
    (length,) = plan.lengths
    assert length.steps == 50 and length.hours == 50 * plan.step_seconds / 3600
    assert length.chip_hours == 4 * length.hours
    assert length.checkpoint_bytes == (2 + 5) * plan.checkpoint_bytes
    assert "estimate" in plan_table(plan) and "8 epochs" in plan_table(plan)
    assert json.dumps(plan.to_dict() | {"step": None})


@pytest.mark.parametrize("command", [compile_pod, plan_command])
@pytest.mark.parametrize("peak, status", [(4.0, 0), (16.0, 1)])
def test_the_exit_status_says_whether_it_fits(command, peak, status, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(command, "measured", lambda *_: measurement(peak))
    monkeypatch.setattr(report, "machine", lambda: {})
    file = tmp_path / "numbers.json"
    assert command.main(["--topology=v5e:2x2", f"--json={file}"]) == status
    assert ("not fit" in capsys.readouterr().out) == bool(status)
    numbers = json.loads(file.read_text())
    assert numbers.get("step", numbers)["needed"] == peak * GIB


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--topology=v5e:2x2", "--utilisation=0"], "utilisation"),
        (["--topology=v5e:2x2", "--images=0"], "images"),
        ([], "--topology"),
    ],
)
def test_impossible_flags_of_a_plan(flags, said):
    with pytest.raises(SfdError, match=said):
        plan_command.main(flags)


def test_weak_models_default_to_the_same_config_in_size_b():
    assert in_size_b("configs/sfd.py:xl,tiny") == "configs/sfd.py:b,tiny"
    assert in_size_b("configs/sfd.py") == "configs/sfd.py:b"


@pytest.mark.parametrize("what", ["decode", "extract", "inception"])
def test_the_texture_vae_of_dit_is_f8(what):
    config = load_config("configs/sfd.py:s,dit")
    program = open_program(what, "configs/sfd.py:s,dit", config, jax.devices()[:1], batch_size=1)
    vae = program.networks.get("texture VAE") or program.networks.get("texture_vae")
    assert vae is None or (vae.config.downsampling, vae.config.z_channels) == (8, 4)
    assert what == "decode" or program.about.startswith(", 256 px")


@needs_libtpu
@pytest.mark.slow
def test_a_training_step_compiles_for_a_slice(tmp_path, capsys):
    """The real step of a small network on four chips, with memory, FLOPs and traffic as expected."""
    file = tmp_path / "numbers.json"
    flags = [
        "--config=configs/sfd.py:xl,tiny",
        "--topology=v5e:2x2",
        "--config.train.global_batch_size=16",
        "--config.model.width=128",
        "--config.model.remat=full",
        f"--json={file}",
    ]
    assert compile_pod.main(flags) == 0
    assert "fits" in capsys.readouterr().out
    numbers = json.loads(file.read_text())
    assert numbers["mesh"] == {"data": 1, "fsdp": 4} and numbers["chip"]["usable"] == CHIPS["v5e"].usable
    # Parameters, EMA and two moments, a quarter on each chip except arrays too small to shard.
    whole = 16 * sum(numbers["parameters"].values())
    memory = numbers["memory"]
    assert whole / 4 < memory["arguments"] < whole / 4 + 0.2 * whole
    assert 0.9 * memory["arguments"] < memory["aliased"] <= memory["outputs"]  # the state is donated
    assert memory["peak"] < 0.1 * GIB
    # Forward, again and backward: 8 FLOPs per token and weight of the three blocks, 6 for the last weights of a block,
    # whose product is not recomputed; a chip has 4 times 16 tokens. The rest (attention, modulation, embedding,
    # projector, final layer) is small in comparison.
    last = 3 * 128 * 341
    weights = 3 * 128 * (3 * 128 + 128) + 3 * last
    assert 1 < numbers["flops"] / (64 * (8 * weights - 2 * last)) < 1.2
    # fsdp gathers the weights, forward and backward, in two bytes each, and no activations.
    assert 1 < numbers["traffic"]["sent"]["all-gather"] / (2 * 2 * weights) < 2
    assert not numbers["traffic"]["unknown_loops"]


@needs_libtpu
def test_batches_and_meshes_that_do_not_fit_a_topology():
    tiny = ["--config=configs/sfd.py:xl,tiny", "--topology=v5e:4x4"]
    with pytest.raises(SfdError, match="global_batch_size=8 does not divide over 16 devices"):
        compile_pod.main(tiny)
    with pytest.raises(SfdError, match="mesh.data=1 does not divide over 2 slices"):
        compile_pod.main([*tiny, "--slices=2", "--config.mesh.data=1"])
    with pytest.raises(SfdError, match="batch_size=0"):
        compile_pod.main([*tiny, "--what=inception", "--batch_size=0"])


def test_sets_of_flags_are_compared(monkeypatch, tmp_path, capsys):
    given = lambda args, what, flags: measurement(16.0 if flags == "none" else 4.0, schedule=Schedule(0, GIB, 0, 0.02))
    monkeypatch.setattr(compile_pod, "measured", given)
    monkeypatch.setattr(report, "machine", lambda: {})
    file = tmp_path / "numbers.json"
    assert compile_pod.main(["--topology=v5e:2x2", "--flags=none,default", f"--json={file}"]) == 1
    assert list(json.loads(file.read_text())) == ["none", "default"]
    assert re.search(r"none +16.000 .*\ndefault +4.000 +1.000 +1.000 +0.000 +20 ", capsys.readouterr().out)
    assert libtpu.flags_of("none", "v5e") == {} and "xla_enable_async_all_gather" in libtpu.flags_of("default", "v6e")
    monkeypatch.setattr(compile_pod, "measured", None)  # refused before anything is compiled
    with pytest.raises(SfdError, match="no set of flags 'defautl'.*default"):
        compile_pod.main(["--topology=v5e:2x2", "--flags=none,none+defautl"])


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_the_compiler_accepts_the_flags(topology):
    """For a program that gathers and sums: some flags are refused only there, on some chips."""
    devices = topology_devices(Topology(topology))
    rows = jax.sharding.NamedSharding(jax.sharding.Mesh(np.array(devices), ("x",)), jax.sharding.PartitionSpec("x"))
    square = jax.ShapeDtypeStruct((512, 512), np.float32, sharding=rows)
    program = jax.jit(jax.grad(lambda a, b: (jax.numpy.tanh(a @ b) @ b).sum())).trace(square, square).lower()
    text = program.compile().as_text()
    assert "all-gather" in text or "collective-permute" in text
    for name in libtpu.flag_sets():
        flags = libtpu.flags_of(name, topology.partition(":")[0])
        program.compile(compiler_options=flags)
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        program.compile(compiler_options=flags | {"xla_tpu_no_such_flag": "true"})


def test_measurements_are_plain_numbers(monkeypatch):
    monkeypatch.setattr(report, "machine", lambda: {"jax": "1"})
    values = json.loads(json.dumps(measurement().to_dict()))
    assert values["fits"] and values["memory"]["peak"] == 4 * GIB and values["flops"] == 5e9
    assert values["topology"] == {"name": "v5e:2x2", "slices": 1, "chips": 4}
    assert dataclasses.asdict(measurement())["batch"] == values["batch"]


def test_few_step_training_is_compiled_with_its_frozen_networks():
    name = "configs/sfd.py:xl,few_step,tiny"
    config = load_config(name, ["--config.few_step.guidance=autoguidance"])
    program = open_program("train", name, config, jax.devices()[:1])
    sizes = {name: network.num_params() for name, network in program.networks.items()}
    assert sizes.keys() == {"diffusion", "teacher", "weak"}
    arguments = sum(aval.size for aval in program.trace().jaxpr.in_avals)
    # Parameters, their average and two moments of the student; parameters alone of the others.
    needed = 4 * sizes["diffusion"] + sizes["teacher"] + sizes["weak"]
    assert needed < arguments < needed + 5000  # the batch and counters
