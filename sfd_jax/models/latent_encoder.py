"""From pixels to the raw latents of both groups: the encoders composed as in the released code.

    texture:  pixels -> texture VAE -> sample (or mean) of the posterior          (B,h,w,C)
    semantic: pixels -> tiles -> visual encoder -> Semantic VAE, or PCA -> grid   (B,h,w,C)

A visual encoder gets large images in tiles, and each tile is compressed on its own (encoders/tiles.py).

What is drawn for an image depends only on (seed, index of the image, which latent).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from sfd_jax.errors import SfdError
from sfd_jax.models.encoders.tiles import VisualEncoder, join_tokens, split_tiles, tiles_of_grid, to_float
from sfd_jax.models.network import Network, Params
from sfd_jax.models.posterior import sample_posterior
from sfd_jax.randomness import keys_by_row
from sfd_jax.ranges import check


@dataclasses.dataclass(frozen=True)
class LatentEncoder:
    """Encode images to the records of a latent store.

    Attributes:
      texture: a "texture_vae" network.
      visual: the visual encoder, or None for texture latents only.
      semantic: a "semantic_vae" network; None compresses by PCA (see `data/pca.py`).
      texture_posterior, semantic_posterior: "sample" as released, or "mean".
      flips: also encode the mirrored image.
      repa: also return the visual features.
      seed: of the posterior samples.
    """

    texture: Network
    visual: VisualEncoder | None = None
    semantic: Network | None = None
    texture_posterior: str = "sample"
    semantic_posterior: str = "sample"
    flips: bool = True
    repa: bool = False
    seed: int = 0

    def __post_init__(self):
        check(seed=self.seed)
        for posterior in (self.texture_posterior, self.semantic_posterior):
            if posterior not in ("sample", "mean"):
                raise SfdError(f"posterior '{posterior}': choose sample or mean")
        if self.visual is None and (self.semantic is not None or self.repa):
            raise SfdError("semantic latents and REPA features need a visual encoder")
        if self.semantic is not None and self.semantic.config.input_dim != self.visual.network.config.feature_width:
            raise SfdError(
                f"the Semantic VAE compresses features of {self.semantic.config.input_dim}, but the visual encoder "
                f"makes features of {self.visual.network.config.feature_width}: give the encoder that it was trained on"
            )

    @property
    def networks(self) -> dict[str, Network]:
        """Return the networks by the names of their parameters."""
        parts = {
            "texture_vae": self.texture,
            "visual": self.visual and self.visual.network,
            "semantic_vae": self.semantic,
        }
        return {name: network for name, network in parts.items() if network is not None}

    def __call__(self, params: dict, pixels: jax.Array, index: jax.Array) -> dict[str, jax.Array]:
        """Encode a batch.

        Args:
          params: {"texture_vae": tree, "visual": tree, and "semantic_vae": tree or
            "pca": {"mean" (F,), "components" (F,C)}}.
          pixels: uint8 (B,H,W,3).
          index: int32 (B,), of each image in its source.

        Returns:
          float32 `texture` (B,h,w,C), `semantic` (B,h,w,C), C = 0 without a visual encoder; with
          flips `texture_flip`, `semantic_flip`; with repa float16 `repa_features` (B,N,F) and its flip.

        Raises:
          SfdError: the two groups come out with different grids.
        """
        pixels = to_float(pixels)
        if not self.flips:
            return self._orientation(params, pixels, index, 0)
        # A loop over both views, so that the networks are compiled once.
        views = jnp.stack([pixels, pixels[:, :, ::-1]])
        both = jax.lax.map(lambda view: self._orientation(params, view[0], index, view[1]), (views, jnp.arange(2)))
        upright, flipped = (jax.tree.map(lambda values, i=i: values[i], both) for i in range(2))
        return upright | {f"{name}_flip": values for name, values in flipped.items()}

    def _orientation(self, params, pixels, index, flipped) -> dict[str, jax.Array]:
        mean, logvar = self.texture.apply(params["texture_vae"], pixels, method="encode")
        texture = self._posterior(self.texture_posterior, mean, logvar, index, 2 * flipped)
        if self.visual is None:
            return {"texture": texture, "semantic": texture[..., :0]}
        features = self.visual.tile_features(params["visual"], pixels)
        tiles = self.visual.tiling.tiles_a_side(pixels.shape[1])
        if self.semantic is None:
            centred = features - params["pca"]["mean"][None, None]
            components = params["pca"]["components"]
            mean = jnp.einsum("bnf,fc->bnc", centred, components, precision="highest")
            logvar = None
        else:
            mean, logvar = self.semantic.apply(params["semantic_vae"], features, method="encode")
            logvar = None if logvar is None else join_tokens(logvar, tiles)
        mean = join_tokens(mean, tiles)
        semantic = self._posterior(self.semantic_posterior, mean, logvar, index, 2 * flipped + 1)
        if semantic.shape[:3] != texture.shape[:3]:
            raise SfdError(
                f"texture latents have a grid of {texture.shape[1]} x {texture.shape[2]} and semantic ones "
                f"of {semantic.shape[1]} x {semantic.shape[2]}: choose the visual encoder's tiling so "
                "that both are equal"
            )
        result = {"texture": texture, "semantic": semantic}
        if self.repa:
            grid = join_tokens(features, tiles)
            flat = grid.reshape(grid.shape[0], -1, grid.shape[-1])
            result["repa_features"] = flat.astype(jnp.float16)  # as released
        return result

    def _posterior(self, kind: str, mean, logvar, index, stream: int) -> jax.Array:
        if kind == "mean" or logvar is None:
            return mean

        draw = lambda row_key: jax.random.normal(jax.random.fold_in(row_key, stream), mean.shape[1:])
        return sample_posterior(mean, logvar, jax.vmap(draw)(keys_by_row(jax.random.key(self.seed), index)))


# The texture VAE's widest layers hold a hundred times the image: a device encodes this many images at once.
ENCODE_AT_ONCE = 8


def jit_encoder(encoder: LatentEncoder, mesh: Mesh) -> jax.stages.Wrapped:
    """Return the jitted `encoder` for batches that are split over a mesh; each device encodes its own images.

    Args:
      encoder: what to run.
      mesh: `pixels` and `index` are split over its devices, and the parameters are replicated.

    Returns:
      A function of (params, pixels, index), as in `LatentEncoder.__call__`.
    """

    def on_device(params, pixels, index):
        parts = math.gcd(len(index), ENCODE_AT_ONCE)
        cut = lambda x: x.reshape(len(index) // parts, parts, *x.shape[1:])
        latents = jax.lax.map(lambda part: encoder(params, *part), (cut(pixels), cut(index)))
        return jax.tree.map(lambda x: x.reshape(len(index), *x.shape[2:]), latents)

    rows = PartitionSpec(mesh.axis_names)
    in_specs = (PartitionSpec(), rows, rows)
    return jax.jit(jax.shard_map(on_device, mesh=mesh, in_specs=in_specs, out_specs=rows, check_vma=False))


def decode_features(network: Network, params: Params, semantic_latents: jax.Array, tile_grid: int) -> jax.Array:
    """Decode raw semantic latents to visual features.

    Args:
      network: a "semantic_vae".
      params: its parameters.
      semantic_latents: (B,h,w,C) raw, h = w.
      tile_grid: latent pixels a side of the tiles that were compressed one by one; smaller grids are one tile.

    Returns:
      (B,h*w,F) float32, row by row, in the order of `VisualEncoder.features`.

    Raises:
      SfdError: the grid is not a whole number of tiles.
    """
    b, h, _, channels = semantic_latents.shape
    tiles = tiles_of_grid(h, tile_grid)
    tokens = split_tiles(semantic_latents, tiles).reshape(b * tiles**2, -1, channels)
    features = network.apply(params, tokens, method="decode")
    return join_tokens(features, tiles).reshape(b, -1, features.shape[-1])
