"""Check by their metadata that checkpoints belong together; `sampler.py` compares shapes."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from sfd_jax.class_names import readable
from sfd_jax.diffusion.clocks import Clocks, FixedOffset, Synchronous, make_clocks, split_params
from sfd_jax.errors import SfdError
from sfd_jax.latents import LatentStatistics, other_makers
from sfd_jax.models.network import checkpoint_name
from sfd_jax.training.optimizer import average_notes

Checkpoint = tuple[dict, dict]  # (params, metadata), as `training.checkpoint.load_params` returns


def check_parts(
    model: Checkpoint,
    texture_vae: Checkpoint,
    weak: Checkpoint | None,
    hashes: Mapping[str, str],
    statistics: LatentStatistics,
    image_size: int,
    other_texture_vae: bool,
) -> list[str]:
    """Check that the checkpoints of a sampler belong together.

    Args:
      model, texture_vae, weak: the checkpoints.
      hashes: "model", "texture_vae" and "weak" (if given) -> `params_hash`.
      statistics: of the latents that the model was trained on.
      image_size: side of the sampled images, in pixels.
      other_texture_vae: allow another texture VAE than the one that made the latents.

    Returns:
      Notes on what could not be compared or was allowed.

    Raises:
      SfdError: two checkpoints do not belong together; both are named.
    """
    notes = _check_texture_vae(model[1], texture_vae[1], hashes["texture_vae"], other_texture_vae)
    made_from = (model[1].get("latents") or {}).get("image_size")
    if made_from not in (None, image_size):
        notes.append(f"the samples have {image_size} px; the model's latents were made from images of {made_from} px")
    if weak is not None:
        notes += _check_weak(model, weak, hashes, statistics)
    known = (model[1].get("network_config") or {}).get("num_classes", 0)
    trained = trained_labels(model[1], known)
    if len(trained) < known:
        notes.append(
            f"{checkpoint_name(model[1])} has {known} classes, of which {len(trained)} were trained ({trained[0]}.."
            f"{trained[-1]}): balanced and random labels are taken from those, others are refused"
        )
    # No note on the texture VAE: its weights made the latents, and `sfd extract` gave the note.
    return notes + average_notes(model[1]) + (average_notes(weak[1]) if weak else [])


def clocks_of(metadata: Mapping[str, Any]) -> Clocks:
    """Return the clocks in a diffusion model's metadata; if there are none, the released pair, or one clock for a
    network with one clock.

    Raises:
      SfdError: the module that defines them is not imported.
    """
    if config := (metadata.get("config") or {}).get("clocks"):
        return make_clocks(config, (metadata.get("registered_in") or {}).get("clocks"))
    return FixedOffset() if metadata["network_config"].get("two_clocks", True) else Synchronous()


def trained_labels(metadata: Mapping[str, Any], num_classes: int) -> np.ndarray:
    """Return the labels that a model was trained on, sorted; all of them if its metadata do not say."""
    labels = (metadata.get("latents") or {}).get("labels")
    if labels is None:
        labels = range(min(num_classes, len(metadata.get("class_names") or ()) or num_classes))
    return np.array([label for label in labels if label < num_classes], np.int32)


def _check_texture_vae(model: Mapping, texture_vae: Mapping, given: str, allowed: bool) -> list[str]:
    made_by = made_latents(model)
    model_name, vae_name = checkpoint_name(model), checkpoint_name(texture_vae)
    if made_by is None:
        return [
            f"{model_name} does not say which texture VAE made its latents; {vae_name} was compared by channels alone"
        ]
    if made_by == given and allowed:
        raise SfdError(f"--other_texture_vae has no effect: {vae_name} made {model_name}'s latents; leave it out")
    if made_by == given:
        return []
    differing = f"{vae_name} ({given[:12]}) is not the texture VAE that made {model_name}'s latents ({made_by[:12]})"
    if not allowed:
        raise SfdError(f"{differing}: give that one, or --other_texture_vae to use another decoder of the same latents")
    return [f"{differing}, as --other_texture_vae allows"]


def made_latents(metadata: Mapping[str, Any]) -> str | None:
    """Return the hash of the texture VAE that made a model's latents; None if its metadata do not say."""
    return ((metadata.get("latents") or {}).get("weights") or {}).get("texture_vae")


def _check_weak(model: Checkpoint, weak: Checkpoint, hashes: Mapping, statistics: LatentStatistics) -> list[str]:
    ours, theirs = model[1], weak[1]
    names = f"{checkpoint_name(theirs)}, the weak model, and {checkpoint_name(ours)}"
    if hashes["weak"] == hashes["model"]:
        raise SfdError(f"{names} are the same network, so guidance has no effect; give a weaker one")
    if differing := other_makers(theirs.get("latents"), ours.get("latents")):
        raise SfdError(f"{names} were trained on latents of other networks: {'; '.join(differing)}")
    weak_statistics = theirs.get("latent_statistics")
    if weak_statistics and not statistics.same_scale(LatentStatistics.from_dict(weak_statistics)):
        raise SfdError(f"{names} were trained with different latent statistics; give models of the same latents")
    if None not in (pair := [readable(each.get("class_names")) for each in (theirs, ours)]) and pair[0] != pair[1]:
        raise SfdError(f"{names} have different class names: a label would mean two classes")
    classes = [trained_labels(each, each["network_config"]["num_classes"]) for each in (theirs, ours)]
    if missing := sorted(set(classes[1].tolist()) - set(classes[0].tolist())):
        raise SfdError(
            f"{names} have different classes: the weak model lacks {len(missing)}, the first is {missing[0]}"
        )
    clocks = [clocks_of(each) for each in (theirs, ours) if (each.get("config") or {}).get("clocks")]
    if len(clocks) == 2 and clocks[0] != clocks[1]:
        raise SfdError(f"{names} were trained with different clocks: {clocks[0]} and {clocks[1]}")
    notes, trained = [], [split_params(params)[1] for params, _ in (weak, model)]
    if not jax.tree.all(jax.tree.map(np.array_equal, *trained)):
        notes.append(
            f"{names} learned different clocks: the weak model is evaluated at the times of the other's clocks"
        )
    sizes = [sum(np.size(leaf) for leaf in jax.tree.leaves(params)) for params, _ in (weak, model)]
    steps = [each.get("step") or 0 for each in (theirs, ours)]
    if sizes[0] > sizes[1] or (sizes[0] == sizes[1] and steps[0] > steps[1]):
        size = f"{sizes[0]:,} and {sizes[1]:,} parameters, {steps[0]:,} and {steps[1]:,} steps"
        notes.append(f"{names} have {size}: the weak model is the stronger one; are they swapped?")
    return notes
