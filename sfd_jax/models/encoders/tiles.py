"""Tiles: the part of an image that a visual encoder sees at once, and its number of tokens.

An encoder is made for one image size. A larger image is cut into square tiles that it sees one by one, and their
grids of tokens are put back side by side: 512 px are four tiles of 256 px. A tile has as many tokens a side as latent
pixels (256 px: 16 x 16), which decides the size at which the encoder sees it (DINOv2 of patch size 14: 224 px). With a
tile of 512 px it sees a larger image in one view (DINOv2: 448 px).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from sfd_jax.errors import SfdError
from sfd_jax.models.layers import check_divides
from sfd_jax.models.network import Network, Params

RELEASED_GRID = 16  # latent pixels a side of a tile of the released latents


def to_float(pixels: jax.Array) -> jax.Array:
    """Map bytes 0..255 to float32 in [-1, 1]; floats are in that range already."""
    return pixels.astype(jnp.float32) / 127.5 - 1.0 if pixels.dtype == jnp.uint8 else pixels


@dataclasses.dataclass(frozen=True)
class Tiling:
    """A tile of an image and its grid of tokens.

    Attributes:
      tile_size: pixels a side of a tile; smaller images are one tile.
      grid: tokens a side that an encoder makes of a tile.
    """

    tile_size: int = 256
    grid: int = RELEASED_GRID

    @classmethod
    def of_pixels(cls, image_size: int, tile_size: int, downsampling: int) -> "Tiling":
        """Return the tiling that gives images as many tokens as a texture VAE gives them latent pixels.

        Args:
          image_size: pixels a side.
          tile_size: pixels a side that the encoder sees at once.
          downsampling: pixels a side of a latent pixel.

        Raises:
          SfdError: one does not divide by another; sizes that would do are named.
        """
        tile = min(image_size, tile_size)
        check_divides(tile, downsampling, "the texture VAE's downsampling (tile_size)")
        tiling = cls(tile, tile // downsampling)
        tiling.tiles_a_side(image_size)
        return tiling

    @classmethod
    def of_latents(cls, image_size: int, latent_grid: int, tile_grid: int) -> "Tiling":
        """Return the tiling that belongs to latents.

        Args:
          image_size: pixels a side of the images they are of.
          latent_grid, tile_grid: latent pixels a side of an image, and of the tiles that were encoded one by one.

        Raises:
          SfdError: the images or the tiles do not divide over the latents; what would do is named.
        """
        grid = latent_grid // tiles_of_grid(latent_grid, tile_grid)
        check_divides(image_size, latent_grid, "the latents a side (model.input_size)")
        return cls(image_size * grid // latent_grid, grid)

    @classmethod
    def whole(cls, image_size: int, view_size: int, encoder: Network) -> "Tiling":
        """Return the tiling of an encoder that sees images whole, at a size in pixels that its patches divide."""
        check_divides(view_size, encoder.config.patch_size, "the visual encoder's patch_size")
        return cls(image_size, view_size // encoder.config.patch_size)

    def tiles_a_side(self, image_size: int) -> int:
        """Return the tiles a side of an image; raises SfdError if that is not a whole number."""
        if image_size <= self.tile_size:
            return 1
        check_divides(image_size, self.tile_size, "the tile_size that the visual encoder sees at once")
        return image_size // self.tile_size


@dataclasses.dataclass(frozen=True)
class VisualEncoder:
    """The patch features of a visual encoder, tile by tile.

    Attributes:
      network: one of `ENCODERS`.
      tiling: the tiles and their grids of tokens.
    """

    network: Network
    tiling: Tiling = Tiling()

    def tile_features(self, params: Params, pixels: jax.Array) -> jax.Array:
        """Return the features of each tile.

        Args:
          params: of the network.
          pixels: (B,H,W,3), square, uint8 or float32 in [-1,1].

        Returns:
          (B*T, N, F) float32; the T tiles of an image row by row, the N patches of a tile too.

        Raises:
          SfdError: the image is not a whole number of tiles, or the encoder returns another grid.
        """
        grid, tiles = self.tiling.grid, split_tiles(to_float(pixels), self.tiling.tiles_a_side(pixels.shape[1]))
        features = self.network.apply(params, tiles, grid, method="patch_features")
        if features.shape != (wanted := (len(tiles), grid * grid, self.network.config.feature_width)):
            raise SfdError(f"'{self.network.name}' gives patch features {features.shape}, expected {wanted}")
        return features

    def features(self, params: Params, pixels: jax.Array) -> jax.Array:
        """Return the features of the whole image (B,N,F), row by row: the targets of REPA."""
        grid = join_tokens(self.tile_features(params, pixels), self.tiling.tiles_a_side(pixels.shape[1]))
        return grid.reshape(grid.shape[0], -1, grid.shape[-1])


def tiles_of_grid(grid: int, tile_grid: int) -> int:
    """Return the tiles a side of a grid of latents; raises SfdError if that is not a whole number."""
    if grid > tile_grid and grid % tile_grid:
        raise SfdError(f"tile_grid={tile_grid} does not divide a grid of {grid} latents: {grid} or a divisor would do")
    return max(1, grid // tile_grid)


def split_tiles(images: jax.Array, tiles: int) -> jax.Array:
    """Cut (B,H,W,C) into tiles x tiles parts: (B*T, H/tiles, W/tiles, C), row by row."""
    b, h, w, c = images.shape
    cut = images.reshape(b, tiles, h // tiles, tiles, w // tiles, c)
    return cut.transpose(0, 1, 3, 2, 4, 5).reshape(b * tiles * tiles, h // tiles, w // tiles, c)


def join_tiles(images: jax.Array, tiles: int) -> jax.Array:
    """Put the parts of `split_tiles` back: (B*T,h,w,C) to (B, tiles*h, tiles*w, C)."""
    n, h, w, c = images.shape
    grid = images.reshape(n // tiles**2, tiles, tiles, h, w, c)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(n // tiles**2, tiles * h, tiles * w, c)


def join_tokens(tokens: jax.Array, tiles: int) -> jax.Array:
    """Lay the tokens (B*T,N,F) of square tiles out as the grid of their image, (B,h,w,F)."""
    side = math.isqrt(tokens.shape[1])
    return join_tiles(tokens.reshape(tokens.shape[0], side, side, tokens.shape[-1]), tiles)
