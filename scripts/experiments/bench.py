"""What all cells of a study share: latents, texture VAE, settings of sampling, and how samples are scored."""

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from sfd_jax.diffusion.sample_config import SampleJob
from sfd_jax.distributed.lock import FolderLock
from sfd_jax.distributed.mesh import make_mesh
from sfd_jax.errors import SfdError
from sfd_jax.evaluation import Extractor, Reference, gather, open_reference
from sfd_jax.evaluation.evaluate import evaluate
from sfd_jax.evaluation.features import encoder_extractor
from sfd_jax.evaluation.image_sets import ImageSet, image_set_of
from sfd_jax.experiment.config_files import load_config
from sfd_jax.experiment.demo import judge, stages
from sfd_jax.experiment.demo.record import DemoRecord
from sfd_jax.experiment.demo.results import LEAST_FOR_MANIFOLDS
from sfd_jax.experiment.evaluation import open_extractor
from sfd_jax.ranges import IN_PACKAGES

Score = Callable[[ImageSet, np.ndarray], dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Bench:
    """What all cells share.

    Attributes:
      base: config of a diffusion run.
      latents: "" and "pca" -> folder of the latent shards.
      texture_vae: checkpoint.
      job: how to sample.
      score: (samples, labels) -> scores.
      about: what decides the scores besides the cell's config.
      held_out: folder of held-out latents; "" for none.
      small: keep the latents in memory.
    """

    base: ConfigDict
    latents: dict[str, str]
    texture_vae: str
    job: SampleJob
    score: Score
    about: dict[str, Any]
    held_out: str
    small: bool


def open_bench(args: argparse.Namespace, pca: bool) -> Bench:
    """Open or make what all cells share.

    Args:
      args: the flags of a study.
      pca: a cell needs latents with principal components.

    Raises:
      SfdError: flags are missing, or files do not fit each other.
    """
    if args.data in IN_PACKAGES:
        args.config = args.config or f"configs/{args.data}.py:study"
        return _built_in(args, load_config(args.config, args.overrides, like="configs/digits.py"), pca)
    needed = {name: getattr(args, name) for name in ("texture_vae", "reference")}
    needed |= {"inception or --encoder": args.inception or args.encoder} | ({"pca_data": args.pca_data} if pca else {})
    if missing := [f"--{name}" for name, value in needed.items() if not value]:
        raise SfdError(f"--data={args.data} is a folder of latents, which also needs {', '.join(missing)}")
    args.config = args.config or "configs/sfd.py:xl,lr2e4"
    config = load_config(args.config, args.overrides, like="configs/sfd.py")
    extractor = open_extractor(*(("inception", args.inception) if args.inception else ("dinov2", args.encoder)))
    reference = open_reference(args.reference).for_extractor(extractor)
    latents, job = {"": args.data, "pca": args.pca_data}, _job(args, config.sample)
    return Bench(
        config,
        latents,
        args.texture_vae,
        job,
        *scorer(extractor, reference, job, None),
        args.held_out or "",
        small=False,
    )


def _built_in(args: argparse.Namespace, config: ConfigDict, pca: bool) -> Bench:
    """Make the stages before the diffusion model with the demo's code."""
    demo = stages.Demo(config, args.out / "shared")
    channels = config.diffusion.latents.semantic_channels
    make = {
        "texture_vae": lambda: stages.train_texture_vae(demo),
        "encoder": lambda: stages.train_encoder(demo),
        "semantic_vae": lambda: stages.train_semantic_vae(demo),
        "latents": lambda: stages.extract(demo),
        "latents_held_out": lambda: stages.extract(demo, "latents_held_out", split="held_out"),
        **({"latents_pca": lambda: stages.extract(demo, "latents_pca", channels)} if pca else {}),
    }
    decide = ("seed", "data", "texture_vae", "encoder", "semantic_vae", "extract")
    open_record = lambda: DemoRecord(demo.workdir, {name: config.to_dict()[name] for name in decide}, args.data)
    if make.keys() - open_record().stages:
        with FolderLock(demo.workdir):
            record = open_record()
            for name, stage in make.items():
                record.run(name, "shared by all cells", stage)
    latents = {"": str(demo.workdir / "latents"), "pca": str(demo.workdir / "latents_pca")}
    job, base = _job(args, config.sample), stages.diffusion_config(demo)
    places = str(demo.workdir / "texture_vae"), str(demo.workdir / "latents_held_out")
    return Bench(base, latents, places[0], job, *scorer_of(demo, job), places[1], small=True)


def _job(args: argparse.Namespace, sample: ConfigDict) -> SampleJob:
    """Return how to sample: without guidance, unless its scale is given."""
    guided = {"guidance": "cfg", "guidance_scale": args.guidance_scale} if args.guidance_scale else {}
    num = {"num": args.num} if args.num else {}
    return SampleJob.from_group({**sample, "guidance": "none", "guidance_scale": 1.0, **guided, **num})


def scorer_of(demo: stages.Demo, job: SampleJob) -> tuple[Score, dict]:
    """Return what `scorer` does, against a demo's held-out images by its encoder, as the demo scores its own."""
    images = image_set_of("held-out images", demo.images("held_out")[0])
    extractor = encoder_extractor(demo.open("encoder").weights)
    [(statistics, _)] = gather(images, [extractor], keep_features=[True])
    accuracy = judge.open_judge(demo.config.data.kind)[0] if demo.digits else None
    return scorer(extractor, Reference(images.name, statistics, images, images.hash()), job, accuracy)


def scorer(
    extractor: Extractor, reference: Reference, job: SampleJob, accuracy: judge.Accuracy | None
) -> tuple[Score, dict]:
    """Return the function that scores samples, and what else decides the scores."""
    mesh = make_mesh()

    def score(samples: ImageSet, labels: np.ndarray) -> dict[str, float]:
        metrics = ("fid", "precision", "recall") if samples.count >= LEAST_FOR_MANIFOLDS else ("fid",)
        values = evaluate(samples, reference, extractor, metrics=metrics, batch_size=job.batch_size * mesh.size)
        scores = {{"fid": "frechet_distance"}.get(name, name): float(values[name]) for name in metrics}
        if accuracy:
            [images] = samples.pieces(samples.count)
            scores["read_as_label"] = accuracy(images, labels)
        return scores

    return score, {"reference": reference.hash, "extractor": extractor.hash}
