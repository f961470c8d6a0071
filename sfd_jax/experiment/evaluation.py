"""From image sets, a reference and checkpoints of extractors to reports: scores, notes and recipe."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from sfd_jax import __version__
from sfd_jax.distributed import is_host0, make_mesh
from sfd_jax.errors import SfdError, nearest
from sfd_jax.evaluation import (
    Comparison,
    Extractor,
    ImageSet,
    Reference,
    compare,
    encoder_extractor,
    gather,
    images_at_once,
    inception_extractor,
    save_statistics,
)
from sfd_jax.evaluation.evaluate import METRICS
from sfd_jax.evaluation.reconstruction import evaluate_reconstruction
from sfd_jax.experiment.checkpoints import OpenCheckpoint, open_checkpoint
from sfd_jax.generation import Sampler
from sfd_jax.models import ENCODERS
from sfd_jax.models.fingerprint import params_hash

Report = dict[str, Any]  # "scores", "notes" and "recipe"


@dataclasses.dataclass(frozen=True)
class Devices:
    """The devices of an evaluation and the batch size.

    Attributes:
      mesh: the devices.
      batch_size: images at once over all devices.
    """

    mesh: Mesh
    batch_size: int

    @classmethod
    def of(cls, fsdp: int = 1, images_per_device: int | None = None) -> "Devices":
        """Take all devices; the default images per device depend on the backend."""
        mesh = make_mesh(fsdp=fsdp)
        return cls(mesh, (images_per_device or images_at_once(mesh)) * mesh.size)

    @property
    def options(self) -> dict[str, Any]:
        return {"mesh": self.mesh, "batch_size": self.batch_size, "progress": True}


def check_metrics(metrics: Sequence[str]) -> None:
    """Raise SfdError for unknown metrics; `compare` checks whether the reference allows them."""
    if not metrics:
        raise SfdError(f"--metrics is empty: give some of {', '.join(METRICS)}")
    for metric in metrics:
        if metric not in METRICS:
            raise SfdError(f"--metrics: unknown metric '{metric}'; {nearest(metric, METRICS)}")


def open_extractor(name: str, directory: str) -> Extractor:
    """Open an extractor of features: "inception", or "dinov2" for any visual encoder; the flag has the same name.

    Raises:
      SfdError: as `open_checkpoint`.
    """
    make, kind = {"inception": (inception_extractor, "inception"), "dinov2": (encoder_extractor, ENCODERS)}[name]
    return make(open_checkpoint(directory, kind, flag=f"--{name}").weights)


def image_set_of_sampler(
    sampler: Sampler, labels: np.ndarray, recipe: dict, batch_size: int
) -> tuple[ImageSet, Callable[[], dict]]:
    """Return a sampler as an image set, and a function that returns the recipe after sampling.

    Args:
      sampler, labels, recipe, batch_size: as `experiment.sampling.open_sampler` returns them.
    """
    nfe = []

    def pieces(_: int) -> Iterator[np.ndarray]:
        nfe.clear()
        for start in range(0, len(labels), batch_size):
            part = labels[start : start + batch_size]
            images, part_nfe = sampler(start + np.arange(len(part)), part, batch_size)
            nfe.extend(part_nfe.tolist())
            yield images

    def get_recipe() -> dict:
        summary = {"mean": float(np.mean(nfe)), "min": min(nfe), "max": max(nfe)}
        return {"samples": "live", "sampling": recipe | {"nfe": summary}}

    return ImageSet("the sampler", len(labels), pieces, size=(sampler.image_size,) * 2), get_recipe


def report_samples(
    samples: ImageSet, get_recipe: Callable[[], dict], comparisons: Sequence[Comparison], devices: Devices
) -> Report:
    """Evaluate samples.

    Args:
      samples: the images.
      get_recipe: returns their "samples" and "sampling" after they have been read.
      comparisons: the extractors and metrics; all have one reference.
      devices: of the evaluation.

    Raises:
      SfdError: as `compare`.
    """
    results, scores = compare(samples, comparisons, **devices.options), {}
    recipe = get_recipe()
    notes = list((recipe["sampling"] or {}).get("notes", []))
    notes += dict.fromkeys(note for values in results for note in values.pop("notes", ()))
    if samples.count < 10_000:
        notes.append(
            f"scores of {samples.count:,} images are biased (FID upwards, IS downwards); released tables use 50,000"
        )
    for comparison, values in zip(comparisons, results, strict=True):
        name = comparison.extractor.name
        scores |= values if name == "inception" else {f"fd_{name}": values["fid"]}
        if name not in ("inception", "dinov2"):
            notes.append(
                f"fd_{name} is the Frechet distance in features of a visual encoder, at "
                f"{comparison.extractor.settings}; released FD-DINOv2 is of DINOv2 ViT-L/14 without registers"
            )
    reference = comparisons[0].reference
    statistics = "stored" if reference.statistics else "computed"
    recipe = recipe | {
        "reference": {"path": reference.name, "hash": reference.hash, "statistics": statistics},
        "extractors": {comparison.extractor.name: comparison.extractor.hash for comparison in comparisons},
        "precision_recall": "k = 3, float16 distances as in the ADM suite",
        "versions": {"sfd_jax": __version__, "jax": jax.__version__},
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "num_images": samples.count,
    }
    return {"scores": scores, "notes": notes, "recipe": recipe}


def report_statistics(reference: Reference, extractor: Extractor, path: str, devices: Devices) -> Report:
    """Write a reference's statistics and features to a file.

    Raises:
      SfdError: the reference holds no images.
    """
    if reference.images is None:
        raise SfdError(f"{reference.name} holds no images to compute statistics of")
    [(statistics, _)] = gather(
        reference.images, [extractor], keep_features=[True], label="reference", **devices.options
    )
    if is_host0():
        save_statistics(path, statistics)
        print(path)
    recipe = {"reference": {"path": reference.name, "hash": reference.hash}}
    return {"scores": {}, "notes": [], "recipe": recipe | {"extractors": {extractor.name: extractor.hash}}}


def report_reconstruction(
    images: ImageSet,
    texture_vae: OpenCheckpoint,
    extractor: Extractor,
    lpips: OpenCheckpoint | None,
    *,
    seed: int,
    image_size: int | None,
    devices: Devices,
) -> Report:
    """Evaluate the reconstructions of a texture VAE.

    Args:
      images: the images.
      texture_vae: the texture VAE.
      extractor: of FID.
      lpips: the perceptual distance; None leaves it out.
      seed: of the posterior's noise.
      image_size: size to which images of a folder were cropped, for the recipe.
      devices: of the evaluation.
    """
    pair = lpips.weights if lpips else None
    scores = evaluate_reconstruction(images, texture_vae.weights, extractor, pair, seed=seed, **devices.options)
    source = {"weights": texture_vae.metadata["which"], "source": texture_vae.metadata.get("source")}
    recipe = {
        "images": {"path": images.name, "hash": images.hash(), "image_size": image_size},
        "num_images": images.count,
        "texture_vae": {"hash": params_hash(texture_vae.params), **source},
        "lpips": params_hash(lpips.params) if lpips else None,
        "extractors": {extractor.name: extractor.hash},
        "seed": seed,
    }
    return {"scores": scores, "notes": texture_vae.notes, "recipe": recipe}
