"""Features of images: an extractor is a named network with a hash, run over all devices of a mesh.

Images come in as uint8 (n, H, W, 3) in pieces of any size and are counted exactly once: pieces are
regrouped into batches of one size, the last one padded and its padding cut off again, so the network
is compiled once and the result does not depend on the pieces.
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

Checkpoint = tuple[dict, dict]  # (params, metadata), as `training.checkpoint.load_params` returns


@dataclasses.dataclass(frozen=True)
class Extractor:
    """A network from images to features.

    Attributes:
      name: "inception", "dinov2" (ViT-L/14 alone) or a name of one's own.
      params: its parameters.
      apply: pure function of (params, images (B,H,W,3) float32, 0..255) to a dict of (B, ...) float32:
        "features" (B,D), which the Frechet and kernel distances, precision and recall are taken of; and
        where there are any "spatial" (B,E) for sFID and "probabilities" (B,K) for the inception score.
      settings: whatever beside the parameters changes the features, for the hash.
    """

    name: str
    params: dict
    apply: Callable[[dict, jax.Array], dict[str, jax.Array]]
    settings: str = ""

    @cached_property
    def hash(self) -> str:
        """Return the hex digest that statistics remember this extractor by."""
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


@cache  # one function for one network, so that what was compiled for it is found again
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
    """Make the extractor of a visual encoder's class token: FD-DINOv2, where it is DINOv2's.

    Args:
      checkpoint: (params, metadata) of a visual encoder; released distances use DINOv2 ViT-L/14 without registers, and
        only that one's extractor is called "dinov2".
      image_size: side of the network's input, in pixels; by default that of its released metric, and for an encoder
        trained here its own.

    Raises:
      SfdError: the checkpoint is of another network or of one without class token, or its patches do not divide the
        images; sizes that would do are named.
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
    """Return an extractor's `apply` that takes the class token of a visual encoder."""
    return lambda params, images: {"features": network.apply(params, images, image_size, method="class_token")}


def extract_features(
    extractors: Sequence[Extractor],
    pieces: Iterable[np.ndarray],
    *,
    batch_size: int = 64,
    mesh: Mesh | None = None,
) -> Iterator[tuple[dict[str, np.ndarray], ...]]:
    """Run images through extractors in one pass, each image exactly once and in order.

    Args:
      extractors: what to run.
      pieces: uint8 arrays (n, H, W, 3), n of any size, H and W the same throughout. With several hosts
        each passes all images; each device still computes its share alone.
      batch_size: images in a batch over all devices; rounded up to a multiple of their number.
      mesh: the devices; all of them by default.

    Yields:
      For each batch a dict of float32 arrays (n, ...) for each extractor, n <= batch_size, on every host.

    Raises:
      SfdError: images of another dtype or shape, or features that are not finite.
    """
    mesh = make_mesh() if mesh is None else mesh
    batch_size = -(-batch_size // mesh.size) * mesh.size
    run, params = _prepare(extractors, mesh)
    done = 0
    under_way = deque()  # one batch computes while the next one is read and sent
    for images in regroup(pieces, batch_size):
        padded = np.pad(images, [(0, batch_size - len(images)), (0, 0), (0, 0), (0, 0)], mode="edge")
        under_way.append((len(images), run(params, put_same(padded, batch_sharding(mesh)))))
        if len(under_way) > 1:
            count, answers = under_way.popleft()
            yield _to_host(extractors, answers, count, done)
            done += count
    for count, answers in under_way:
        yield _to_host(extractors, answers, count, done)


def images_at_once(mesh: Mesh) -> int:
    """Return how many images a device of the mesh takes at once at the best speed; the answers do not depend on it.

    Inception's widest layers hold 5 MB an image: more than 8 leave a processor's caches, and a third of its speed.
    """
    return 8 if mesh.devices.flat[0].platform == "cpu" else 32


def trace_features(
    extractors: Sequence[Extractor], image_size: int, *, batch_size: int, mesh: Mesh
) -> jax.stages.Traced:
    """Trace what `extract_features` runs on a batch, from shapes alone (see `trace_train_step`).

    Args:
      extractors: their `params` may hold shapes instead of arrays.
      image_size: height and width in pixels.
      batch_size: images over all devices, a multiple of their number.
      mesh: devices that need not be there.
    """
    run, params = _prepare(extractors, mesh)
    shape = (batch_size, image_size, image_size, 3)
    return run.trace(params, jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=batch_sharding(mesh)))


def _prepare(extractors: Sequence[Extractor], mesh: Mesh):
    """Return the jitted function of (params, images) and the params on the mesh."""
    params = put_same(tuple(extractor.params for extractor in extractors), replicated(mesh))
    return _compiled(tuple(extractor.apply for extractor in extractors), mesh), params


@lru_cache(maxsize=8)  # samples go through what was compiled for the reference
def _compiled(applies, mesh: Mesh):
    def run(params, images):
        images = images.astype(jnp.float32)
        return tuple(apply(p, images) for apply, p in zip(applies, params, strict=True))

    return jax.jit(run, out_shardings=replicated(mesh))


def _to_host(extractors, answers, count: int, first: int) -> tuple[dict[str, np.ndarray], ...]:
    """Cut off the padding and check that what is left is finite."""
    host = tuple({name: np.asarray(rows)[:count] for name, rows in answer.items()} for answer in answers)
    for extractor, answer in zip(extractors, host, strict=True):
        for name, rows in answer.items():
            finite = np.isfinite(rows.reshape(count, -1)).all(axis=1)
            if not finite.all():
                raise SfdError(
                    f"extractor '{extractor.name}': '{name}' of image {first + int(np.argmin(finite))} is not "
                    "finite; its weights are damaged, or not of this network"
                )
    return host


def regroup(pieces: Iterable[np.ndarray], batch_size: int) -> Iterator[np.ndarray]:
    """Cut a stream of uint8 (n, H, W, 3) into pieces of `batch_size`, the last one as long as it is.

    Raises:
      SfdError: another dtype, rank or size than uint8 (n, H, W, 3) with the first piece's H and W.
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
