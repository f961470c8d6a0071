"""Metrics: Frechet distance, inception score, precision and recall, kernel distance.

Pure functions of features (N, D) and probabilities (N, K); rows are images. The Frechet distance is FID
on Inception's pool, sFID on its spatial features, and FD-DINOv2 on DINOv2's class token.

Definitions are those of the ADM suite (guided-diffusion, `evaluations/evaluator.py`), including the
float16 of its distances. One difference: the trace of the matrix root comes from symmetric
eigenvalues instead of `sqrtm`, so it is exact for singular covariances too (fewer images than
features), where `sqrtm` needs an offset on the diagonal.
"""

import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from sfd_jax.errors import SfdError

# --- Frechet distance -------------------------------------------------------------------------------

# Largest deviation of a covariance from symmetric and positive semidefinite, relative to its Frobenius norm: storing it
# in float32 changes it by 6e-8, computing it in float32 by about 1e-6.
COVARIANCE_TOLERANCE = 1e-5


def check_gaussian(mean: np.ndarray, covariance: np.ndarray, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Check that a mean and a covariance can be those of features, and return them in float64.

    Args:
      mean: (D,) int or float.
      covariance: (D, D) int or float.
      where: their name in messages.

    Raises:
      SfdError: they are not real numbers, have other shapes or values that are not finite, or the covariance is not
        symmetric or has negative eigenvalues, beyond COVARIANCE_TOLERANCE.
    """
    mean, covariance = np.asarray(mean), np.asarray(covariance)
    if mean.dtype.kind not in "fiu" or covariance.dtype.kind not in "fiu":
        raise SfdError(f"{where}: expected real numbers, found {mean.dtype} and {covariance.dtype}")
    if mean.ndim != 1 or not mean.size or covariance.shape != mean.shape * 2:
        raise SfdError(f"{where}: expected (D,) and (D, D), found {mean.shape} and {covariance.shape}")
    mean, covariance = mean.astype(np.float64), covariance.astype(np.float64)
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise SfdError(f"{where}: a value is not finite")
    rounding = COVARIANCE_TOLERANCE * np.linalg.norm(covariance)
    if np.abs(covariance - covariance.T).max() > rounding:
        raise SfdError(f"{where}: the covariance matrix is not symmetric; make the statistics again")
    try:  # succeeds if no eigenvalue is below -rounding; much faster than computing eigenvalues
        np.linalg.cholesky((covariance + covariance.T) / 2 + max(rounding, 1e-300) * np.eye(len(mean)))
    except np.linalg.LinAlgError:
        raise SfdError(f"{where}: the covariance matrix has negative eigenvalues; make the statistics again") from None
    return mean, covariance


def frechet_distance(
    mean_a: np.ndarray, covariance_a: np.ndarray, mean_b: np.ndarray, covariance_b: np.ndarray
) -> float:
    """Compute the squared Frechet distance between two Gaussians.

    Args:
      mean_a, mean_b: (D,) float.
      covariance_a, covariance_b: (D, D) float, symmetric, positive semi-definite up to rounding.

    Returns:
      |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)), in float64.

    Raises:
      SfdError: shapes that do not fit, or no mean and covariance by `check_gaussian`.

    Source: Heusel et al. 2017 (arXiv 1706.08500), equation 6.
    """
    mean_a, covariance_a = check_gaussian(mean_a, covariance_a, "Frechet distance")
    mean_b, covariance_b = check_gaussian(mean_b, covariance_b, "Frechet distance")
    if mean_a.shape != mean_b.shape:
        raise SfdError(
            f"Frechet distance between Gaussians of {mean_a.shape} and {mean_b.shape} dimensions: "
            "use the same extractor for both"
        )
    # With A = R R' and B = S S', A B has the eigenvalues of (R' S)(R' S)', whose roots are the
    # singular values of R' S. Computed directly, these are accurate to the rounding of the largest
    # one; roots of eigenvalues near zero would turn a rounding error of 1e-16 into 1e-8.
    cross = np.linalg.svd(_root(covariance_a).T @ _root(covariance_b), compute_uv=False).sum()
    difference = mean_a - mean_b
    traces = np.trace(covariance_a) + np.trace(covariance_b)
    distance = float(difference @ difference + traces - 2.0 * cross)
    if distance < -COVARIANCE_TOLERANCE * traces:
        raise SfdError(f"Frechet distance: {distance:.3g} is negative beyond rounding; make the statistics again")
    return max(distance, 0.0)


def _root(covariance: np.ndarray) -> np.ndarray:
    """Return R (D, rank) with R R' = covariance.

    Eigenvalues within the rounding error of the largest one count as zeros of a singular covariance.
    """
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    kept = values > values[-1] * len(values) * np.finfo(np.float64).eps
    return vectors[:, kept] * np.sqrt(values[kept])


# --- Inception score --------------------------------------------------------------------------------


def inception_score(probabilities: np.ndarray, split_size: int = 5000) -> float:
    """Compute the inception score: the mean over consecutive splits of exp(mean KL to the marginal).

    Args:
      probabilities: (N, K) float, rows sum to 1.
      split_size: images per split, 5,000 in ADM.

    Returns:
      The score, between 1 and K. Warns if it depends on the order of the rows or on a short last split.

    Source: Salimans et al. 2016 (arXiv 1606.03498).
    """
    running = RunningInceptionScore(split_size)
    running.add(probabilities)
    for note in running.notes():
        warnings.warn(note, stacklevel=2)
    return running.value


class RunningInceptionScore:
    """Inception score of probabilities given in pieces; keeps sums, and the likeliest class of each row.

    The splits are consecutive, so the images must be shuffled; a last, shorter split has the same weight
    as the others, as in the ADM suite.
    """

    def __init__(self, split_size: int = 5000):
        self.split_size = split_size
        self._scores = []
        self._classes = []
        self._start()

    def _start(self):
        self._count, self._negative_entropy, self._sum = 0, 0.0, 0.0

    def add(self, probabilities: np.ndarray) -> None:
        """Add rows (n, K)."""
        self._classes.append(np.argmax(probabilities, axis=1).astype(np.int32))
        while len(probabilities):
            part = probabilities[: self.split_size - self._count]
            probabilities = probabilities[len(part) :]
            self._count += len(part)
            self._negative_entropy += _sum_p_log_p(part)
            self._sum = self._sum + np.asarray(part, np.float64).sum(axis=0)
            if self._count == self.split_size:
                self._scores.append(self._score())
                self._start()

    @property
    def count(self) -> int:
        """Rows so far."""
        return len(self._scores) * self.split_size + self._count

    @property
    def value(self) -> float:
        """The score of all rows so far."""
        scores = self._scores + ([self._score()] if self._count else [])
        if not scores:
            raise SfdError("inception score of no images")
        return float(np.mean(scores))

    def notes(self) -> list[str]:
        """Return remarks on the score, if it depends on the order of the rows or on a short last split."""
        notes = []
        if self._is_sorted():
            notes.append(
                f"the images are sorted by class (splits of {self.split_size:,} do not have the classes of shuffled "
                "images): the inception score is defined on shuffled images, and this one is too low; shuffle them and "
                "evaluate again"
            )
        if self._scores and self._count:
            notes.append(
                f"the inception score is the mean of {len(self._scores) + 1} splits, of which the last has "
                f"{self._count:,} images and the others {self.split_size:,}, all weighted equally as in the ADM suite; "
                f"use a multiple of {self.split_size:,} images to avoid this"
            )
        return notes

    def _is_sorted(self) -> bool:
        """Return whether the splits do not have the classes of splits of shuffled images.

        Compares how unevenly the likeliest classes are distributed over the splits with 20 shuffles of the same rows;
        shuffled images are reported with a probability of about one in a million.
        """
        classes = np.concatenate(self._classes)
        splits = np.arange(len(classes)) // self.split_size
        sizes, width = np.bincount(splits), int(classes.max()) + 1

        def unevenness(classes):
            counts = np.bincount(splits * width + classes, minlength=len(sizes) * width).reshape(-1, width)
            return float((counts**2 / sizes[:, None]).sum())

        generator = np.random.default_rng(0)
        shuffled = [unevenness(generator.permutation(classes)) for _ in range(20)]
        return unevenness(classes) > np.mean(shuffled) + 6 * np.std(shuffled) + 1e-9 * len(classes)

    def _score(self) -> float:
        # mean over rows of sum p log(p / m) = mean of sum p log p, less sum m log m.
        return float(np.exp(self._negative_entropy / self._count - _sum_p_log_p(self._sum / self._count)))


def _sum_p_log_p(probabilities: np.ndarray) -> float:
    p = np.asarray(probabilities, np.float64)
    return float((p * np.log(p, out=np.zeros_like(p), where=p > 0)).sum())  # 0 at p = 0


# --- Precision and recall ---------------------------------------------------------------------------


def precision_recall(
    reference: np.ndarray,
    samples: np.ndarray,
    *,
    k: int = 3,
    block: int = 2560,
    distances: str = "float16",
) -> tuple[float, float]:
    """Compute precision and recall by k-nearest-neighbour manifolds.

    The manifold of a set is the union of balls around its members; the radius of each is the distance to the
    member's k-th neighbour in the set. Precision is the fraction of samples inside the reference's
    manifold, recall the fraction of references inside the samples'.

    Args:
      reference: (N, D) float32 features, N > k.
      samples: (M, D) float32 features, M > k.
      k: neighbours.
      block: most rows and columns of the distance blocks; the result does not depend on it.
      distances: "float16" rounds like the ADM suite and so reproduces its numbers: on 2,048 features,
        rounding moves points into balls that they miss by less than a thousandth, which adds one or two
        points to both scores. "float32" is the definition without rounding. Features too large for
        float16 are always compared in float32, as in ADM.

    Returns:
      (precision, recall), each in [0, 1].

    Raises:
      SfdError: there are too few rows, D differs, or a feature is not finite.

    Source: Kynkaanniemi et al. 2019 (arXiv 1904.06991); k = 3 and float16 as in ADM's
      `ManifoldEstimator` and `DistanceBlock`.
    """
    reference, samples = np.asarray(reference, np.float32), np.asarray(samples, np.float32)
    if reference.shape[1:] != samples.shape[1:]:
        raise SfdError(
            f"precision and recall: reference features are {reference.shape[1:]}, samples "
            f"{samples.shape[1:]}; use the same extractor for both"
        )
    for name, features in (("reference", reference), ("samples", samples)):
        if len(features) <= k:
            raise SfdError(f"precision and recall with k={k} need more than {k} images; {name}: {len(features)}")
        if not np.isfinite(features).all():
            raise SfdError(f"precision and recall: a feature of the {name} is not finite")
    half = distances == "float16" and _fits_float16(reference, samples)
    reference, samples = _prepare(reference, samples, half)
    reference_radii = _squared_radii(*reference, k, block, half)
    sample_radii = _squared_radii(*samples, k, block, half)
    precision, recall = np.zeros(len(sample_radii), bool), np.zeros(len(reference_radii), bool)
    reference_blocks = _blocks(*reference, reference_radii, block)
    for row, *rows in _blocks(*samples, sample_radii, block):
        for column, *columns in reference_blocks:
            in_reference, in_samples = _inside(*rows, *columns, half=half)
            precision[row] |= np.asarray(in_reference)[: row.stop - row.start]
            recall[column] |= np.asarray(in_samples)[: column.stop - column.start]
    return float(precision.mean()), float(recall.mean())


def _fits_float16(reference: np.ndarray, samples: np.ndarray) -> bool:
    """Return whether squared distances and their intermediate values stay in float16's range."""
    longest = [np.sqrt(np.einsum("nd,nd->n", x, x).max()) for x in (reference, samples)]
    return float(2 * max(longest)) ** 2 < 60000


def _prepare(reference: np.ndarray, samples: np.ndarray, half: bool):
    """Return (features (N, D), squared norms (N,)) of each set, float32."""
    if half:
        return tuple((x.astype(np.float16).astype(np.float32), _half_norms(x)) for x in (reference, samples))
    # |u|^2 - 2 u.v + |v|^2 loses precision if the norms are much larger than the distances; a common
    # shift keeps the distances and makes the norms small.
    centre = reference.mean(axis=0, dtype=np.float64).astype(np.float32)
    reference, samples = reference - centre[None], samples - centre[None]
    return tuple((x, np.einsum("nd,nd->n", x, x)) for x in (reference, samples))


def _half_norms(features: np.ndarray) -> np.ndarray:
    """Sum squares in float16, in the order of the suite's TensorFlow on CPU.

    That is 1,024 features at a time, in packets of eight lanes with four running sums. The order changes
    the last bit of a distance, and so whether a point at the edge of a ball is inside.
    """
    norms = np.zeros(len(features), np.float16)
    for start in range(0, features.shape[1], 1024):
        squares = features[:, start : start + 1024].astype(np.float16) ** 2
        packets = squares[:, : squares.shape[1] // 8 * 8].reshape(len(features), -1, 8)
        unrolled = packets.shape[1] // 4 * 4
        sums = np.zeros((4, len(features), 8), np.float16)
        for packet in range(unrolled):
            sums[packet % 4] += packets[:, packet]
        total = sums[0] + sums[1] + sums[2] + sums[3]
        for packet in range(unrolled, packets.shape[1]):
            total += packets[:, packet]
        rest = np.zeros(len(features), np.float16)
        for column in range(packets.shape[1] * 8, squares.shape[1]):
            rest += squares[:, column]
        norms += total.sum(axis=1, dtype=np.float32).astype(np.float16) + rest
    return norms.astype(np.float32)


def _squared_radii(features: np.ndarray, norms: np.ndarray, k: int, block: int, half: bool) -> np.ndarray:
    """Return each row's squared distance to its k-th neighbour, (N,) float32."""
    blocks = _blocks(features, norms, np.zeros(len(features), np.float32), block)
    # k + 1, since the row itself is among its neighbours, at distance 0.
    smallest = [jnp.full((len(norms), k + 1), jnp.inf) for _, _, norms, _ in blocks]
    for i, (_, *rows) in enumerate(blocks):
        # Products of two blocks serve both: half of the products are enough.
        for j, (_, *columns) in enumerate(blocks[i:], i):
            of_rows, of_columns = _merge_smallest(smallest[i], smallest[j], *rows, *columns, half=half)
            smallest[i], smallest[j] = of_rows, of_rows if i == j else of_columns
    return np.concatenate([np.asarray(each[:, k]) for each in smallest])[: len(features)]


def _blocks(features: np.ndarray, norms: np.ndarray, radii: np.ndarray, block: int) -> list[tuple]:
    """Cut a set into (slice, features (b, D), norms (b,), radii (b,)), b <= block; radius -1 marks padding."""
    size = -(-len(features) // -(-len(features) // block))

    def cut(start: int) -> tuple:
        rows = slice(start, min(start + size, len(features)))
        padding = size - (rows.stop - rows.start)
        return (
            rows,
            jnp.asarray(np.pad(features[rows], ((0, padding), (0, 0)))),
            jnp.asarray(np.pad(norms[rows], (0, padding))),
            jnp.asarray(np.pad(radii[rows], (0, padding), constant_values=-1.0)),
        )

    return [cut(start) for start in range(0, len(features), size)]


@partial(jax.jit, static_argnames="half")
def _merge_smallest(
    row_smallest, column_smallest, rows, row_norms, row_radii, columns, column_norms, column_radii, *, half
) -> tuple[jax.Array, jax.Array]:
    """Merge the distances of two blocks into the k + 1 smallest of the rows (R, k + 1) and columns (C, k + 1)."""
    # Rounding to float16 makes the distance of u to v another than that of v to u.
    products = _products(rows, columns, half)
    of_rows = _squared_distances(products, row_norms, column_norms, half)
    of_columns = _squared_distances(products.T, column_norms, row_norms, half)
    of_rows = jnp.where(column_radii[None, :] < 0, jnp.inf, of_rows)
    of_columns = jnp.where(row_radii[None, :] < 0, jnp.inf, of_columns)
    return tuple(map(_smallest, (row_smallest, column_smallest), (of_rows, of_columns)))


def _smallest(known: jax.Array, candidates: jax.Array) -> jax.Array:
    """Return the K smallest of each row of (N, K) and (N, M), ascending."""
    return -jax.lax.top_k(-jnp.concatenate([known, candidates], axis=1), known.shape[1])[0]


@partial(jax.jit, static_argnames="half")
def _inside(rows, row_norms, row_radii, columns, column_norms, column_radii, *, half) -> tuple[jax.Array, jax.Array]:
    """Return which rows are in the ball of a column (R,) and which columns in that of a row (C,)."""
    distances = _squared_distances(_products(rows, columns, half), row_norms, column_norms, half)
    in_columns = jnp.any(distances <= column_radii[None, :], axis=1)
    in_rows = jnp.any(distances <= row_radii[:, None], axis=0)
    return in_columns, in_rows


def _products(rows: jax.Array, columns: jax.Array, half: bool) -> jax.Array:
    return _rounded(jnp.matmul(rows, columns.T, precision=jax.lax.Precision.HIGHEST), half)


def _squared_distances(products: jax.Array, row_norms: jax.Array, column_norms: jax.Array, half: bool) -> jax.Array:
    distances = _rounded(_rounded(row_norms[:, None] - 2.0 * products, half) + column_norms[None, :], half)
    return jnp.maximum(distances, 0.0)


def _rounded(x: jax.Array, half: bool) -> jax.Array:
    # Casts to float16 and back may be optimised away; this may not.
    return jax.lax.reduce_precision(x, exponent_bits=5, mantissa_bits=10) if half else x


# --- Kernel distance --------------------------------------------------------------------------------


def kernel_distance(
    reference: np.ndarray,
    samples: np.ndarray,
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Compute the kernel distance (KID): the mean unbiased MMD^2 over random subsets.

    Args:
      reference: (N, D) float32 features.
      samples: (M, D) float32 features.
      subsets: number of random pairs of subsets.
      subset_size: images per subset, at most min(N, M).
      seed: of the random subsets.

    Returns:
      (mean, standard deviation over the subsets). The mean may be slightly below zero.

    Source: Binkowski et al. 2018 (arXiv 1801.01401): kernel (u.v / D + 1)^3.
    """
    size = min(subset_size, len(reference), len(samples))
    if size < 2:
        raise SfdError("the kernel distance needs at least 2 images on each side")
    generator = np.random.default_rng(seed)
    values = []
    for _ in range(subsets):
        chosen_reference = reference[generator.choice(len(reference), size, replace=False)]
        chosen_samples = samples[generator.choice(len(samples), size, replace=False)]
        values.append(_unbiased_mmd(jnp.asarray(chosen_reference), jnp.asarray(chosen_samples)))
    values = np.asarray(values, np.float64)
    return float(values.mean()), float(values.std())


@jax.jit
def _unbiased_mmd(reference: jax.Array, samples: jax.Array) -> jax.Array:
    size, dimension = reference.shape

    def kernel(u, v):
        return (jnp.matmul(u, v.T, precision=jax.lax.Precision.HIGHEST) / dimension + 1.0) ** 3

    def mean_off_diagonal(matrix):
        # Leave out the diagonal; subtracting it would lose precision, since it is the largest part.
        return jnp.where(jnp.eye(size, dtype=bool), 0.0, matrix).sum() / (size * (size - 1))

    within = mean_off_diagonal(kernel(reference, reference))
    within += mean_off_diagonal(kernel(samples, samples))
    return within - 2.0 * kernel(reference, samples).mean()
