"""The demo's last stages: samples, their judges, pictures and the report."""

import json
from pathlib import Path

import numpy as np

from sfd_jax.data.digits import digits_8x8
from sfd_jax.data.latent_store import LatentStore
from sfd_jax.evaluation.evaluate import evaluate
from sfd_jax.evaluation.features import Extractor, class_token
from sfd_jax.evaluation.image_sets import image_set_of
from sfd_jax.evaluation.reference import Reference
from sfd_jax.experiment.build import layout_from_config, mesh_from_config
from sfd_jax.experiment.demo import judge, pictures
from sfd_jax.experiment.demo.stages import Demo
from sfd_jax.files import write_json, write_text
from sfd_jax.generation.job import make_images
from sfd_jax.generation.labels import balanced_labels
from sfd_jax.generation.outputs import write_samples_npz
from sfd_jax.generation.sampler import SampleConfig, Sampler, make_sampler
from sfd_jax.training.logging import read_metrics

TAUS_SHOWN = 8


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
    """Make the samples in resumable chunks, then `samples.npz` of them."""
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
    return {"images": int(settings.num), "network evaluations a sample": round(recipe["nfe"]["mean"], 1)}


def measure(demo: Demo) -> dict:
    """Judge the samples and, beside them, real digits by the same yardsticks; write `metrics.json`."""
    with np.load(demo.workdir / "samples.npz") as file:
        samples, labels = file["arr_0"], file["arr_1"]
    real, real_labels = demo.images("train")
    held_out, held_out_labels = demo.images("held_out")
    # As many real training digits as samples, where there are as many.
    chosen = np.random.default_rng(0).permutation(len(real))[: len(samples)]
    reader = judge.train_judge(*digits_8x8("train"))

    network, params, _ = demo.open("encoder")
    extractor = Extractor("digits encoder", params, class_token(network, demo.config.data.image_size))
    reference = Reference("held-out digits", None, image_set_of("held-out digits", held_out), "")

    def compare(name: str, images: np.ndarray) -> dict:
        values = evaluate(
            image_set_of(name, images), reference, extractor, metrics=("fid", "precision", "recall"), batch_size=120
        )
        return {
            "frechet_distance": round(values["fid"], 4),
            "precision": round(values["precision"], 4),
            "recall": round(values["recall"], 4),
        }

    metrics = {
        "samples": {"read_as_label": judge.accuracy(reader, samples, labels), **compare("samples", samples)},
        "real training digits": {
            "read_as_label": judge.accuracy(reader, real[chosen], real_labels[chosen]),
            **compare("training digits", real[chosen]),
        },
        "held-out digits": {"read_as_label": judge.accuracy(reader, held_out, held_out_labels)},
        "about": {
            "read_as_label": "fraction read as their label by a support vector classifier of 8x8 training digits",
            "others": f"against {len(held_out)} held-out digits, class token of the demo's encoder, k=3 manifolds",
            "images": len(samples),
        },
    }
    write_json(demo.workdir / "metrics.json", metrics)
    return {"samples": metrics["samples"], "real": metrics["real training digits"]}


def draw_pictures(demo: Demo) -> dict:
    """Draw `samples.png`, `stages.png` and `losses.png`."""
    with np.load(demo.workdir / "samples.npz") as file:
        samples, labels = file["arr_0"], file["arr_1"]
    pictures.draw_samples(demo.workdir / "samples.png", samples, labels, *demo.images("held_out"))
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


def _draw_stages(demo: Demo, label: int = 3) -> None:
    sampler = open_sampler(demo)
    clocks, layout = sampler.clocks, layout_from_config(demo.config.diffusion)
    taus = np.linspace(0, clocks.tau_end, TAUS_SHOWN)
    latents, decoded = sampler.trajectory(np.array([0]), np.array([label]), taus)
    store = LatentStore(demo.workdir / "latents")
    clean = store.statistics.normalise_semantic(store.read(np.arange(min(len(store), 500)))["semantic"])
    t_semantic, t_texture = clocks.times(taus)
    pictures.draw_stages(
        demo.workdir / "stages.png",
        taus,
        np.asarray(t_semantic),
        np.asarray(t_texture),
        pictures.semantic_colours(layout.split(latents)[1][:, 0], clean),
        decoded[:, 0],
        f"How a {label} emerges: semantics run ahead of texture",
    )


def _curves(folder: Path, names: tuple[str, ...]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    rows, curves = read_metrics(folder), {}
    for name in names:
        if found := [(row["step"], row[name]) for row in rows if name in row]:
            steps, values = zip(*found, strict=True)
            curves[name] = np.array(steps), np.array(values)
    return curves


def write_report(demo: Demo, stages: dict[str, dict]) -> None:
    """Write `report.md`: what was made, how it is judged, what each stage took."""
    metrics = json.loads((demo.workdir / "metrics.json").read_text())
    total = sum(stage["seconds"] for stage in stages.values())
    rows = [
        f"| {name} | {values['read_as_label']:.1%} | {values.get('frechet_distance', '')} | "
        f"{values.get('precision', '')} | {values.get('recall', '')} |"
        for name, values in metrics.items()
        if name != "about"
    ]
    took = []
    for name, stage in stages.items():
        facts = {k: v for k, v in stage.items() if k not in ("seconds", "peak_gib") and not isinstance(v, dict)}
        took.append(f"| {name} | {stage['seconds']} | {', '.join(f'{k} {v}' for k, v in facts.items())} |")
    peak = max(stage["peak_gib"] for stage in stages.values())
    lines = [
        "# Handwritten digits by Semantic-First Diffusion",
        "",
        f"{metrics['about']['images']} samples in [samples.npz](samples.npz) (`arr_0` images, `arr_1` labels), made "
        "as [recipe.json](recipe.json) says; numbers in [metrics.json](metrics.json).",
        "",
        "![samples by class, real digits at the left](samples.png)",
        "",
        "![how one digit emerges](stages.png)",
        "",
        "![losses of all stages](losses.png)",
        "",
        "| images | read as their label | Frechet distance | precision | recall |",
        "|---|---|---|---|---|",
        *rows,
        "",
        f"Read as their label: {metrics['about']['read_as_label']}. The other columns: {metrics['about']['others']}.",
        "",
        "| stage | seconds | result |",
        "|---|---|---|",
        *took,
        "",
        f"{total:.0f} s in all, at most {peak:.1f} GiB of memory, seed {demo.config.seed}. A stage that was "
        "interrupted shows the seconds of its last start.",
        "",
    ]
    write_text(demo.workdir / "report.md", "\n".join(lines))
