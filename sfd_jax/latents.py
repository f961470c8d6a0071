"""Channel layout and normalisation of the composite latent: the only file that knows the channel order.

The composite latent has the texture channels first and the semantic channels after them, as in
the released weights (the paper writes the pair the other way round). Arrays are channels last.
A latent has two names: `raw_latents` as an encoder gives them, `latents` once normalised.

Source: arXiv 2512.04926, section 3; released `datasets/img_latent_dataset.py`.
"""

import dataclasses
import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sfd_jax.errors import SfdError
from sfd_jax.ranges import check_fields

Array = Any  # a numpy or a jax array


@dataclasses.dataclass(frozen=True)
class LatentLayout:
    """Split and join the two groups of channels of a composite latent.

    Args:
      texture_channels: number of texture channels, at least 1.
      semantic_channels: number of semantic channels; 0 for a texture-only system.
    """

    texture_channels: int
    semantic_channels: int

    def __post_init__(self):
        check_fields("latents", self)

    @property
    def channels(self) -> int:
        return self.texture_channels + self.semantic_channels

    def join(self, texture_latents: Array, semantic_latents: Array) -> jax.Array:
        """Join the groups, (..., C_texture) and (..., C_semantic), to (..., C)."""
        self._check(texture_latents, self.texture_channels, "texture latents")
        self._check(semantic_latents, self.semantic_channels, "semantic latents")
        return jnp.concatenate([texture_latents, semantic_latents], axis=-1)

    def split(self, latents: Array) -> tuple[Array, Array]:
        """Split (..., C) into texture (..., C_texture) and semantic (..., C_semantic)."""
        self._check(latents, self.channels, "latents")
        return latents[..., : self.texture_channels], latents[..., self.texture_channels :]

    def per_channel(self, texture: Array, semantic: Array) -> jax.Array:
        """Spread one value a group over the channels of the group.

        Args:
          texture, semantic: scalars, or arrays of one shape (...).

        Returns:
          (..., C) float32.
        """
        texture, semantic = jnp.asarray(texture, jnp.float32), jnp.asarray(semantic, jnp.float32)
        is_texture = np.arange(self.channels) < self.texture_channels
        is_texture = is_texture.reshape((1,) * texture.ndim + (-1,))
        return jnp.where(is_texture, texture[..., None], semantic[..., None])

    @staticmethod
    def _check(array: Array, channels: int, what: str):
        if array.shape[-1] != channels:
            raise SfdError(
                f"{what} of shape {tuple(array.shape)} do not have {channels} channels last: check "
                "latents.texture_channels and latents.semantic_channels of the config"
            )


@dataclasses.dataclass(frozen=True, eq=False)
class LatentStatistics:
    """Hold per-channel mean and standard deviation of the raw latents of each group.

    Args:
      texture_mean, texture_std: (C_texture,) float32.
      semantic_mean, semantic_std: (C_semantic,) float32; empty for a texture-only system.
      multiplier: factor after normalisation, 1.0 in the released systems.

    Raises:
      SfdError: if mean and std differ in shape, or a value is not finite, or a std not positive.

    Source: `(raw - mean) / std * multiplier`, released `img_latent_dataset.py`.
    """

    texture_mean: np.ndarray
    texture_std: np.ndarray
    semantic_mean: np.ndarray
    semantic_std: np.ndarray
    multiplier: float = 1.0

    def __post_init__(self):
        for name in _ARRAYS:
            object.__setattr__(self, name, np.asarray(getattr(self, name), np.float32).reshape(-1))
        object.__setattr__(self, "multiplier", float(self.multiplier))
        for group in ("texture", "semantic"):
            mean, std = getattr(self, f"{group}_mean"), getattr(self, f"{group}_std")
            if mean.shape != std.shape:
                raise SfdError(f"{group} statistics: {mean.size} means but {std.size} standard deviations")
            if not (np.isfinite(mean).all() and np.isfinite(std).all() and (std > 0).all()):
                raise SfdError(
                    f"{group} statistics: every mean must be finite and every standard deviation "
                    "finite and positive; recompute them from the latents"
                )

    def normalise_texture(self, raw_latents: Array) -> Array:
        """Normalise raw texture latents (..., C_texture)."""
        return _normalise(raw_latents, self.texture_mean, self.texture_std, self.multiplier)

    def denormalise_texture(self, latents: Array) -> Array:
        """Undo `normalise_texture`."""
        return _denormalise(latents, self.texture_mean, self.texture_std, self.multiplier)

    def normalise_semantic(self, raw_latents: Array) -> Array:
        """Normalise raw semantic latents (..., C_semantic)."""
        return _normalise(raw_latents, self.semantic_mean, self.semantic_std, self.multiplier)

    def denormalise_semantic(self, latents: Array) -> Array:
        """Undo `normalise_semantic`."""
        return _denormalise(latents, self.semantic_mean, self.semantic_std, self.multiplier)

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold; `from_dict` restores it bit for bit."""
        lists = {name: getattr(self, name).tolist() for name in _ARRAYS}
        return lists | {"multiplier": self.multiplier}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "LatentStatistics":
        """Build from `to_dict`.

        Raises:
          SfdError: if a field is missing or unknown.
        """
        expected = {*_ARRAYS, "multiplier"}
        if set(fields) != expected:
            raise SfdError(
                f"latent statistics: missing {sorted(expected - set(fields))}, unknown {sorted(set(fields) - expected)}"
            )
        return cls(**fields)

    def texture_alone(self) -> "LatentStatistics":
        """Return these statistics without the semantic group."""
        return dataclasses.replace(self, semantic_mean=np.empty(0), semantic_std=np.empty(0))

    def same_scale(self, other: "LatentStatistics") -> bool:
        """Tell whether both normalise latents alike, to a hundredth of a standard deviation."""
        ours, theirs = ([s.texture_mean, s.texture_std, s.semantic_mean, s.semantic_std] for s in (self, other))
        if [a.shape for a in ours] != [a.shape for a in theirs] or self.multiplier != other.multiplier:
            return False
        return all(
            (np.abs(a - b) <= 0.01 * ours[1 + i // 2 * 2]).all()
            for i, (a, b) in enumerate(zip(ours, theirs, strict=True))
        )

    def hash(self) -> str:
        """Return a hex digest that names these statistics in reports."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()


def other_makers(latents: dict[str, Any] | None, others: dict[str, Any] | None) -> list[str]:
    """Name the networks whose weights differ between the makers of two sets of latents.

    Args:
      latents, others: "latents" of a checkpoint's metadata, or a source's `origin`: "weights" has the hash of each
        network that made them, and is empty where that is not known; then nothing is compared.

    Returns:
      "texture_vae 0123456789ab, not ba9876543210" for each network that differs.
    """
    ours, theirs = ((origin or {}).get("weights") or {} for origin in (latents, others))
    if not (ours and theirs):
        return []
    short = lambda weights, name: weights.get(name, "none")[:12]
    names = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    return [f"{name} {short(ours, name)}, not {short(theirs, name)}" for name in names]


def normalised_composite(
    layout: LatentLayout, statistics: LatentStatistics, texture: np.ndarray, semantic: np.ndarray
) -> np.ndarray:
    """Normalise both groups of raw latents and join them, in numpy.

    Made for the loader: JAX would initialise an accelerator in every loader process. A few images at a time are
    finished while they lie in the processor's cache, by statistics spread over a whole image: rows as short as a
    group's channels cost three times the arithmetic.

    Args:
      layout: the channels of each group.
      statistics: of both groups.
      texture, semantic: raw latents (B,H,W,C of the group), any floating dtype; with a layout of texture alone,
        `semantic` is not used.

    Returns:
      float32 (B,H,W,C), the same numbers as `join(normalise_texture(...), normalise_semantic(...))`.
    """
    latents = np.empty((*texture.shape[:-1], layout.channels), np.float32)
    mean, std = np.empty((2, *latents.shape[1:]), np.float32)
    for spread, group_values in (
        (mean, (statistics.texture_mean, statistics.semantic_mean)),
        (std, (statistics.texture_std, statistics.semantic_std)),
    ):
        for group, values in zip(layout.split(spread), group_values, strict=True):
            group[...] = values
    texture_latents, semantic_latents = layout.split(latents)
    if not layout.semantic_channels:
        semantic = semantic[..., :0]
    for first in range(0, len(latents), _IMAGES_AT_ONCE):
        rows = slice(first, first + _IMAGES_AT_ONCE)
        texture_latents[rows] = texture[rows]
        semantic_latents[rows] = semantic[rows]
        images = latents[rows]
        images -= mean
        images /= std
        if statistics.multiplier != 1.0:
            images *= np.float32(statistics.multiplier)
    return latents


def _normalise(raw_latents: Array, mean: np.ndarray, std: np.ndarray, multiplier: float) -> Array:
    leading = (1,) * (raw_latents.ndim - 1)  # explicit: JAX may be set to refuse rank promotion
    return (raw_latents - mean.reshape(*leading, -1)) / std.reshape(*leading, -1) * multiplier


def _denormalise(latents: Array, mean: np.ndarray, std: np.ndarray, multiplier: float) -> Array:
    leading = (1,) * (latents.ndim - 1)
    return latents * std.reshape(*leading, -1) / multiplier + mean.reshape(*leading, -1)


_IMAGES_AT_ONCE = 16
_ARRAYS = ("texture_mean", "texture_std", "semantic_mean", "semantic_std")
