"""From a name or a folder to images in three lines of Python.

from sfd_jax import Pipeline
pipeline = Pipeline.from_pretrained("sfd_xl")  # or a folder, such as the demo's
pipeline.generate("otter")[0].save("otter.png")
"""

import contextlib
import os
import re
import tempfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sfd_jax.class_names import class_names_of
from sfd_jax.convert.hub import CATALOGUE
from sfd_jax.diffusion.sample_config import SampleJob
from sfd_jax.errors import SfdError, nearest
from sfd_jax.experiment.checkpoints import open_checkpoint
from sfd_jax.experiment.pretrained import (
    CARD,
    download,
    is_pretrained,
    load_parts,
    model_card,
    read_scores,
    save_parts,
    upload,
)
from sfd_jax.experiment.released import cached_checkpoint
from sfd_jax.experiment.sampling import open_texture_vae, sample_job
from sfd_jax.experiment.stages import Stages, follow
from sfd_jax.generation import make_labels, make_sampler, parse_classes
from sfd_jax.generation.parts import Checkpoint
from sfd_jax.ranges import check
from sfd_jax.settings import defaults_of, over_defaults

# Released model -> step of the weaker model (`sfd_autoguidance_b`) that guides it; the paper's table, 800 epochs.
_WEAK_STEPS = {"sfd_xl": 70_000, "sfd_1p0": 120_000}
_RELEASED_SETTINGS = {"guidance": "autoguidance", "guidance_scale": 1.5}


class Images(list[Image.Image]):
    """Generated images.

    Attributes:
      latents: normalised, float32 (n, h, w, C).
      pixels: the images as one array, uint8 (n, H, W, 3).
      nfe: network evaluations that each image took, (n,) int32; under guidance one is of two networks.
      labels: (n,) int32.
      recipe: all that determines the images, as `sfd sample` saves it.
    """

    def __init__(
        self, latents: np.ndarray, pixels: np.ndarray, nfe: np.ndarray, labels: np.ndarray, recipe: dict[str, Any]
    ):
        super().__init__(Image.fromarray(image) for image in pixels)
        self.latents, self.pixels, self.nfe, self.labels, self.recipe = latents, pixels, nfe, labels, recipe


class Pipeline:
    """Make images of classes; `from_pretrained` builds one.

    Attributes:
      num_classes, class_names: of the model; names by label, None where there are none.
      settings: default sampling settings, name -> value.
      has_weak, null_label: whether AutoGuidance and classifier-free guidance are possible.
      sampler: made the last images; None before. `sampler.recipe` has everything that determines them.
    """

    def __init__(
        self,
        model: Checkpoint,
        texture_vae: Checkpoint,
        weak: Checkpoint | None = None,
        settings: dict[str, Any] | None = None,
    ):
        """Keep the parts.

        Args:
          model, texture_vae, weak: (params, metadata) as `training.load_params` returns; `weak` is AutoGuidance's.
          settings: default sampling settings of `generate`; by default those in the model's checkpoint.
        """
        self._parts = {"model": model, "texture_vae": texture_vae}
        self._weak = weak
        self._saved = settings or (model[1].get("config") or {}).get("sample") or {}
        self.settings = over_defaults(SampleJob, self._saved)
        self.has_weak, self.null_label = weak is not None, model[1]["network_config"].get("null_label", True)
        self.num_classes = model[1]["network_config"]["num_classes"]
        self.class_names, _ = class_names_of(model[1], self.num_classes)
        self._job, self.sampler = None, None

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike,
        *,
        texture_vae: str | os.PathLike | None = None,
        weak: str | os.PathLike | None = None,
    ) -> "Pipeline":
        """Open a model with the texture VAE that decodes its latents and the weaker model that guides it.

        Args:
          name: "sfd_xl" or "sfd_1p0" (released; downloaded and converted unless cached), the work
            folder of `sfd demo`, a folder of `save_pretrained`, a folder of the diffusion model's checkpoints, or
            OWNER/NAME of a repository on the Hugging Face hub (OWNER/NAME@REVISION).
          texture_vae, weak: folders of checkpoints or released names. By default those of the released model or in
            the folder; a folder of checkpoints needs a texture VAE, and uses AutoGuidance if `weak` is given.

        Raises:
          SfdError: no such name or folder, a missing part, or a failed download (with what to put where).
        """
        if not isinstance(name, (str, os.PathLike)):
            raise SfdError(f"from_pretrained takes the name of a released model or a folder, not {name!r}")
        name, folder, settings = str(name), Path(name), None
        if not folder.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", name):
            folder = download(name)
        if is_pretrained(folder):
            parts, settings = load_parts(folder)
        else:
            place = _place(name, _WEAK_STEPS)
            if name != place:
                settings = _RELEASED_SETTINGS
                texture_vae = texture_vae or "texture_vae"
                weak = weak or cached_checkpoint("sfd_autoguidance_b", _WEAK_STEPS[name])
            elif (folder / "diffusion").is_dir():
                place, texture_vae = str(folder / "diffusion"), texture_vae or folder / "texture_vae"
                weak = weak or next(folder.glob("weak"), None)
            elif texture_vae is None:
                raise SfdError(
                    f"'{name}' holds no texture VAE, which decodes its latents: give texture_vae=FOLDER (or "
                    "'texture_vae', the released one)"
                )
            parts = {"model": open_checkpoint(place, "lightning_dit").weights}
        with _keywords_for_flags():
            if texture_vae:
                parts["texture_vae"] = open_texture_vae(_place(texture_vae, ("texture_vae",)), parts["model"][1])
            if weak:
                models = [name for name in CATALOGUE if name.startswith("sfd_")]
                parts["weak"] = open_checkpoint(_place(weak, models), "lightning_dit").weights
        return cls(**parts, settings=settings)

    def generate(
        self, labels: str | int | Sequence[str | int], num: int | None = None, *, seed: int = 0, **settings: Any
    ) -> Images:
        """Make images.

        Args:
          labels: classes by name or number, one or several: "otter", 207, ["otter", 207]; or "balanced", "random".
          num: how many images, spread over the classes; by default one of each.
          seed: image i is a function of the seed, i and its label.
          settings: sampling settings, named like the flags of `sfd sample` (guidance_scale=1.3, solver="ab2",
            nfe=16, ...). A new setting recompiles, a new seed does not.

        Returns:
          The images as a list, the same as `sfd sample` makes of these labels, with what they cost.

        Raises:
          SfdError: no such class or setting, or a value that is not allowed.
        """
        _known(settings)
        if settings.get("guidance") == "autoguidance" and self._weak is None:
            raise SfdError("guidance='autoguidance' needs a weaker model: from_pretrained(..., weak=FOLDER)")
        spec = labels if isinstance(labels, str) else "".join(f"{label};" for label in np.atleast_1d(labels))
        known = self.num_classes, self.class_names
        if num is None:
            num = 1 if spec in ("balanced", "random") else len(parse_classes(spec, *known))
        with _keywords_for_flags():
            weak = self._weak is not None and settings.get("guidance") in (None, "autoguidance")
            given = {name: value for name, value in settings.items() if value is not None}
            job, notes = sample_job(given, self._saved, weak=weak)
        check(seed=seed)
        if self._job != job:
            self._job = self.sampler = None  # frees the devices before the next one is loaded
            weak = self._weak if job.guidance == "autoguidance" else None
            self.sampler = make_sampler(**self._parts, config=job, weak=weak)
            self._job = job
            for note in notes + self.sampler.recipe["notes"]:
                print(f"note: {_without_dashes(note)}")
        self.sampler.seed = seed
        drawn = make_labels(spec, num, *known, seed, self.sampler.labels)
        at_once = min(num, job.batch_size * self.sampler.mesh.size)
        made = self.sampler.with_latents(np.arange(num), drawn, at_once)
        return Images(*made, drawn, {**self.sampler.recipe, "labels": drawn.tolist()})

    def stages(self, label: int, number: int = 8, *, index: int = 0) -> Stages:
        """Follow an image of the last `generate` from noise to its end; a notebook shows it with a slider.

        Args:
          label: its class, a number: `images.labels[index]`.
          number: of times.
          index: which of the images.

        Raises:
          SfdError: nothing was generated, or the solver cannot stop at so many times.
        """
        if self.sampler is None:
            raise SfdError("stages follow an image of the last `generate`: call that first")
        return follow(self.sampler, int(label), number, index=index)

    def save_pretrained(
        self,
        folder: str | os.PathLike,
        *,
        licence: str = "other",
        scores: str | os.PathLike | None = None,
        **settings: Any,
    ) -> Path:
        """Save the model with its texture VAE and weaker model to a folder that loads on any machine.

        Args:
          folder: must not exist, or be empty.
          licence: for the model card: the hub's identifier of a licence.
          scores: file of `sfd evaluate`, for the model card.
          settings: default sampling settings of the folder, instead of this pipeline's.

        Raises:
          SfdError: the folder holds something, no such setting, or `scores` of another model.
        """
        parts = self._parts | ({"weak": self._weak} if self._weak else {})
        settings = {**self._saved, **_known(settings)}
        report = read_scores(scores, self._parts["model"]) if scores else None
        return save_parts(folder, parts, settings, model_card(parts, settings, licence, report))

    def push_to_hub(self, repository: str, *, private: bool | None = None, **about: Any) -> str:
        """Upload what `save_pretrained` writes to the Hugging Face hub, as a new commit.

        Args:
          repository: OWNER/NAME; made if there is none.
          private: whether a new repository is private; by default the owner's setting.
          about: arguments of `save_pretrained`.

        Returns:
          The commit's address.

        Raises:
          SfdError: as `save_pretrained`; or the hub cannot be reached or refuses.
        """
        with tempfile.TemporaryDirectory(prefix="sfd_jax-") as scratch:
            folder = self.save_pretrained(Path(scratch) / "model", **about)
            card = folder / CARD
            card.write_text(card.read_text().replace("OWNER/NAME", repository))
            return upload(folder, repository, private, "Upload a model of sfd_jax")


def _known(settings: dict[str, Any]) -> dict[str, Any]:
    """Return sampling settings, or refuse an unknown one."""
    if unknown := sorted(set(settings) - (known := defaults_of(SampleJob).keys() - {"num", "labels"})):
        raise SfdError(f"no setting '{unknown[0]}'; {nearest(unknown[0], known)}")
    return settings


def _place(name: str | os.PathLike, released: Collection[str]) -> str:
    """Return the folder of a checkpoint that is given by its folder or by one of the released names."""
    name = str(name)
    if Path(name).exists() or "://" in name:
        return name
    if name in released:
        return str(cached_checkpoint(name))
    raise SfdError(f"there is no folder '{name}', nor a released model of that name; {nearest(name, released)}")


@contextlib.contextmanager
def _keywords_for_flags() -> Iterator[None]:
    """Let errors of code shared with commands name keywords, `nfe=9`, instead of flags, `--nfe=9`."""
    try:
        yield
    except SfdError as error:
        error.args = (_without_dashes(str(error)),)
        raise


def _without_dashes(message: str) -> str:
    names = "|".join(["texture_vae", "weak", *defaults_of(SampleJob)])
    return re.sub(rf"--(?=({names})\b)", "", message)
