"""Learned clocks for a run: train the probe, freeze its curve, and give the run a config with it.

The run's folder gets probe/ (an ordinary run), learned_clocks.json (the curve, and its history over the probe's steps)
and learned_clocks.png. The same command continues after an interruption, in the probe as in the run.
"""

import dataclasses
import json
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from sfd_jax.data.pipeline import latent_transform
from sfd_jax.diffusion.clocks import FixedOffset, clocks_config, make_clocks, split_params
from sfd_jax.diffusion.learned_clocks import Learned, TrainedCurve
from sfd_jax.diffusion.predictions import describe_transport
from sfd_jax.distributed import barrier, is_host0, say
from sfd_jax.errors import Faults, SfdError
from sfd_jax.experiment import build
from sfd_jax.experiment.figures import figure
from sfd_jax.experiment.run import Run, train
from sfd_jax.experiment.training_data import check_data, completed, open_source, used_parts
from sfd_jax.files import write_anywhere
from sfd_jax.pod.flops import program_flops
from sfd_jax.pod.programs import training_batch
from sfd_jax.settings import from_group
from sfd_jax.training import Task
from sfd_jax.training.logging import read_metrics
from sfd_jax.training.loop import check_workdir
from sfd_jax.training.probe import ProbeConfig, probe_task

FILE = "learned_clocks.json"


def with_learned_clocks(
    config: ConfigDict, workdir: str, found: Faults | None = None, *, check: bool = False
) -> ConfigDict:
    """Return a config with the learned curve as its clocks; train the probe where that is not done yet.

    Args:
      config: of a diffusion run; returned as it is if it has no group `probe`.
      workdir: folder of the run.
      found: faults found so far.
      check: train nothing; without a learned curve the clocks are those at the start.

    Raises:
      SfdError: the probe contradicts the config, or the folder holds the curve of another probe.
    """
    if "probe" not in config:
        return config
    if config.probe.path:
        return _with_clocks(config, read_learned_clocks(config.probe.path)["clocks"])
    found = Faults() if found is None else found
    if None in (config.model.num_classes, config.model.input_size):
        with found:
            config = completed(config, open_source(config.data.path, repa=False))
        found.stop()
    curve, run = open_probe(config, found)
    folder, learned = f"{workdir}/probe", {"clocks": clocks_config(curve.start)}
    if (epath.Path(workdir) / FILE).exists():
        check_workdir(run.task, run.train, folder, seed=config.seed, metadata=run.record())
        learned = read_learned_clocks(workdir)
    elif not check:
        state = train(run, folder, table=False)
        frozen = curve.bind(split_params(jax.device_get(state.ema_params))[1]).freeze()
        learned = {"clocks": clocks_config(frozen), "share_of_flops": probe_share(config, run.task)}
        learned["history"] = [row for row in read_metrics(folder) if "wait" in row]
        if is_host0():
            draw_curve(learned, epath.Path(workdir) / "learned_clocks.png")
            write_anywhere(epath.Path(workdir) / FILE, json.dumps(learned, indent=1))
        barrier("the learned clocks are saved")
        say(f"learned clocks: {frozen}; the probe took {learned['share_of_flops']:.2%} of the run's training FLOPs")
    return _with_clocks(config, learned["clocks"])


def read_learned_clocks(workdir: str) -> dict[str, Any]:
    """Return what a run learned: "clocks" (for `make_clocks`), "share_of_flops" and "history", a dict a log line.

    Raises:
      SfdError: the run has learned no clocks.
    """
    file = epath.Path(workdir) / FILE
    if not file.exists():
        raise SfdError(f"no {FILE} in {workdir}: give the folder of a run that learned its clocks")
    return json.loads(file.read_text())


def _with_clocks(config: ConfigDict, clocks: dict) -> ConfigDict:
    config = config.copy_and_resolve_references().unlock()
    del config.probe  # what it learned is in the clocks, how is in probe/run.json
    config.clocks = ConfigDict(clocks | {"shape": tuple(clocks["shape"])})
    return config.lock()


def open_probe(config: ConfigDict, found: Faults) -> tuple[TrainedCurve, Run]:
    """Open the run of the probe of a config with a group `probe`.

    Args:
      config: of the diffusion run, sizes given.
      found: faults found so far.

    Returns:
      The curve as it starts, and the run.

    Raises:
      SfdError: values contradict each other or the latents; all faults are named.
    """
    layout = build.layout_from_config(config)
    with found:
        probe = from_group(ProbeConfig, config.probe, "config group 'probe'")
        settings = build.diffusion_settings(config)
        start, loss = settings["clocks"], settings["config"]
        if not isinstance(start, Learned) or not layout.semantic_channels or not config.model.two_clocks:
            raise SfdError(
                f"the probe learns two clocks, but clocks.name={config.clocks.name}, model.two_clocks="
                f"{config.model.two_clocks}, latents.semantic_channels={layout.semantic_channels}: leave out the "
                "variant learned_clocks, or what is beside it"
            )
        if describe_transport(loss.path, loss.prediction):
            raise SfdError("learned clocks need loss.path=linear and loss.prediction=velocity")
    found.stop()
    # E|u|^2 of a channel is that of normalised data and noise, the same for both groups.
    start = dataclasses.replace(start, energy_ratio=layout.texture_channels / layout.semantic_channels)
    curve = TrainedCurve(start, gain=probe.curve_learning_rate / probe.learning_rate)
    source = open_source(config.data.path, repa=False)
    with found:
        check_data(config, source, found, repa=False)
    found.stop()
    small = config.copy_and_resolve_references().unlock()
    small.model.update(dict(width=probe.width, depth=probe.depth, num_heads=probe.num_heads, repa_features=0))
    network = build.network_from_config(small)
    # What decides the probe's numbers, and nothing that the run may change when it is resumed.
    groups = ("seed", "mesh", "latents", "clocks", "loss", "probe", "data")
    small = ConfigDict({name: small[name] for name in groups})
    statistics, origin = used_parts(layout, source)
    metadata = {"latent_statistics": statistics.to_dict(), "latents": origin}
    transform = latent_transform(layout, statistics, repa=False)
    task = probe_task(network, layout, curve, loss, probe)
    return curve, Run(task, probe.train, small, source, transform, metadata, cache=len(source) <= 10_000)


def probe_share(config: ConfigDict, probe: Task) -> float:
    """Return the FLOPs of the probe's training over those of the run's training, by count; without REPA's encoder."""
    tasks, rows = {"probe": probe, "train": build.task_from_config(config)}, 8
    total = {}
    for name, task in tasks.items():
        stored = "stored" if task.network.config.repa_features and config.loss.repa_weight else "none"
        batch = training_batch(task.network, rows, repa_source=stored, image_size=0)
        batch["row_indices"] = jax.ShapeDtypeStruct((rows,), np.int32)
        key = jax.eval_shape(lambda: jax.random.key(0))
        grad = jax.make_jaxpr(jax.grad(task.loss, has_aux=True))(jax.eval_shape(task.init, key), batch, key)
        total[name] = program_flops(grad) * config[name].steps * config[name].global_batch_size
    return total["probe"] / total["train"]


def draw_curve(learned: dict[str, Any], path: epath.Path) -> None:
    """Draw a learned curve beside the fixed offset's, and its history.

    Args:
      learned: as `read_learned_clocks` returns it.
      path: PNG to write, local or gs://.
    """
    with figure(path, 9, 4) as drawn:
        if drawn is None:
            return
        square, history = drawn.subplots(1, 2)
        for clocks, label in ((FixedOffset(), "fixed offset 0.3"), (make_clocks(learned["clocks"]), "learned")):
            square.plot(*clocks.times(np.linspace(0, clocks.tau_end, 301, dtype=np.float32)), label=label)
        square.set(xlabel="t_semantic", ylabel="t_texture", aspect="equal")
        for name in ("wait", "rest", "corrected_loss", "kinetic_energy"):
            history.plot(*zip(*((row["step"], row[name]) for row in learned["history"]), strict=True), label=name)
        history.set(xlabel="step of the probe")
        for axis in (square, history):
            axis.legend()
            axis.grid(alpha=0.3)
