"""The demo's last stages: samples, their judges, pictures and the report."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from sfd_jax.data.latent_store import LatentStore
from sfd_jax.data.pipeline import mirrored
from sfd_jax.evaluation.evaluate import evaluate
from sfd_jax.evaluation.features import Extractor, class_token
from sfd_jax.evaluation.image_sets import image_set_of
from sfd_jax.evaluation.reference import Reference
from sfd_jax.experiment.build import mesh_from_config
from sfd_jax.experiment.demo import judge, pictures
from sfd_jax.experiment.demo.page import write_page
from sfd_jax.experiment.demo.stages import Demo, label_reader
from sfd_jax.experiment.stages import follow
from sfd_jax.files import atomic_write, write_json, write_text
from sfd_jax.generation.job import make_images
from sfd_jax.generation.labels import balanced_labels
from sfd_jax.generation.outputs import write_samples_npz
from sfd_jax.generation.sampler import SampleConfig, Sampler, make_sampler
from sfd_jax.training.logging import read_metrics

TAUS_SHOWN = 8
SAMPLES_COMPARED = 16
LEAST_FOR_MANIFOLDS = 30  # images, for precision and recall


def open_sampler(demo: Demo) -> Sampler:
    """Build the sampler from the trained stages, as `sfd sample` does from any checkpoints."""
    config = SampleConfig.from_group(demo.config.sample)
    return make_sampler(
        demo.open("diffusion").weights,
        demo.open("texture_vae").weights,
        config,
        weak=demo.open("weak").weights if config.guidance == "autoguidance" else None,
        seed=demo.config.seed,
        mesh=mesh_from_config(demo.config),
    )


def make_samples(demo: Demo) -> dict:
    """Make the samples in resumable chunks, then write `samples.npz`."""
    settings = demo.config.sample
    sampler = open_sampler(demo)
    labels = balanced_labels(settings.num, sampler.num_classes)
    folder = demo.workdir / "samples"
    make_images(
        lambda indices, labels: sampler(indices, labels, settings.batch_size),
        labels,
        folder,
        recipe=sampler.recipe,
        batch_size=settings.batch_size,
        chunk_size=settings.batch_size,
    )
    write_text(demo.workdir / "recipe.json", (folder / "recipe.json").read_text())
    write_samples_npz(folder).replace(demo.workdir / "samples.npz")
    recipe = json.loads((folder / "recipe.json").read_text())
    return {"images": int(settings.num), "network evaluations per sample": round(recipe["nfe"]["mean"], 1)}


def measure(demo: Demo) -> dict:
    """Measure the samples and, for comparison, real images; write `metrics.json`."""
    samples, labels = load_samples(demo)
    real, real_labels = demo.images("train")
    held_out, held_out_labels = demo.images("held_out")
    # As many real training images as samples, if there are enough.
    chosen = np.random.default_rng(0).permutation(len(real))[: len(samples)]
    accuracy, of_reader = _reader(demo)
    noun = "digits" if demo.digits else "images"

    network, params, _ = demo.open("encoder")
    extractor = Extractor(f"{noun} encoder", params, class_token(network, demo.config.data.image_size))
    wanted, left_out = _metrics(min(len(samples), len(real), len(held_out)), network.config.feature_width, noun)
    reference = Reference(f"held-out {noun}", None, image_set_of(f"held-out {noun}", held_out), "")

    def compare(name: str, images: np.ndarray) -> dict:
        if not wanted:
            return {}
        values = evaluate(image_set_of(name, images), reference, extractor, metrics=wanted, batch_size=120)
        names = {"frechet_distance": "fid", "precision": "precision", "recall": "recall"}
        return {name: round(values[metric], 4) for name, metric in names.items() if metric in values}

    def read(images: np.ndarray, labels: np.ndarray) -> dict:
        return {"read_as_label": accuracy(images, labels)} if accuracy and len(images) else {}

    near = nearest_in_training(demo, samples)[1]
    unseen = nearest_in_training(demo, held_out)[1] if len(held_out) else None
    half = lambda distances: {"nearest_training_image": round(float(np.median(distances)), 4)}
    of_samples, of_held_out = half(near), {} if unseen is None else half(unseen)
    if unseen is not None:
        of_samples["nearer_than_held_out"] = round(float(np.mean(near < np.median(unseen))), 4)
    ours, train, held = "samples", f"real training {noun}", f"held-out {noun}"
    metrics = {
        ours: {**read(samples, labels), **compare(ours, samples), **of_samples},
        train: {**read(real[chosen], real_labels[chosen]), **compare(f"training {noun}", real[chosen])},
        held: {**read(held_out, held_out_labels), **of_held_out},
    }
    metrics["about"] = {
        "read_as_label": of_reader,
        "others": f"against the {len(held_out)} held-out {noun}, in class tokens of the demo's encoder, k=3 manifolds"
        if wanted
        else "",
        "left_out": left_out,
        "copies": _of_copies(metrics[ours], metrics[held], len(real)),
        "images": len(samples),
    }
    write_json(demo.workdir / "metrics.json", metrics)
    return {"samples": metrics[ours], "real": metrics[train], "held_out": metrics[held], "about": metrics["about"]}


def load_samples(demo: Demo) -> tuple[np.ndarray, np.ndarray]:
    """Return the samples, uint8 (N,H,W,3), and their labels (N,)."""
    with np.load(demo.workdir / "samples.npz") as file:
        return file["arr_0"], file["arr_1"]


def _reader(demo: Demo) -> tuple[Callable[[np.ndarray, np.ndarray], float] | None, str]:
    """Return a function for the fraction of images classified as their label, or None, and its description."""
    if demo.digits:
        return judge.open_judge(demo.config.data.kind)
    if len(demo.class_names) == 1:
        return None, "not measured, since there is one class"
    reader = label_reader(demo)
    return lambda images, labels: float(np.mean(reader(images) == labels)), (
        "fraction of images whose features are nearest to the mean training features of their class. The features are "
        "those of this run's encoder, which was trained on these labels, so this is no independent judge. Its value on "
        "held-out images shows how far to trust it"
    )


def _metrics(images: int, width: int, noun: str) -> tuple[tuple[str, ...], str]:
    """Return the metrics for which the smallest compared set is large enough, and a note on those left out."""
    least = {"fid": width + 1, "precision": LEAST_FOR_MANIFOLDS, "recall": LEAST_FOR_MANIFOLDS}
    wanted = tuple(name for name, count in least.items() if images >= count)
    notes = []
    if "fid" not in wanted:
        notes.append(
            f"The Frechet distance is left out: a covariance of {width} features needs more than {width} {noun}"
        )
    if "recall" not in wanted:
        notes.append(f"Precision and recall are left out: with k=3 they need at least {LEAST_FOR_MANIFOLDS} {noun}")
    if notes:
        notes.append(f"The smallest set compared (samples, training, held-out) has {images}")
    return wanted, "".join(f"{sentence}. " for sentence in notes).strip()


def nearest_in_training(demo: Demo, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the training image, perhaps mirrored, nearest to each image, (N,H,W,3) uint8, and its distance (N,)."""
    real, _ = demo.images("train")
    if demo.flips:
        real = np.concatenate([real, mirrored(real, np.ones(len(real), bool))])
    which, distances = judge.nearest_images(images, real)
    return real[which], distances


def _of_copies(samples: dict, held_out: dict, count: int) -> str:
    """Say whether the samples are copies of training images."""
    ours, theirs = (group.get("nearest_training_image") for group in (samples, held_out))
    near = f"Half of the samples are within {ours} of a training image (0: identical, 1: black against white)"
    few = f" With only {count} training images, copies are to be expected; more images help." if count < 1000 else ""
    if theirs is None:
        return f"{near}. No image was held out to compare this with.{few}"
    near = f"{near}; half of the held-out images, never trained on, are within {theirs}"
    near += f", and {samples['nearer_than_held_out']:.0%} of the samples are nearer than that."
    if ours < 0.5 * theirs:
        return f"{near} Most samples are near-copies of training images.{few}"
    if ours < 0.8 * theirs:
        return f"{near} The samples are nearer than unseen images: some copy training images.{few}"
    return f"{near} The samples are not much nearer than unseen images: no sign of copying."


def draw_pictures(demo: Demo) -> dict:
    """Draw `samples.png`, `neighbours.png`, `stages.png` and `losses.png`; write the stages to `stages.npz`."""
    samples, labels = load_samples(demo)
    held_out, train = demo.images("held_out"), demo.images("train")
    real, real_labels = (np.concatenate(pair) for pair in zip(held_out, train, strict=True))
    pictures.draw_samples(demo.workdir / "samples.png", samples, labels, real, real_labels, demo.class_names)
    # The first samples of each class in turn.
    rank = np.empty(len(labels), int)
    for label in np.unique(labels):
        rank[labels == label] = np.arange(np.sum(labels == label))
    shown = samples[np.lexsort((labels, rank))[:SAMPLES_COMPARED]]
    pictures.draw_neighbours(demo.workdir / "neighbours.png", shown, *nearest_in_training(demo, shown))
    _draw_stages(demo)
    curves = {
        stage: _curves(demo.workdir / stage, names)
        for stage, names in {
            "texture_vae": ("loss", "l1"),
            "encoder": ("loss",),
            "semantic_vae": ("loss", "cosine_feature"),
            "diffusion": ("loss", "error_semantic", "error_texture"),
            "weak": ("loss", "error_semantic", "error_texture"),
        }.items()
    }
    pictures.draw_losses(demo.workdir / "losses.png", curves)
    return {}


def _draw_stages(demo: Demo) -> None:
    sampler, names = open_sampler(demo), demo.class_names
    label = min(3, len(names) - 1)
    store = LatentStore(demo.workdir / "latents")
    clean = store.statistics.normalise_semantic(store.read(np.arange(min(len(store), 500)))["semantic"])
    stages = follow(sampler, label, TAUS_SHOWN, reference=clean)
    with atomic_write(demo.workdir / "stages.npz") as part, part.open("wb") as file:
        np.savez(file, **dataclasses.asdict(stages))
    pictures.draw_stages(
        demo.workdir / "stages.png",
        *dataclasses.astuple(stages),
        f"How one image of class {names[label]} emerges: semantics run ahead of texture",
    )


def _curves(folder: Path, names: tuple[str, ...]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    rows, curves = read_metrics(folder), {}
    for name in names:
        if found := [(row["step"], row[name]) for row in rows if name in row]:
            steps, values = zip(*found, strict=True)
            curves[name] = np.array(steps), np.array(values)
    return curves


def sizes(demo: Demo) -> list[str]:
    """Return a Markdown table of what is trained and for how long."""
    lines = ["| stage | steps | images per step | width |", "|---|---|---|---|"]
    for stage in ("texture_vae", "encoder", "semantic_vae", "diffusion", "weak"):
        config = demo.config[stage]
        width = next(config.model[name] for name in ("width", "hidden_dim", "ch") if name in config.model)
        lines.append(f"| {stage} | {config.train.steps} | {config.train.global_batch_size} | {width} |")
    return lines


def write_report(demo: Demo, stages: dict[str, dict], assumed: list[str]) -> None:
    """Write `report.md` and `report.html`: samples, metrics, assumptions, sizes and times."""
    metrics = json.loads((demo.workdir / "metrics.json").read_text())
    about = metrics.pop("about")
    total = sum(stage["seconds"] for stage in stages.values())
    columns = ("frechet_distance", "precision", "recall", "nearest_training_image")
    rows = []
    for name, values in metrics.items():
        read = f"{values['read_as_label']:.1%}" if "read_as_label" in values else ""
        scores = (f"{values[column]:.3f}" if column in values else "" for column in columns)
        rows.append(f"| {' | '.join([name, read, *scores])} |")
    took = []
    for name, stage in stages.items():
        facts = {k: v for k, v in stage.items() if k not in ("seconds", "peak_gib") and not isinstance(v, dict)}
        took.append(f"| {name} | {stage['seconds']} | {', '.join(f'{k} {v}' for k, v in facts.items())} |")
    peak = max(stage["peak_gib"] for stage in stages.values())
    what, noun = ("Handwritten digits", "digits") if demo.digits else ("Your own images", "images")
    more = len(demo.class_names) - pictures.MOST_ROWS
    lines = [
        f"# {what} by Semantic-First Diffusion",
        "",
        f"{about['images']:,} samples are in [samples.npz](samples.npz) (`arr_0` images, `arr_1` labels), their "
        "settings in [recipe.json](recipe.json), the metrics below in [metrics.json](metrics.json).",
        "",
        f"![samples by class, real {noun} at the left](samples.png)",
        *([f"\nThe first {pictures.MOST_ROWS} of {len(demo.class_names)} classes are shown."] if more > 0 else []),
        "",
        "![samples above their nearest training images](neighbours.png)",
        "",
        f"Below each sample: its nearest training image, and the distance to it. {about['copies']}",
        "",
        "![how one image emerges](stages.png)",
        "",
        "![losses of all stages](losses.png)",
        "",
        "| images | classified as their label | Frechet distance | precision | recall | nearest training image |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
        f"Classified as their label: {about['read_as_label']}. Nearest training image: the median distance, which is "
        "the root mean square difference of colours at 16x16 pixels."
        + (f" Frechet distance, precision and recall: {about['others']}." if about["others"] else "")
        + (f" {about['left_out']}" if about["left_out"] else ""),
        "",
        *(["Assumptions:", "", *(f"- {note}" for note in assumed), ""] if assumed else []),
        *sizes(demo),
        "",
        "| stage | seconds | result |",
        "|---|---|---|",
        *took,
        "",
        f"{total:.0f} s in all, at most {peak:.1f} GiB of memory, seed {demo.config.seed}. For a stage that was "
        "interrupted, only the seconds since its last start count.",
        "",
    ]
    write_text(demo.workdir / "report.md", "\n".join(lines))
    write_page(demo.workdir)
