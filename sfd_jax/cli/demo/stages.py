"""The demo's stages up to the trained models: each the general code of its room, with a small config.

    digits -> texture VAE -> texture latents  \\
    digits -> encoder -> features -> Semantic VAE -> semantic latents  -> latent shards -> diffusion models

A stage reads what earlier ones wrote to the work folder, so that a run that goes on does what an
uninterrupted one does.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from sfd_jax.data.extract import ExtractConfig
from sfd_jax.data.images import ImageSource, open_images
from sfd_jax.data.latent_store import LatentStore
from sfd_jax.data.pipeline import latent_transform, make_batches, pixel_transform
from sfd_jax.distributed import make_mesh
from sfd_jax.experiment import extraction
from sfd_jax.experiment.build import (
    diffusion_settings,
    from_group,
    layout_from_config,
    network_from_config,
    train_config,
)
from sfd_jax.models import Network
from sfd_jax.models.encoders import Tiling, VisualEncoder, to_float
from sfd_jax.training import fit, load_params
from sfd_jax.training.diffusion import diffusion_task
from sfd_jax.training.semantic_vae import SemanticVAELoss, semantic_vae_task
from sfd_jax.training.texture_vae import TextureVAELoss, texture_vae_task
from sfd_jax.training.visual_encoder import VisualEncoderLoss, visual_encoder_task


@dataclasses.dataclass(frozen=True)
class Demo:
    """What every stage needs: the configuration, the folder, and the real digits.

    Attributes:
      config: configs/digits.py.
      workdir: one folder a stage in it.
    """

    config: ml_collections.ConfigDict
    workdir: Path

    @property
    def mesh(self) -> jax.sharding.Mesh:
        return make_mesh(**self.config.mesh)

    def digits(self, split: str) -> ImageSource:
        data = self.config.data
        return open_images(data.kind, data.path, split, data.image_size)

    def images(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the digits of a split: pixels uint8 (N,H,W,3), labels (N,)."""
        records = [record for record in self.digits(split)]
        return np.stack([r["pixels"] for r in records]), np.array([r["label"] for r in records])

    def load(self, stage: str) -> tuple[Network, dict]:
        """Return a trained stage's network and its averaged parameters."""
        params, metadata = load_params(self.workdir / stage)
        return Network(metadata["network"], metadata["network_config"]), params

    def fit(self, stage: str, task, batches, metadata: dict | None = None) -> None:
        """Train `task` with the stage's own optimizer and lengths, into the stage's folder."""
        settings = self.config[stage]
        fit(
            task,
            batches,
            train_config(settings),
            self.workdir / stage,
            mesh=self.mesh,
            seed=self.config.seed,
            metadata={"config": settings.to_dict(), **(metadata or {})},
        )

    def batches(self, stage: str, source, transform=None):
        return make_batches(
            source,
            seed=self.config.seed,
            global_batch_size=self.config[stage].train.global_batch_size,
            transform=transform,
            cache=True,
        )

    def visual_encoder(self) -> tuple[VisualEncoder, dict]:
        network, params = self.load("encoder")
        size = self.config.data.image_size
        return VisualEncoder(network, Tiling.whole(size, size, network)), params


def train_texture_vae(demo: Demo) -> dict:
    """Train the texture VAE on the training digits; report how held-out ones come back."""
    settings = demo.config.texture_vae
    network = Network("texture_vae", settings.model.to_dict())
    task = texture_vae_task(network, TextureVAELoss(**settings.loss))
    demo.fit("texture_vae", task, demo.batches("texture_vae", demo.digits("train"), pixel_transform))

    network, params = demo.load("texture_vae")
    pixels = to_float(jnp.asarray(demo.images("held_out")[0]))

    @jax.jit
    def squared_error(params, pixels):
        mean, _ = network.apply(params, pixels, method="encode")
        return jnp.mean((network.apply(params, mean, method="decode") - pixels) ** 2)

    psnr = 10 * np.log10(4.0 / float(squared_error(params, pixels)))  # pixels span 2
    return {"held-out PSNR": round(psnr, 2)}


def train_encoder(demo: Demo) -> dict:
    """Train the visual encoder on the training digits, since no published weight is at hand."""
    settings = demo.config.encoder
    network = Network("dinov2", settings.model.to_dict())
    task = visual_encoder_task(network, VisualEncoderLoss(**settings.loss))
    demo.fit("encoder", task, demo.batches("encoder", demo.digits("train"), pixel_transform))
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

    def __init__(self, features: np.ndarray, labels: np.ndarray):
        self.features, self.labels = features, labels

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: int) -> dict:
        return {"features": self.features[index], "labels": np.int32(self.labels[index]), "index": np.int64(index)}


def train_semantic_vae(demo: Demo) -> dict:
    """Train the Semantic VAE on the encoder's features with the released loss."""
    settings = demo.config.semantic_vae
    network = Network("semantic_vae", settings.model.to_dict())
    task = semantic_vae_task(network, SemanticVAELoss(**settings.loss))
    demo.fit("semantic_vae", task, demo.batches("semantic_vae", _Features(*visual_features(demo, "train"))))

    network, params = demo.load("semantic_vae")
    features, _ = visual_features(demo, "held_out")

    @jax.jit
    def similarity(params, features):
        mean, _ = network.apply(params, features, method="encode")
        back = network.apply(params, mean, method="decode")
        norms = jnp.linalg.norm(back, axis=-1) * jnp.linalg.norm(features, axis=-1)
        return jnp.mean(jnp.sum(back * features, axis=-1) / norms)

    return {"held-out cosine similarity": round(float(similarity(params, features)), 4)}


def extract_latents(demo: Demo) -> dict:
    """Turn the training digits into latent shards with statistics and REPA features."""
    config = from_group(ExtractConfig, "extract", {**demo.config.extract, "seed": demo.config.seed})
    networks = {"texture_vae": "texture_vae", "visual": "encoder", "semantic_vae": "semantic_vae"}
    loaded = {name: demo.load(stage) for name, stage in networks.items()}
    encoder = extraction.make_encoder({name: network for name, (network, _) in loaded.items()}, config)
    opened = extraction.OpenEncoder(encoder, {name: params for name, (_, params) in loaded.items()}, {}, [])
    about = {"data": demo.config.data.to_dict()}
    store = extraction.extract_latents(demo.digits("train"), opened, config, str(demo.workdir / "latents"), about)
    store.verify()
    return {"images": len(store)}


def train_diffusion(demo: Demo, stage: str) -> dict:
    """Train a diffusion model ("diffusion") or its weaker companion for AutoGuidance ("weak")."""
    settings = demo.config[stage]
    store = LatentStore(demo.workdir / "latents")
    layout = layout_from_config(settings)
    network = network_from_config(settings)
    task = diffusion_task(network, layout, **diffusion_settings(settings))
    transform = latent_transform(layout, store.statistics, repa=settings.model.repa_features > 0)
    metadata = {
        "latent_statistics": store.statistics.to_dict(),
        "class_names": demo.digits("train").class_names,
        "latents": store.origin,
    }
    demo.fit(stage, task, demo.batches(stage, store, transform), metadata)
    return {"parameters": network.num_params()}
