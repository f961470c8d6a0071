"""Previews of a diffusion run: samples of the averaged weights, how one emerges, and scores, at some checkpoints.

They are made by the code of `sfd sample` and `sfd evaluate --live`, so the scores are those of
`sfd evaluate --live --checkpoint=... --num=...` with the same settings, devices and mesh.
"""

import dataclasses
import io
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from sfd_jax.diffusion.clocks import split_params
from sfd_jax.distributed import is_host0, say
from sfd_jax.errors import Faults, SfdError, nearest
from sfd_jax.evaluation import Comparison, gather, images_at_once, open_reference
from sfd_jax.experiment import evaluation
from sfd_jax.experiment.checkpoints import open_checkpoint
from sfd_jax.experiment.figures import figure
from sfd_jax.experiment.sampling import open_texture_vae, sample_job
from sfd_jax.files import write_anywhere
from sfd_jax.generation import make_labels, make_sampler
from sfd_jax.generation.outputs import draw_grid
from sfd_jax.models import Network
from sfd_jax.settings import from_group
from sfd_jax.training.checkpoint import find_checkpoint
from sfd_jax.training.logging import read_metrics
from sfd_jax.training.state import TrainState

STAGES = 6  # pictures of one image between noise and result
SHOWN = 64  # pixels that small images are enlarged to at least
SMALLEST_IS_BEST = ("fid", "sfid", "kid")


@dataclasses.dataclass(frozen=True)
class PreviewConfig:
    """When previews are made, and of what; how to sample is config group `sample`.

    Attributes:
      every: steps between previews, a multiple of train.checkpoint_every; 0 for none.
      texture_vae: checkpoint that decodes.
      weak: checkpoint of AutoGuidance's weaker model; without it there is no AutoGuidance.
      images: shown, spread over up to eight classes.
      seed: of their noise, and of the scored samples'.
      num: samples that are scored; 0 for none.
      inception, encoder: checkpoints of the networks whose features are compared; one or both.
      reference: statistics, ADM batch or folder of images to compare with.
      metrics: of Inception's features, see `sfd evaluate --metrics`.
      best: name of a score, "fd" for the encoder's; the checkpoint with its smallest value is kept. "" keeps none.
    """

    every: int = 0
    texture_vae: str = ""
    weak: str = ""
    images: int = 32
    seed: int = 0
    num: int = 0
    inception: str = ""
    encoder: str = ""
    reference: str = ""
    metrics: str = "fid"
    best: str = ""


def preview_config(config: Mapping[str, Any], found: Faults) -> PreviewConfig:
    """Return the group `preview` of a run's config, and collect its faults."""
    preview = PreviewConfig()
    with found:
        preview = from_group(PreviewConfig, config.get("preview") or {}, "config group 'preview'")
    if not preview.every:
        return PreviewConfig()
    if preview.every % config["train"]["checkpoint_every"]:
        found.append(
            f"preview.every={preview.every} is not a multiple of train.checkpoint_every="
            f"{config['train']['checkpoint_every']}: previews are made before checkpoints are saved"
        )
    if not preview.texture_vae:
        found.append("preview.every needs preview.texture_vae, the checkpoint that decodes")
    if preview.num and not (preview.reference and (preview.inception or preview.encoder)):
        found.append(
            "preview.num needs preview.reference, and features to compare: preview.inception or preview.encoder"
        )
    if preview.best and not preview.num:
        found.append("preview.best needs scores: give preview.num")
    with found:
        evaluation.check_metrics(preview.metrics.split(","))
    for checkpoint in filter(None, (preview.texture_vae, preview.weak, preview.inception, preview.encoder)):
        with found:
            find_checkpoint(checkpoint)
    return preview


class Previews:
    """Make previews of a run; an instance is the `evaluate` argument of `fit`.

    Attributes:
      best: name of the score that chooses the checkpoint to keep, the `best` argument of `fit`.
    """

    def __init__(
        self,
        preview: PreviewConfig,
        network: Network,
        metadata: dict[str, Any],
        workdir: epath.PathLike,
        mesh: Mesh,
        batch_size: int,
    ):
        """Open what decodes and scores; all of it stays on the devices.

        Args:
          preview: what to make.
          network: that is trained.
          metadata: of its checkpoints.
          workdir: folder of the run; pictures go to its `previews/`.
          mesh: the run's.
          batch_size: of the run, for the plot of scores against images.

        Raises:
          SfdError: the parts do not fit each other, or `best` is none of the scores.
        """
        self._preview, self._workdir, self._mesh, self._batch_size = preview, epath.Path(workdir), mesh, batch_size
        self._metadata = metadata | network.metadata() | {"given_as": str(workdir)}
        weak = preview.weak and open_checkpoint(preview.weak, "lightning_dit", flag="preview.weak").weights
        self._job, notes = sample_job({}, metadata["config"].get("sample") or {}, weak=preview.weak, flag="preview.{}")
        vae = open_texture_vae(preview.texture_vae, self._metadata)
        self._parts = {"texture_vae": vae, "weak": weak or None, "config": self._job}
        self._sampler, self._comparisons = None, []
        self._devices = evaluation.Devices(mesh, images_at_once(mesh) * mesh.size)
        if preview.num:
            self._comparisons = self._open_comparisons()
        self.best = self._name_of_best()
        for note in notes:
            say(f"note: previews: {note}")

    def __call__(self, state: TrainState, step: int) -> dict[str, Any]:
        """Return the scores of the averaged weights and a picture, where a preview is due; write PNGs.

        What cannot be made (a solver that does not converge on weights of the first steps) is noted; the run goes on.
        """
        steps = self._metadata["config"]["train"]["steps"]
        if step % self._preview.every and step != steps:
            return {}
        sampler = self._with_weights(state.average())
        values = {}
        try:
            values["preview"] = self._draw(sampler, step)
            values |= self._score(sampler) if self._comparisons else {}
        except SfdError as error:
            say(f"note: preview of step {step}: {error}")
        sampler.use(None)  # the next step overwrites them
        names = [name for name in values if name != "preview"]
        if names and is_host0():
            rows = [row for row in read_metrics(self._workdir) if row["step"] < step] + [{"step": step, **values}]
            draw_convergence(self._workdir / "convergence.png", rows, names, self._batch_size)
        return values

    def _open_comparisons(self) -> list[Comparison]:
        preview, comparisons = self._preview, []
        reference = open_reference(preview.reference)
        for name, path in (("inception", preview.inception), ("dinov2", preview.encoder)):
            if path:
                extractor = evaluation.open_extractor(name, path)
                metrics = tuple(preview.metrics.split(",")) if name == "inception" else ("fid",)
                comparison = Comparison(reference.for_extractor(extractor), extractor, metrics)
                if comparison.reference.statistics is None:  # once, instead of in every preview
                    [(statistics, _)] = gather(
                        reference.images,
                        [extractor],
                        keep_features=[comparison.keeps_features],
                        label="reference",
                        **self._devices.options,
                    )
                    own = dataclasses.replace(comparison.reference, statistics=statistics)
                    comparison = dataclasses.replace(comparison, reference=own)
                comparisons.append(comparison)
        return comparisons

    def _name_of_best(self) -> str:
        if not (best := self._preview.best):
            return ""
        names = {}
        for comparison in self._comparisons:
            if (name := comparison.extractor.name) == "inception":
                names |= {metric: metric for metric in comparison.metrics if metric in SMALLEST_IS_BEST}
            else:
                names |= dict.fromkeys(("fd", f"fd_{name}"), f"fd_{name}")
        if best not in names:
            raise SfdError(
                f"preview.best={best}: no score of this run whose smallest value is best; {nearest(best, names)}"
            )
        return names[best]

    def _with_weights(self, params: dict):
        """Return the sampler with weights of the run, compiled once unless its clocks are trained."""
        network, trained = split_params(params)
        if self._sampler is None or trained:
            shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), network)
            model = ({"network": shapes, "clocks": jax.device_get(trained)} if trained else shapes, self._metadata)
            self._sampler = make_sampler(model, seed=self._preview.seed, mesh=self._mesh, **self._parts)
        self._sampler.use(network)
        return self._sampler

    def _draw(self, sampler, step: int) -> np.ndarray:
        """Draw a row of samples for each of some classes, and how the first one emerges."""
        labels = sampler.labels[np.unique(np.linspace(0, len(sampler.labels) - 1, 8).round().astype(int))]
        labels = np.repeat(labels, max(1, self._preview.images // len(labels)))
        images, _ = sampler(np.arange(len(labels)), labels, self._job.batch_size * self._mesh.size)
        name = lambda label: sampler.class_names[label] if sampler.class_names else str(label)
        rows = {name(label): list(images[labels == label]) for label in np.unique(labels)}
        if self._job.sde is None and self._job.mode == "staged":
            taus = np.linspace(0, sampler.clocks.tau_end, STAGES)
            try:
                rows["stages"] = list(sampler.trajectory(np.arange(1), labels[:1], taus)[1][:, 0])
            except SfdError as error:  # a fixed grid of steps has too few for these times
                say(f"note: preview of step {step} has no stages: {error}")
        zoom = -(-SHOWN // sampler.image_size)
        large = [[image.repeat(zoom, axis=0).repeat(zoom, axis=1) for image in row] for row in rows.values()]
        picture = draw_grid(large, list(rows))
        if is_host0():
            picture.save(buffer := io.BytesIO(), format="PNG")
            write_anywhere(self._workdir / "previews" / f"step_{step:08d}.png", buffer.getvalue())
        return np.asarray(picture)

    def _score(self, sampler) -> dict[str, float]:
        """Return scores, as `sfd evaluate --live` computes them."""
        labels = make_labels(
            "balanced", self._preview.num, sampler.num_classes, sampler.class_names, self._preview.seed, sampler.labels
        )
        batch_size = self._job.batch_size * self._mesh.size
        samples, get_recipe = evaluation.image_set_of_sampler(sampler, labels, sampler.recipe, batch_size)
        return evaluation.report_samples(samples, get_recipe, self._comparisons, self._devices)["scores"]


def draw_convergence(path: epath.Path, rows: list[dict], names: list[str], batch_size: int) -> None:
    """Draw scores against steps, with the number of images seen above.

    Args:
      path: PNG to write.
      rows: of the log.
      names: of the scores.
      batch_size: images a step.
    """
    with figure(path, 4.2 * len(names), 3.4) as drawn:
        if drawn is None:
            return
        from matplotlib.ticker import EngFormatter

        for axis, name in zip(drawn.subplots(1, len(names), squeeze=False)[0], names, strict=True):
            points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3)
            axis.set(xlabel="step", title=name)
            axis.grid(alpha=0.3)
            axis.set_xlim(left=0)
            axis.locator_params(axis="x", nbins=5, integer=True)
            seen = axis.secondary_xaxis("top", functions=(lambda x: x * batch_size, lambda x: x / batch_size))
            seen.locator_params(axis="x", nbins=5, integer=True)
            seen.set_xlabel("images seen")
            for each in (axis, seen):
                each.xaxis.set_major_formatter(EngFormatter(sep=""))  # 400k
