"""The demo's stages up to the trained models: each does what its command does, with a small config.

    images -> texture VAE -> texture latents  \\
    images -> encoder -> features -> Semantic VAE -> semantic latents  -> latent shards -> diffusion models

A stage reads only what earlier ones wrote to the work folder, so a continued run does the same as an
uninterrupted one.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from sfd_jax.data.extract import ExtractConfig
from sfd_jax.data.images import ImageSource, open_images
from sfd_jax.data.pipeline import mirrored
from sfd_jax.experiment import training
from sfd_jax.experiment.checkpoints import OpenCheckpoint, open_checkpoint
from sfd_jax.experiment.demo.own_images import PREPARED
from sfd_jax.experiment.extraction import OpenEncoder, extract_latents, make_encoder
from sfd_jax.experiment.run import Run, train
from sfd_jax.models.encoders import Tiling, VisualEncoder, to_float
from sfd_jax.models.fingerprint import params_hash
from sfd_jax.ranges import IN_PACKAGES
from sfd_jax.settings import from_group
from sfd_jax.training.semantic_vae import measure_semantic_vae


@dataclasses.dataclass(frozen=True)
class Demo:
    """The configuration and work folder of a run, and access to its images and checkpoints.

    Attributes:
      config: configs/digits.py, configs/mnist.py or configs/own_images.py.
      workdir: has one folder per stage.
    """

    config: ConfigDict
    workdir: Path

    @property
    def digits(self) -> bool:
        """Whether the images are handwritten digits that ship inside a package."""
        return self.config.data.kind in IN_PACKAGES

    @property
    def flips(self) -> bool:
        """Whether mirrored images are trained on too; a mirrored digit is not a digit."""
        return self.config.extract.flips

    @property
    def data(self) -> dict:
        """The group `data` of the stages' configs."""
        data = self.config.data.to_dict()
        return data if self.digits else {**data, "path": str(self.workdir / PREPARED)}

    def source(self, split: str) -> ImageSource:
        """Return the images of a split, "train" or "held_out"."""
        return open_images(self.data["kind"], self.data["path"], split, self.data["image_size"])

    def images(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the images of a split: pixels uint8 (N,H,W,3), labels (N,)."""
        if not (self.digits or (self.workdir / PREPARED / split).is_dir()):  # no class is large enough
            size = self.data["image_size"]
            return np.empty((0, size, size, 3), np.uint8), np.empty(0, int)
        source = self.source(split)
        records = list(source)
        # By name, since a class may have no held-out images.
        labels = {name: label for label, name in enumerate(self.class_names)}
        labels = [labels[source.class_names[record["label"]]] for record in records]
        return np.stack([record["pixels"] for record in records]), np.array(labels)

    @property
    def class_names(self) -> list[str]:
        """Names by label."""
        return self.source("train").class_names

    def open(self, stage: str) -> OpenCheckpoint:
        """Open the checkpoint that a stage has trained."""
        return open_checkpoint(str(self.workdir / stage))

    def stage_config(self, stage: str, **data: Any) -> ConfigDict:
        """Return a stage's config as its training command takes it; `data` is merged into its group `data`."""
        config = self.config[stage].copy_and_resolve_references().unlock()
        config.seed, config.mesh = self.config.seed, self.config.mesh.to_dict()
        here = {"workers": 0, "flips": self.flips, **self.data, **data}
        config.data = {**here, **config.get("data", {})}
        return config

    def train(self, stage: str, run: Run, *, cache: bool = True) -> None:
        """Train a run into the stage's folder; `cache` keeps its records in memory."""
        train(dataclasses.replace(run, cache=cache), str(self.workdir / stage), table=False)

    def visual_encoder(self) -> tuple[VisualEncoder, dict]:
        """Return the trained encoder, which sees whole images, and its parameters."""
        network, params, _ = self.open("encoder")
        size = self.config.data.image_size
        return VisualEncoder(network, Tiling.whole(size, size, network)), params


def by_pieces(function: Callable, params: dict, rows: np.ndarray, size: int = 2048) -> np.ndarray:
    """Return `function(params, rows)`, one result per row (N, ...), computed `size` rows at a time."""
    starts = range(0, len(rows), size)
    return np.concatenate([np.asarray(function(params, rows[start : start + size])) for start in starts])


def train_texture_vae(demo: Demo) -> dict:
    """Train the texture VAE on the training images; return the PSNR of held-out ones."""
    config = demo.stage_config("texture_vae", split="train", held_out_split="")
    config.lpips = ""
    demo.train("texture_vae", training.open_texture_vae(config))

    network, params, _ = demo.open("texture_vae")
    pixels, _ = demo.images("held_out")
    if not len(pixels):
        return {}

    @jax.jit
    def squared_error(params, pixels):
        pixels = to_float(pixels)
        mean, _ = network.apply(params, pixels, method="encode")
        return jnp.mean((network.apply(params, mean, method="decode") - pixels) ** 2, axis=(1, 2, 3))

    psnr = 10 * np.log10(4.0 / by_pieces(squared_error, params, pixels, size=360).mean())  # pixels span 2
    return {"held-out PSNR": round(float(psnr), 2)}


def train_encoder(demo: Demo) -> dict:
    """Train the visual encoder on the training images, since the demo downloads no released one."""
    run = training.open_visual_encoder(demo.stage_config("encoder", split="train"))
    if len(demo.class_names) == 1:
        run = dataclasses.replace(run, source=Rotated(run.source))
    demo.train("encoder", run)
    pixels, labels = demo.images("held_out")
    if len(demo.class_names) == 1 or not len(pixels):
        return {}
    return {"held-out accuracy": round(float(np.mean(label_reader(demo)(pixels) == labels)), 4)}


class Rotated:
    """Each image rotated by 0, 90, 180 and 270 degrees, with the number of quarter turns as its label.

    This trains an encoder without classes (Gidaris et al. 2018, arXiv 1803.07728).
    """

    def __init__(self, source: ImageSource):
        self.source = source
        self.class_names = ["0", "90", "180", "270"]

    def __len__(self) -> int:
        return 4 * len(self.source)

    def __getitem__(self, index: int) -> dict:
        pixels, turns = self.source[index // 4]["pixels"], index % 4
        return {"pixels": np.rot90(pixels, turns).copy(), "label": turns, "index": index}


def label_reader(demo: Demo) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function that classifies images by the nearest class mean of the encoder's training features.

    Args:
      demo: with a trained encoder, whose head is not used.

    Returns:
      A function of pixels, uint8 (N,H,W,3), to labels, int (N,).
    """

    def unit(pixels):
        features = visual_features(demo, pixels).mean(axis=1)
        return features / np.linalg.norm(features, axis=1, keepdims=True)

    train, labels = demo.images("train")
    features, present = unit(train), np.unique(labels)
    means = np.stack([features[labels == label].mean(axis=0) for label in present])
    return lambda pixels: present[np.argmax(unit(pixels) @ means.T, axis=1)]


def visual_features(demo: Demo, pixels: np.ndarray) -> np.ndarray:
    """Return the patch features (N,T,F) float32 of images uint8 (N,H,W,3)."""
    encoder, params = demo.visual_encoder()
    return by_pieces(functools.partial(_features, encoder), params, pixels)


@functools.partial(jax.jit, static_argnums=0)
def _features(encoder: VisualEncoder, params: dict, pixels: jax.Array) -> jax.Array:
    return encoder.features(params, to_float(pixels))


class _Features:
    """Features in memory as a random-access source of records."""

    def __init__(self, features: np.ndarray, labels: np.ndarray, encoder: str):
        self.features, self.labels = features, labels
        self.origin = {"weights": {"visual": encoder}}

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: int) -> dict:
        named = {"label": np.int32(self.labels[index]), "index": np.int64(index)}
        return {"repa_features": self.features[index], **named}


def train_semantic_vae(demo: Demo) -> dict:
    """Train the Semantic VAE on the encoder's features with the released loss."""
    config = demo.stage_config("semantic_vae", held_out_path="", visual_encoder="", flips=False)
    pixels, labels = demo.images("train")
    if demo.flips:
        pixels = np.concatenate([pixels, mirrored(pixels, np.ones(len(pixels), bool))])
        labels = np.concatenate([labels, labels])
    features = _Features(visual_features(demo, pixels), labels, params_hash(demo.open("encoder").params))
    demo.train("semantic_vae", training.open_semantic_vae(config, features=features), cache=False)

    network, params, _ = demo.open("semantic_vae")
    pixels, _ = demo.images("held_out")
    if not len(pixels):
        return {}
    measure = jax.jit(lambda params, features: measure_semantic_vae(network, params, {"features": features})["cosine"])
    similarity = by_pieces(measure, params, visual_features(demo, pixels)).mean()
    return {"held-out cosine similarity": round(float(similarity), 4)}


def extract(demo: Demo, folder: str = "latents", pca: int | None = None, split: str = "train") -> dict:
    """Turn the images of a split into latent shards with statistics and REPA features.

    Args:
      demo: with trained autoencoders.
      folder: of the shards.
      pca: principal components as semantic latents instead of the Semantic VAE's.
      split: "train" or "held_out".
    """
    settings = {**demo.config.extract, "seed": demo.config.seed, "pca": pca}
    config = from_group(ExtractConfig, settings, "config group 'extract'")
    stages = {"texture_vae": "texture_vae", "visual": "encoder", "semantic_vae": "semantic_vae"}
    if pca:
        del stages["semantic_vae"]
    opened = {name: demo.open(stage) for name, stage in stages.items()}
    encoder = make_encoder({name: each.network for name, each in opened.items()}, config)
    opened = OpenEncoder(encoder, {name: each.params for name, each in opened.items()}, {}, [])
    about = {"data": demo.config.data.to_dict()}
    store = extract_latents(demo.source(split), opened, config, str(demo.workdir / folder), about)
    store.verify()
    return {"images": len(store)}


def train_diffusion(demo: Demo, stage: str) -> dict:
    """Train the diffusion model ("diffusion") or the weaker one for AutoGuidance ("weak")."""
    config = diffusion_config(demo, stage)
    if stage == "diffusion":  # the default settings of `sfd sample` and `Pipeline`
        config.sample = demo.config.sample
    run = training.open_diffusion(config)
    demo.train(stage, run)
    return {"parameters": run.task.network.num_params()}


def diffusion_config(demo: Demo, stage: str = "diffusion", latents: str = "latents") -> ConfigDict:
    """Return the config of a diffusion model on the latents in a folder of the work folder."""
    no_networks = {"repa_source": "stored", "semantic_vae": "", "visual_encoder": ""}
    config = demo.stage_config(stage, **no_networks)
    config.data.path = str(demo.workdir / latents)
    return config
