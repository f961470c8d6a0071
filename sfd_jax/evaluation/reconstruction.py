"""Metrics of texture VAE reconstructions: rFID, PSNR, SSIM and LPIPS.

Definitions are those used for the released texture VAE (VA-VAE's `evaluate_tokenizer.py`): PSNR of bytes,
SSIM with an 11 x 11 Gaussian window of sigma 1.5 on pixels in [-1, 1], LPIPS on VGG16, each averaged over
images; rFID is the Frechet distance between the images and their reconstructions. The latent is a posterior
sample, as there; the noise of image i depends on (seed, i) alone.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sfd_jax.distributed import batch_sharding, make_mesh, put_same, replicated
from sfd_jax.errors import SfdError
from sfd_jax.evaluation.evaluate import gather
from sfd_jax.evaluation.features import Checkpoint, Extractor, regroup
from sfd_jax.evaluation.image_sets import ImageSet
from sfd_jax.evaluation.metrics import frechet_distance
from sfd_jax.models import network_of, to_bytes
from sfd_jax.models.layers import check_divides
from sfd_jax.randomness import normal_by_row
from sfd_jax.ranges import check


def evaluate_reconstruction(
    images: ImageSet,
    texture_vae: Checkpoint,
    extractor: Extractor,
    lpips: Checkpoint | None = None,
    *,
    seed: int = 0,
    batch_size: int = 64,
    mesh: Mesh | None = None,
    progress: bool = False,
) -> dict[str, float]:
    """Reconstruct every image and compare it with the original.

    Args:
      images: the images; their sides must be multiples of the VAE's downsampling.
      texture_vae: (params, metadata).
      extractor: of rFID's features.
      lpips: (params, metadata) of LPIPS; None leaves "lpips" out.
      seed: of the posterior samples.
      batch_size: images per batch over all devices.
      mesh: the devices; all of them by default.
      progress: show bars on stderr.

    Returns:
      "rfid", "psnr" (dB), "ssim", and "lpips" if `lpips` is given.

    Raises:
      SfdError: checkpoints are of other networks, or images are damaged.
    """
    check(seed=seed, batch_size=batch_size)
    mesh = make_mesh() if mesh is None else mesh
    batch_size = -(-batch_size // mesh.size) * mesh.size
    factor = network_of(texture_vae[1], "texture_vae").config.downsampling
    for side in images.size or ():
        check_divides(side, factor, "the texture VAE's downsampling")
    compare = _comparison(texture_vae, lpips, seed, mesh)
    sums: dict[str, float] = {}
    count = 0

    def reconstructed(_: int) -> Iterator[np.ndarray]:
        nonlocal count
        for batch in regroup(images.pieces(batch_size), batch_size):
            size = len(batch)
            padded = np.pad(batch, [(0, batch_size - size), (0, 0), (0, 0), (0, 0)], mode="edge")
            indices = (count + np.arange(batch_size)).astype(np.uint32)
            made, values = compare(*put_same((padded, indices), batch_sharding(mesh)))
            for name, rows in values.items():
                rows = np.asarray(rows, np.float64)[:size]
                if not np.isfinite(rows).all():
                    raise SfdError(
                        f"{images.name}: {name} of image {count + int(np.argmin(np.isfinite(rows)))} is not finite"
                    )
                sums[name] = sums.get(name, 0.0) + float(rows.sum())
            count += size
            yield np.asarray(made)[:size]

    options = dict(keep_features=[False], batch_size=batch_size, mesh=mesh, progress=progress)
    [(real, _)] = gather(images, [extractor], label="images", **options)
    copies = ImageSet(f"reconstructions of {images.name}", images.count, reconstructed, size=images.size)
    [(made, _)] = gather(copies, [extractor], label="reconstructions", **options)
    rfid = frechet_distance(*made.gaussians["features"], *real.gaussians["features"])
    return {"rfid": rfid} | {name: total / count for name, total in sums.items()}


def _comparison(texture_vae: Checkpoint, lpips: Checkpoint | None, seed: int, mesh: Mesh):
    """Return a jitted function of (bytes, indices) to (reconstructed bytes, {metric: (B,)})."""
    networks, params = {}, {}
    for name, checkpoint in (("texture_vae", texture_vae), ("lpips", lpips)):
        if checkpoint is not None:
            networks[name] = network_of(checkpoint[1], name)
            params[name] = put_same(checkpoint[0], replicated(mesh))

    def compare(params, images, indices):
        pixels = images.astype(jnp.float32) / 127.5 - 1.0
        vae = networks["texture_vae"]
        mean, logvar = vae.apply(params["texture_vae"], pixels, method="encode")
        noise = normal_by_row(jax.random.key(seed), indices, mean.shape[1:])
        decoded = vae.apply(params["texture_vae"], mean + jnp.exp(0.5 * logvar) * noise, method="decode")
        made = to_bytes(decoded)
        values = {"psnr": psnr(images, made), "ssim": ssim(pixels, jnp.clip(decoded, -1.0, 1.0))}
        if "lpips" in networks:
            values["lpips"] = networks["lpips"].apply(params["lpips"], decoded, pixels)
        return made, values

    jitted = jax.jit(compare, out_shardings=replicated(mesh))
    return lambda images, indices: jitted(params, images, indices)


def psnr(images: jax.Array, others: jax.Array) -> jax.Array:
    """Return the peak signal-to-noise ratio of each pair in dB, (B,), of bytes (B, H, W, 3).

    Equal images have no noise; they get the ratio of an error of 1 in a single value.
    """
    squares = (images.astype(jnp.float32) - others.astype(jnp.float32)) ** 2
    least = 1.0 / squares[0].size
    return 10.0 * jnp.log10(255.0**2 / jnp.maximum(squares.mean(axis=(1, 2, 3)), least))


def ssim(images: jax.Array, others: jax.Array) -> jax.Array:
    """Return the structural similarity of each pair, (B,), of pixels (B, H, W, 3) in [-1, 1].

    Means and covariances are over windows inside the image.

    Source: Wang et al. 2004, with K1 = 0.01, K2 = 0.03 and range 2; as `torchmetrics` up to 1.4; later
      versions average over reflected borders too.
    """
    window = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    window = jnp.asarray(window / window.sum(), jnp.float32)

    def local_mean(x):
        # Rows, then columns; each channel separately.
        for axis in (1, 2):
            shifted = [jax.lax.slice_in_dim(x, i, x.shape[axis] - 10 + i, axis=axis) for i in range(11)]
            x = sum(weight * part for weight, part in zip(window, shifted, strict=True))
        return x

    if min(images.shape[1:3]) < 11:
        raise SfdError(f"SSIM needs images of at least 11 x 11 pixels, these are {images.shape[1:3]}")
    mean_a, mean_b = local_mean(images), local_mean(others)
    variance_a = jnp.maximum(local_mean(images**2) - mean_a**2, 0.0)
    variance_b = jnp.maximum(local_mean(others**2) - mean_b**2, 0.0)
    covariance = local_mean(images * others) - mean_a * mean_b
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    similarity = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    similarity /= (mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2)
    return similarity.mean(axis=(1, 2, 3))
