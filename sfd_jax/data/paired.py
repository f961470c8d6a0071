"""Latents together with the pixels they were made from, for training steps that need pixels."""

import numpy as np

from sfd_jax.data.images import ImageSource
from sfd_jax.data.latent_store import LatentSource
from sfd_jax.data.pipeline import mirrored, read_records
from sfd_jax.errors import SfdError


class WithPixels:
    """Add to each record of latents the pixels of its image, by the record's `index` in the image source.

    Args:
      latents: a source of records with `index` and `label`: a latent store, or released shards.
      images: the `ImageSource` they were made from.

    Raises:
      SfdError: the number of images differs. When read: an image is missing, broken, or has another label than its
        latents, so these are not the images that the latents were made from.
    """

    def __init__(self, latents: LatentSource, images: ImageSource):
        self.latents, self.images = latents, images
        self.statistics, self.class_names = latents.statistics, latents.class_names
        self.notes = [*getattr(latents, "notes", ()), *getattr(images, "notes", ())]
        total = getattr(latents, "manifest", {}).get("total", len(images))
        if total != len(images):
            raise SfdError(
                f"the latents were made from {total:,} images, but there are {len(images):,}: set data.images to the "
                "images that the latents were made from"
            )
        self.origin = getattr(latents, "origin", None)

    def __len__(self) -> int:
        return len(self.latents)

    def label_counts(self) -> dict[int, int]:
        """Return the number of images by label."""
        return self.latents.label_counts()

    def read(self, indices: np.ndarray, flip: np.ndarray) -> dict[str, np.ndarray]:
        """Return the records stacked, with `pixels` uint8 (B,H,W,3); mirror images where `flip` (B,)."""
        batch = read_records(self.latents, indices, flip)
        if batch["index"].max() >= len(self.images):
            raise SfdError(
                f"latents of image {batch['index'].max()}, but there are {len(self.images)} images: "
                "set data.images to the images that the latents were made from"
            )
        records = [self.images[int(index)] for index in batch["index"]]
        for record, label in zip(records, batch["label"], strict=True):
            if record["label"] != label:
                raise SfdError(
                    f"image {record['index']} has label {record['label']}, but its latents {label}: "
                    "set data.images to the images that the latents were made from"
                )
        return {**batch, "pixels": mirrored(np.stack([record["pixels"] for record in records]), flip)}
