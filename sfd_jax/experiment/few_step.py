"""From a config with a group `few_step` and the checkpoint of a teacher to a `Run`."""

import jax
from ml_collections import ConfigDict

from sfd_jax.data.checks import check_labels
from sfd_jax.data.pipeline import latent_transform
from sfd_jax.diffusion.clocks import Clocks, clocks_config, split_params
from sfd_jax.diffusion.predictions import describe_transport, transport_of
from sfd_jax.distributed import start
from sfd_jax.errors import Faults, SfdError
from sfd_jax.experiment import build
from sfd_jax.experiment.checkpoints import OpenCheckpoint, open_checkpoint
from sfd_jax.experiment.previews import preview_config
from sfd_jax.experiment.run import Run
from sfd_jax.experiment.training_data import check_data, open_source, used_parts
from sfd_jax.generation.parts import clocks_of
from sfd_jax.latents import LatentStatistics, other_makers
from sfd_jax.models import Network
from sfd_jax.models.fingerprint import params_hash


def open_few_step(config: ConfigDict, found: Faults | None = None, *, init: str | None = None) -> Run:
    """Open a run that distils a trained model into a few-step model, which starts as its teacher.

    Args:
      config: with the groups of configs/sfd.py:xl,few_step. Network and clocks are replaced by the teacher's.
      found: faults found so far.
      init: not allowed.

    Raises:
      SfdError: values are unknown or contradict each other, or checkpoints and latents do not fit.
    """
    found, config = Faults() if found is None else found, config.copy_and_resolve_references().unlock()
    few_step, notes = config.few_step, []
    if init:
        found.append("--init has no effect here: a few-step model starts from --config.teacher")
    if not config.teacher:
        found.append("give the model to distil: --config.teacher=CKPT")
    if config.weak and few_step.guidance == "none":
        few_step.guidance = "autoguidance"
        notes.append(f"the weaker model guides the teacher by AutoGuidance, scale {few_step.guidance_scale:g}")
    elif config.weak and few_step.guidance != "autoguidance":
        found.append(f"--config.weak={config.weak} has no effect with few_step.guidance={few_step.guidance}")
    if few_step.guidance == "autoguidance" and not config.weak:
        found.append("few_step.guidance=autoguidance needs the weaker model: --config.weak=CKPT")
    with found:
        latents = open_source(config.data.path, repa=False)
    with found:
        train = build.train_config(config)
    preview = preview_config(config, found)
    found.stop()
    start()  # Orbax asks JAX for its devices
    opened = {"teacher": _open(config, "teacher")} | ({"weak": _open(config, "weak")} if config.weak else {})
    teacher, clocks = opened["teacher"], clocks_of(opened["teacher"].metadata)
    notes += _take(config, teacher.network, clocks)
    if few_step.guidance == "none":
        few_step.guidance_scale = 1.0
    elif few_step.guidance == "cfg" and not teacher.network.config.null_label:
        found.append(f"few_step.guidance=cfg needs a null label, which the teacher {config.teacher} lacks")
    if config.weak and clocks_of(opened["weak"].metadata) != clocks:
        found.append(
            f"--config.weak={config.weak} was trained with other clocks than --config.teacher={config.teacher}"
        )
    notes += check_data(config, latents, found, repa=False)
    found += check_labels(latents, config.model.num_classes)
    statistics, origin = used_parts(layout := build.layout_from_config(config), latents)
    for name, each in opened.items():
        theirs = each.metadata.get("latent_statistics")
        if differing := other_makers(each.metadata.get("latents"), origin):
            found.append(f"--config.{name}={config[name]} was trained on latents of another {differing[0]}")
        elif theirs and not LatentStatistics.from_dict(theirs).same_scale(statistics):
            found.append(
                f"--config.{name}={config[name]} was trained with other latent statistics than these latents have"
            )
    found.stop()
    task = build.few_step_from_config(config, {name: (each.network, each.params) for name, each in opened.items()})
    metadata = {"latent_statistics": statistics.to_dict(), "class_names": latents.class_names, "latents": origin}
    metadata["registered_in"] = build.registered_in(config)
    described = {
        name: {"hash": params_hash(each.params), "step": each.metadata.get("step")} for name, each in opened.items()
    }
    metadata["few_step"] = described | {name: few_step[name] for name in ("velocity", "guidance", "guidance_scale")}
    transform = latent_transform(layout, statistics, repa=False)
    more = dict(params=start_from(task.network, teacher.params, config.seed), notes=tuple(notes), preview=preview)
    return Run(task, train, config, latents, transform, metadata, **more)


def start_from(network: Network, teacher: dict, seed: int) -> dict:
    """Return the parameters with which a few-step network computes the same as its teacher, bit for bit.

    Args:
      network: the student's, with `end_time`.
      teacher: parameters of the same network without `end_time`; it may have a projector more.
      seed: for the arrays that the teacher lacks; the last layer of their embedding is zero.
    """
    new = jax.jit(lambda key: {name: tree for name, tree in network.init(key).items() if name not in teacher})
    params = {name: tree for name, tree in teacher.items() if name in network.abstract_params()}
    return params | new(jax.random.key(seed))


def _open(config: ConfigDict, name: str) -> OpenCheckpoint:
    flag, dtype = f"--config.{name}", config.model.compute_dtype
    opened = open_checkpoint(config[name], "lightning_dit", flag=flag, compute_dtype=dtype)
    if describe_transport(**transport_of(opened.metadata.get("config") or {})):
        raise SfdError(f"{flag}={config[name]} predicts no velocity of the linear path, which a few-step model needs")
    if split_params(opened.params)[1]:
        raise SfdError(f"{flag}={config[name]} has clocks that were trained with it, which few_step does not support")
    if opened.network.config.end_time:
        raise SfdError(f"{flag}={config[name]} is a few-step model itself: give the model it was trained from")
    return opened


def _take(config: ConfigDict, teacher: Network, clocks: Clocks) -> list[str]:
    """Put the teacher's network and clocks into the config, in place, and return a note on what changed."""
    ours = {"compute_dtype", "end_time", "repa_features", "repa_depth", "repa_projector", "repa_width"}
    values = {name: value for name, value in teacher.config_dict().items() if name not in ours}
    with config.ignore_type():
        changed = [f"{name} {value}" for name, value in values.items() if config.model.get(name) not in (None, value)]
        config.model.update(values)
    if config.clocks.to_dict() != clocks_config(clocks):
        changed.append(f"clocks {clocks}")
    config.clocks = ConfigDict(clocks_config(clocks))
    return [f"network and clocks are the teacher's: {', '.join(changed)}"] if changed else []
