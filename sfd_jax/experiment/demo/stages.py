"""The demo's stages up to the trained models: each what its command does, with a small config.

    digits -> texture VAE -> texture latents  \\
    digits -> encoder -> features -> Semantic VAE -> semantic latents  -> latent shards -> diffusion models

A stage reads what earlier ones wrote to the work folder, so that a run that goes on does what an
uninterrupted one does.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from sfd_jax.data.extract import ExtractConfig
from sfd_jax.data.images import ImageSource, open_images
from sfd_jax.experiment import training
from sfd_jax.experiment.checkpoints import OpenCheckpoint, open_checkpoint
from sfd_jax.experiment.extraction import OpenEncoder, extract_latents, make_encoder
from sfd_jax.experiment.run import Run, train
from sfd_jax.models.encoders import Tiling, VisualEncoder, to_float
from sfd_jax.models.fingerprint import params_hash
from sfd_jax.settings import from_group
from sfd_jax.training.semantic_vae import measure_semantic_vae


@dataclasses.dataclass(frozen=True)
class Demo:
    """What every stage needs.

    Attributes:
      config: configs/digits.py.
      workdir: one folder a stage in it.
    """

    config: ConfigDict
    workdir: Path

    def digits(self, split: str) -> ImageSource:
        """Return the digits of a split, "train" or "held_out"."""
        data = self.config.data
        return open_images(data.kind, data.path, split, data.image_size)

    def images(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the digits of a split: pixels uint8 (N,H,W,3), labels (N,)."""
        records = list(self.digits(split))
        return np.stack([r["pixels"] for r in records]), np.array([r["label"] for r in records])

    def open(self, stage: str) -> OpenCheckpoint:
        """Open what a stage has trained."""
        return open_checkpoint(str(self.workdir / stage))

    def stage_config(self, stage: str, **data: Any) -> ConfigDict:
        """Return a stage's config in the shape that its training command takes; `data` goes into its group `data`."""
        config = self.config[stage].copy_and_resolve_references().unlock()
        config.seed, config.mesh = self.config.seed, self.config.mesh.to_dict()
        here = {"workers": 0, "flips": False, **self.config.data, **data}  # a mirrored digit is no digit
        config.data = {**here, **config.get("data", {})}
        return config

    def train(self, stage: str, run: Run) -> None:
        """Train a run into the stage's folder."""
        train(dataclasses.replace(run, cache=True), str(self.workdir / stage), table=False)

    def visual_encoder(self) -> tuple[VisualEncoder, dict]:
        """Return the trained encoder, which sees whole digits, and its parameters."""
        network, params, _ = self.open("encoder")
        size = self.config.data.image_size
        return VisualEncoder(network, Tiling.whole(size, size, network)), params


def train_texture_vae(demo: Demo) -> dict:
    """Train the texture VAE on the training digits; report how held-out ones come back."""
    config = demo.stage_config("texture_vae", split="train", held_out_split="")
    config.lpips = ""
    demo.train("texture_vae", training.open_texture_vae(config))

    network, params, _ = demo.open("texture_vae")
    pixels = to_float(jnp.asarray(demo.images("held_out")[0]))

    @jax.jit
    def squared_error(params, pixels):
        mean, _ = network.apply(params, pixels, method="encode")
        return jnp.mean((network.apply(params, mean, method="decode") - pixels) ** 2)

    psnr = 10 * np.log10(4.0 / float(squared_error(params, pixels)))  # pixels span 2
    return {"held-out PSNR": round(psnr, 2)}


def train_encoder(demo: Demo) -> dict:
    """Train the visual encoder on the training digits, since no released weight is at hand."""
    demo.train("encoder", training.open_visual_encoder(demo.stage_config("encoder", split="train")))
    return {"held-out accuracy": round(_probe_accuracy(demo), 4)}


def _probe_accuracy(demo: Demo) -> float:
    """Classify held-out digits by the nearest class mean of training features: no head is needed."""
    tokens = {}
    for split in ("train", "held_out"):
        features, labels = visual_features(demo, split)
        features = features.mean(axis=1)
        tokens[split] = features / np.linalg.norm(features, axis=1, keepdims=True), labels
    features, labels = tokens["train"]
    means = np.stack([features[labels == label].mean(axis=0) for label in range(labels.max() + 1)])
    features, labels = tokens["held_out"]
    return float(np.mean(np.argmax(features @ means.T, axis=1) == labels))


def visual_features(demo: Demo, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the patch features (N,T,F) float32 and labels (N,) of a split."""
    encoder, params = demo.visual_encoder()
    pixels, labels = demo.images(split)
    features = jax.jit(lambda params, pixels: encoder.features(params, to_float(pixels)))
    return np.asarray(features(params, pixels)), labels


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
    config = demo.stage_config("semantic_vae", held_out_path="", visual_encoder="")
    features = _Features(*visual_features(demo, "train"), params_hash(demo.open("encoder").params))
    demo.train("semantic_vae", training.open_semantic_vae(config, features=features))

    network, params, _ = demo.open("semantic_vae")
    measure = jax.jit(lambda params, features: measure_semantic_vae(network, params, {"features": features}))
    similarity = measure(params, visual_features(demo, "held_out")[0])["cosine"].mean()
    return {"held-out cosine similarity": round(float(similarity), 4)}


def extract(demo: Demo) -> dict:
    """Turn the training digits into latent shards with statistics and REPA features."""
    config = from_group(ExtractConfig, {**demo.config.extract, "seed": demo.config.seed}, "config group 'extract'")
    stages = {"texture_vae": "texture_vae", "visual": "encoder", "semantic_vae": "semantic_vae"}
    opened = {name: demo.open(stage) for name, stage in stages.items()}
    encoder = make_encoder({name: each.network for name, each in opened.items()}, config)
    opened = OpenEncoder(encoder, {name: each.params for name, each in opened.items()}, {}, [])
    about = {"data": demo.config.data.to_dict()}
    store = extract_latents(demo.digits("train"), opened, config, str(demo.workdir / "latents"), about)
    store.verify()
    return {"images": len(store)}


def train_diffusion(demo: Demo, stage: str) -> dict:
    """Train a diffusion model ("diffusion") or its weaker companion for AutoGuidance ("weak")."""
    no_networks = {"repa_source": "stored", "semantic_vae": "", "visual_encoder": ""}
    config = demo.stage_config(stage, **no_networks)
    config.data.path = str(demo.workdir / "latents")
    run = training.open_diffusion(config)
    demo.train(stage, run)
    return {"parameters": run.task.network.num_params()}
