"""Features of images: an extractor is a named network with a hash, run over all devices of a mesh.

Images come as uint8 (n, H, W, 3) in pieces of any size. They are regrouped into batches of one size; the padding of the
last batch is removed from the result. So the network is compiled once, and the result does not depend on the pieces.
"""

import dataclasses
import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, cached_property, lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sfd_jax.distributed import batch_sharding, make_mesh, put_same, replicated
from sfd_jax.errors import SfdError
from sfd_jax.models import ENCODERS, Network, network_of
from sfd_jax.models.fingerprint import params_hash
from sfd_jax.models.layers import check_divides
from sfd_jax.models.network import checkpoint_name

# YNNPACK for products alone: with its convolutions Inception took an eighth longer (Zen 3, jax 0.12).
CPU_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}

Checkpoint = tuple[dict, dict]  # (params, metadata), as `training.checkpoint.load_params` returns


@dataclasses.dataclass(frozen=True)
class Extractor:
    """A network from images to features.

    Attributes:
      name: "inception", "dinov2" (ViT-L/14 only) or another name.
      params: its parameters.
      apply: pure function of (params, images (B,H,W,3) float32, 0..255) to a dict of (B, ...) float32:
        "features" (B,D) for the Frechet and kernel distances, precision and recall; optionally "spatial"
        (B,E) for sFID and "probabilities" (B,K) for the inception score.
      settings: what changes the features besides the parameters, for the hash.
    """

    name: str
    params: dict
    apply: Callable[[dict, jax.Array], dict[str, jax.Array]]
    settings: str = ""

    @cached_property
    def hash(self) -> str:
        """Return the hex digest that identifies this extractor in statistics."""
        text = f"{self.name} {self.settings} {params_hash(self.params)}"
        return hashlib.sha256(text.encode()).hexdigest()


def inception_extractor(checkpoint: Checkpoint) -> Extractor:
    """Make the ADM suite's extractor: pool_3 for FID, precision and recall; mixed_6's first seven channels
    for sFID; softmax of the unbiased logits for the inception score.

    Args:
      checkpoint: (params, metadata) of a converted `pt_inception-2015-12-05`.

    Raises:
      SfdError: the checkpoint is of another network.
    """
    params, metadata = checkpoint
    return Extractor("inception", params, _inception_features(network_of(metadata, "inception")))


@cache  # one function per network, so that it is compiled once
def _inception_features(network: Network):
    def apply(params, images):
        answers = network.apply(params, images)
        return {
            "features": answers["pool"],
            "spatial": answers["spatial"],
            "probabilities": jax.nn.softmax(answers["logits_unbiased"], axis=-1),
        }

    return apply


def encoder_extractor(checkpoint: Checkpoint, image_size: int | None = None) -> Extractor:
    """Make the extractor of a visual encoder's class token; with DINOv2 it is that of FD-DINOv2.

    Args:
      checkpoint: (params, metadata) of a visual encoder; released distances use DINOv2 ViT-L/14 without registers, the
        only encoder whose extractor is named "dinov2".
      image_size: side of the network's input, in pixels; by default that of its released metric, or of its training
        for an encoder trained with this package.

    Raises:
      SfdError: the checkpoint is of another network or one without class token, or its patches do not divide the
        images; sizes that fit are named.
    """
    params, metadata = checkpoint
    network, trained_here = network_of(metadata, ENCODERS), "task" in metadata
    config = network.config
    if not hasattr(ENCODERS[network.name], "class_token"):
        raise SfdError(f"{checkpoint_name(metadata)} holds '{network.name}', which has no class token for metrics")
    image_size = image_size or (config.image_size if trained_here else config.metric_size)
    check_divides(image_size, config.patch_size, "the encoder's patches")
    name = config.metric_name(trained_here)
    return Extractor(name, params, class_token(network, image_size), settings=f"size {image_size}")


@cache
def class_token(network: Network, image_size: int) -> Callable[[dict, jax.Array], dict[str, jax.Array]]:
    """Return an extractor's `apply` that returns the class token of a visual encoder."""
    return lambda params, images: {"features": network.apply(params, images, image_size, method="class_token")}


def extract_features(
    extractors: Sequence[Extractor],
    pieces: Iterable[np.ndarray],
    *,
    batch_size: int = 64,
    mesh: Mesh | None = None,
) -> Iterator[tuple[dict[str, np.ndarray], ...]]:
    """Run each image through the extractors once, in order.

    Args:
      extractors: the extractors.
      pieces: uint8 arrays (n, H, W, 3), any n, with the same H and W. Every host passes all images; each
        device computes only its share.
      batch_size: images per batch over all devices; rounded up to a multiple of their number.
      mesh: the devices; all of them by default.

    Yields:
      For each batch a dict of float32 arrays (n, ...) for each extractor, n <= batch_size, on every host.

    Raises:
      SfdError: images have another dtype or shape, or features are not finite.
    """
    mesh = make_mesh() if mesh is None else mesh
    batch_size = -(-batch_size // mesh.size) * mesh.size
    run, params = _prepare(extractors, mesh)
    done = 0
    pending = deque()  # one batch is computed while the next is read and sent
    for images in regroup(pieces, batch_size):
        padded = np.pad(images, [(0, batch_size - len(images)), (0, 0), (0, 0), (0, 0)], mode="edge")
        pending.append((len(images), run(params, put_same(padded, batch_sharding(mesh)))))
        if len(pending) > 1:
            count, answers = pending.popleft()
            yield _to_host(extractors, answers, count, done)
            done += count
    for count, answers in pending:
        yield _to_host(extractors, answers, count, done)


def images_at_once(mesh: Mesh) -> int:
    """Return the fastest number of images per device and batch; results do not depend on it.

    Inception's widest layers take 5 MB per image: more than 8 images exceed a CPU's caches, which costs a third of
    its speed.
    """
    return 8 if mesh.devices.flat[0].platform == "cpu" else 32


def trace_features(
    extractors: Sequence[Extractor], image_size: int, *, batch_size: int, mesh: Mesh
) -> jax.stages.Traced:
    """Trace the program of `extract_features` from shapes alone (see `trace_train_step`).

    Args:
      extractors: their `params` may hold shapes instead of arrays.
      image_size: height and width in pixels.
      batch_size: images over all devices, a multiple of their number.
      mesh: devices, which this machine need not have.
    """
    run, params = _prepare(extractors, mesh)
    shape = (batch_size, image_size, image_size, 3)
    return run.trace(params, jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=batch_sharding(mesh)))


def _prepare(extractors: Sequence[Extractor], mesh: Mesh):
    """Return the jitted function of (params, images) and the params on the mesh."""
    params = put_same(tuple(extractor.params for extractor in extractors), replicated(mesh))
    return _compiled(tuple(extractor.apply for extractor in extractors), mesh), params


@lru_cache(maxsize=8)  # samples use the program compiled for the reference
def _compiled(applies, mesh: Mesh):
    def run(params, images):
        images = images.astype(jnp.float32)
        return tuple(apply(p, images) for apply, p in zip(applies, params, strict=True))

    options = _cpu_options() if mesh.devices.flat[0].platform == "cpu" else None
    return jax.jit(run, out_shardings=replicated(mesh), compiler_options=options)


def _cpu_options() -> dict | None:
    """Return CPU_OPTIONS; None where XLA does not know them, since such options come and go."""
    try:
        jax.jit(lambda: 0, compiler_options=CPU_OPTIONS).lower().compile()
    except jax.errors.JaxRuntimeError:
        return None
    return CPU_OPTIONS


def _to_host(extractors, answers, count: int, first: int) -> tuple[dict[str, np.ndarray], ...]:
    """Remove the padding and check that the features are finite."""
    host = tuple({name: np.asarray(rows)[:count] for name, rows in answer.items()} for answer in answers)
    for extractor, answer in zip(extractors, host, strict=True):
        for name, rows in answer.items():
            finite = np.isfinite(rows.reshape(count, -1)).all(axis=1)
            if not finite.all():
                raise SfdError(
                    f"extractor '{extractor.name}': '{name}' of image {first + int(np.argmin(finite))} is not "
                    "finite; check its weights"
                )
    return host


def regroup(pieces: Iterable[np.ndarray], batch_size: int) -> Iterator[np.ndarray]:
    """Cut a stream of uint8 (n, H, W, 3) into pieces of `batch_size`; the last one may be shorter.

    Raises:
      SfdError: a piece is not uint8 (n, H, W, 3) with the H and W of the first piece.
    """
    held, count, shape = [], 0, None
    for piece in pieces:
        shape = shape or piece.shape[1:]
        if piece.dtype != np.uint8 or piece.ndim != 4 or piece.shape[1:] != shape or shape[-1] != 3:
            raise SfdError(
                f"images of dtype {piece.dtype} and shape {piece.shape}: expected uint8 (n, "
                f"{', '.join(map(str, shape[:2])) if len(shape) == 3 else 'H, W'}, 3)"
            )
        held.append(piece)
        count += len(piece)
        while count >= batch_size:
            joined = np.concatenate(held) if len(held) > 1 else held[0]
            yield joined[:batch_size]
            held, count = [joined[batch_size:]], count - batch_size
    if count:
        yield np.concatenate(held)
