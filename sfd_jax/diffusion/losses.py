"""The training loss of SFD: a velocity loss with two clocks, a cosine term, and REPA.

For data x1, noise x0 and drawn time t, each group of channels g is at its own time t_g on the path
from x0 to x1 and has its own target u_g there. With v the predicted velocity and c channels:

    velocity = mean over c and positions of weight_c (v - u)^2, weight = beta for semantics, else 1
    cosine   = mean over positions of 1 - cos(v, u), over all channels together
    repa     = distance of projected hidden states to DINOv2 patch features (cosine, mse or both)
    total    = velocity + cosine_weight * cosine + repa_weight * repa + weights * custom terms

With another path or prediction (`LossConfig.path`, `LossConfig.prediction`), v and u are what that prediction compares,
such as the predicted and the true noise, and the first term has its weight.

A custom term is a frozen dataclass derived from `LossTerm`, registered under a name (docs/extend.md).

All randomness depends on a key and the row of the sample in the global batch alone, so that neither
sharding nor accumulation changes it.

Source: arXiv 2512.04926, section 3; released `transport/transport.py`, `training_losses`.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from sfd_jax import settings
from sfd_jax.diffusion.clocks import Clocks
from sfd_jax.diffusion.paths import LinearPath, Path
from sfd_jax.diffusion.predictions import PredictionType, VelocityPrediction
from sfd_jax.errors import SfdError, nearest
from sfd_jax.latents import LatentLayout
from sfd_jax.randomness import keys_by_row
from sfd_jax.ranges import Range, check_fields
from sfd_jax.registry import Registry
from sfd_jax.settings import setting

Predict = Callable[..., jax.Array | tuple[jax.Array, jax.Array]]

REPA_KINDS = ("cos", "mse", "cos_mse")
TIMES = ("logit_normal", "uniform")
_BUILT_IN = ("total", "velocity", "cosine", "repa")  # parts of the loss that are logged


class Draws(NamedTuple):
    """The random values of a training step.

    noise: (B,H,W,C) float32. t: (B,) float32 in (0, 1). labels: (B,) int32, some of them the null label.
    """

    noise: jax.Array
    t: jax.Array
    labels: jax.Array


class Prediction(NamedTuple):
    """The inputs of a loss term; float32 except the labels.

    latents, velocity, target: (B,H,W,C): the point on the path, the predicted velocity there, and its target (for other
      prediction types the pair from `PredictionType.compared`).
    data: (B,H,W,C), the end of the path. draws: noise (the start of the path), time and labels.
    t_semantic, t_texture: (B,). layout: which channels are texture.
    clocks: the pair with its trained parameters; tau = draws.t * clocks.tau_end.
    projected: (B,N,F) outputs of REPA's projector; None if no term reads them.
    features: (B,N,F), REPA's targets as they are compared, or None.
    """

    latents: jax.Array
    velocity: jax.Array
    target: jax.Array
    data: jax.Array
    draws: Draws
    t_semantic: jax.Array
    t_texture: jax.Array
    layout: LatentLayout
    clocks: Clocks
    projected: jax.Array | None
    features: jax.Array | None


@dataclasses.dataclass(frozen=True)
class LossTerm(abc.ABC):
    """Add a term to the loss; the fields of a subclass are its settings, in the config group `loss.terms.NAME`.

    Attributes:
      reads_hidden: whether it reads `Prediction.projected`, for which the network needs a projector.
    """

    reads_hidden: ClassVar[bool] = False

    weight: float = setting(1.0, "weight of the term; 0 leaves it out", range=Range(float, 0, 1e6))

    def __post_init__(self):
        check_fields("loss.terms", self)

    @abc.abstractmethod
    def __call__(self, at: Prediction) -> jax.Array:
        """Return the unweighted term of each sample, (B,)."""


TERMS: Registry[type[LossTerm]] = Registry("loss terms")


def make_terms(config: Mapping[str, Mapping[str, Any]]) -> dict[str, LossTerm]:
    """Make the terms of a config, name -> fields, except those of weight 0.

    Raises:
      SfdError: an unknown name or field, or a value outside its range.
    """
    terms = {name: settings.make(TERMS, {"name": name, **fields}) for name, fields in config.items()}
    return {name: term for name, term in terms.items() if term.weight > 0}


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weights and distributions of the loss; the defaults are the final recipe of the release.

    Args:
      semantic_weight: beta, the weight of the semantic channels' squared error.
      cosine_weight: weight of the cosine term; 0 leaves it out.
      repa_weight: weight of the REPA term (lambda); 0 leaves it out.
      repa_kind: "cos", "mse", or "cos_mse" for the mean of both.
      repa_spatial_norm: gamma of iREPA's normalisation of the features (`spatial_norm`); 0 leaves them as they are.
      time: distribution of t: "logit_normal" (released code) or "uniform" (paper).
      label_dropout: probability of the null label.
      path: from noise to data.
      prediction: what the network predicts.
      terms: custom terms by name, see `make_terms`.

    Raises:
      SfdError: if a name is unknown or a number outside its range.
    """

    semantic_weight: float = 2.0
    cosine_weight: float = 1.0
    repa_weight: float = 1.0
    repa_kind: str = setting("cos", "distance to the features", choices=REPA_KINDS)
    repa_spatial_norm: float = 0.0
    time: str = setting("logit_normal", "distribution of t", choices=TIMES)
    label_dropout: float = 0.1
    path: Path = LinearPath()
    prediction: PredictionType = VelocityPrediction()
    terms: Mapping[str, LossTerm] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        check_fields("loss", self)
        if taken := self.terms.keys() & set(_BUILT_IN):
            raise SfdError(f"the loss has a part called '{min(taken)}' already: register the term under another name")

    @property
    def reads_hidden(self) -> bool:
        """Whether the loss needs the projected hidden states of the network."""
        return self.repa_weight > 0 or any(term.reads_hidden for term in self.terms.values())


class LossTerms(NamedTuple):
    """The loss of each sample, (B,) float32 throughout.

    velocity, cosine, repa: the unweighted terms; 0 where left out.
    total: their weighted sum; training minimises its mean over the batch.
    error_semantic, error_texture: mean squared error of the velocity of each group, unweighted
      (0 for a group without channels).
    t_semantic, t_texture: the time of each group.
    terms: the unweighted custom terms by name.
    """

    velocity: jax.Array
    cosine: jax.Array
    repa: jax.Array
    total: jax.Array
    error_semantic: jax.Array
    error_texture: jax.Array
    t_semantic: jax.Array
    t_texture: jax.Array
    terms: dict[str, jax.Array]


def draw(
    key: jax.Array,
    data: jax.Array,
    labels: jax.Array,
    *,
    config: LossConfig,
    null_label: int | None,
    row_indices: jax.Array | None = None,
) -> Draws:
    """Draw noise and time for a batch, and drop labels.

    Args:
      key: the key of this step.
      data: (B,H,W,C), for its shape.
      labels: (B,) int32.
      config: distribution of time, label dropout.
      null_label: replaces a dropped label; None for a network without one.
      row_indices: (B,) int32 row of each sample in the global batch, which determines its random values;
        0..B-1 by default. So part of a batch draws the same values as within the whole.

    Raises:
      SfdError: if label dropout is positive but there is no null label.
    """
    if config.label_dropout > 0 and null_label is None:
        raise SfdError(
            "loss.label_dropout is positive but the network has no null label: "
            "set model.null_label=True or loss.label_dropout=0"
        )
    row_indices = jnp.arange(len(data)) if row_indices is None else row_indices

    def draw_one(row_key):
        noise_key, time_key, label_key = jax.random.split(row_key, 3)
        return (
            jax.random.normal(noise_key, data.shape[1:]),
            sample_time(time_key, config.time),
            jax.random.bernoulli(label_key, config.label_dropout),
        )

    noise, t, dropped = jax.vmap(draw_one)(keys_by_row(key, row_indices))
    if null_label is not None:
        labels = jnp.where(dropped, null_label, labels)
    return Draws(noise, t, labels)


def sample_time(key: jax.Array, kind: str, shape: tuple[int, ...] = ()) -> jax.Array:
    """Draw training times in (0, 1), which the clocks scale to [0, tau_end].

    Source: "logit_normal", sigmoid(N(0, 1)): the released code; "uniform": the paper.
    """
    if kind == "logit_normal":
        return jax.nn.sigmoid(jax.random.normal(key, shape))
    if kind == "uniform":
        return jax.random.uniform(key, shape)
    raise SfdError(f"unknown loss.time {kind!r}: {nearest(kind, TIMES)}")


def velocity_loss(
    predict: Predict,
    data: jax.Array,
    draws: Draws,
    *,
    layout: LatentLayout,
    clocks: Clocks,
    config: LossConfig,
    repa_features: jax.Array | None = None,
) -> LossTerms:
    """Compute the loss of each sample; pure, float32.

    Args:
      predict: (latents, t_semantic, t_texture, labels) -> what `config.prediction` says (B,H,W,C), or if
        `config.reads_hidden` -> (that, projected hidden states (B,N,F)).
      data: (B,H,W,C) normalised latents.
      draws: noise, time and labels, as `draw` returns them.
      layout: which channels are texture.
      clocks: the pair of clocks.
      config: weights, path and prediction.
      repa_features: (B,N,F) DINOv2 patch features; needed if `config.repa_weight` > 0.

    Raises:
      SfdError: if REPA has no features, or a custom term does not return one value per sample.
    """
    if config.repa_weight > 0 and repa_features is None:
        raise SfdError(
            "loss.repa_weight is positive but the batch holds no `repa_features`: extract the "
            "latents with REPA features, or set loss.repa_weight=0"
        )
    t_semantic, t_texture = clocks.training_times(draws.t)
    t = layout.per_channel(t_texture, t_semantic)[:, None, None, :]
    on_path = config.prediction.clip(t, config.path)
    latents = config.path.interpolate(data, draws.noise, on_path)
    output = predict(latents, t_semantic, t_texture, draws.labels)
    projected = None
    if isinstance(output, tuple):
        output, projected = output

    output = output.astype(jnp.float32)
    velocity, target = config.prediction.compared(output, data, draws.noise, on_path, config.path)
    error = (velocity - target) ** 2
    weight = layout.per_channel(1.0, config.semantic_weight)
    error_texture, error_semantic = layout.split(error)
    zero = jnp.zeros(len(data), jnp.float32)
    weighted = error * weight[None, None, None, :]
    of_time = config.prediction.loss_weight(t, config.path)
    velocity_term = _sample_mean(weighted if of_time is None else weighted * of_time)
    cosine = repa = zero
    if repa_features is not None and config.repa_spatial_norm > 0:
        repa_features = spatial_norm(repa_features, config.repa_spatial_norm)
    if config.cosine_weight > 0:
        cosine = cosine_distance(velocity, target)
    if config.repa_weight > 0:
        repa = repa_distance(projected, repa_features, config.repa_kind)
    total = velocity_term + config.cosine_weight * cosine + config.repa_weight * repa
    at = Prediction(
        latents, velocity, target, data, draws, t_semantic, t_texture, layout, clocks, projected, repa_features
    )
    terms = {}
    for name, term in config.terms.items():
        terms[name] = term(at)
        if terms[name].shape != zero.shape:
            raise SfdError(
                f"loss term '{name}' returns shape {terms[name].shape} instead of one value per sample, {zero.shape}"
            )
        total = total + term.weight * terms[name]
    return LossTerms(
        velocity=velocity_term,
        cosine=cosine,
        repa=repa,
        total=total,
        error_semantic=_sample_mean(error_semantic) if layout.semantic_channels else zero,
        error_texture=_sample_mean(error_texture),
        t_semantic=t_semantic,
        t_texture=t_texture,
        terms=terms,
    )


def repa_distance(projected: jax.Array, features: jax.Array, kind: str) -> jax.Array:
    """Return the distance of projected hidden states to features, (B,N,F) both, as (B,)."""
    projected, features = projected.astype(jnp.float32), features.astype(jnp.float32)
    cosine = cosine_distance(projected, features)
    squared = _sample_mean((projected - features) ** 2)
    return {"cos": cosine, "mse": squared, "cos_mse": (cosine + squared) / 2}[kind]


def spatial_norm(features: jax.Array, gamma: float) -> jax.Array:
    """Subtract gamma times the mean over an image's tokens, and divide by the standard deviation, per channel.

    Args:
      features: (B,N,F), N > 1.
      gamma: share of the mean that is subtracted.

    Returns:
      (B,N,F) float32.

    Source: arXiv 2512.10794, section 4; with N - 1 in the deviation, as PyTorch's `std` in its algorithm 1.
    """
    features = features.astype(jnp.float32)
    mean, deviation = (of(features, axis=1, keepdims=True) for of in (jnp.mean, functools.partial(jnp.std, ddof=1)))
    return (features - gamma * mean) / (deviation + 1e-6)


def cosine_distance(a: jax.Array, b: jax.Array, axis: int = -1) -> jax.Array:
    """Return 1 - cosine similarity along `axis`, averaged over all other axes but the first: (B,)."""
    return _sample_mean(1.0 - cosine_similarity(a, b, axis))


def cosine_similarity(a: jax.Array, b: jax.Array, axis: int = -1) -> jax.Array:
    """Return the cosine of the angle between vectors along an axis, (..., C) -> (...).

    Each norm is at least 1e-8, as in PyTorch's function of that name. A vector shorter than that
    has no direction, so it gets no gradient either; PyTorch's would be 1e8 times the other vector.
    A network whose last layer starts at zero has such vectors in its first step, and Adam's second
    moment would keep the gradient for tens of thousands of steps.
    """
    return jnp.sum(_direction(a, axis) * _direction(b, axis), axis=axis)


def _direction(vectors: jax.Array, axis: int) -> jax.Array:
    vectors = vectors.astype(jnp.float32)
    squared = jnp.sum(vectors**2, axis=axis, keepdims=True)
    long = squared > _EPS**2
    # Where the square root is not used its argument is 1: its gradient at 0 is infinite.
    unit = vectors / jnp.sqrt(jnp.where(long, squared, 1.0))
    return jnp.where(long, unit, jax.lax.stop_gradient(vectors / _EPS))


_EPS = 1e-8


def _sample_mean(values: jax.Array) -> jax.Array:
    return jnp.mean(values, axis=tuple(range(1, values.ndim)))


def loss_metrics(terms: LossTerms) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Return the metrics to log, each as (sum, count) to add up over batches, hosts and steps.

    Besides the terms: the squared error of each group, in all and by quarter of the group's
    clock ("error_texture_q1" for t_texture in [0, 1/4) to "q4" for [3/4, 1]).
    """
    count = jnp.float32(len(terms.total))
    named = {name: getattr(terms, name) for name in _BUILT_IN} | terms.terms
    metrics = {f"loss_{name}": (jnp.sum(value), count) for name, value in named.items()}
    for group in ("semantic", "texture"):
        error, clock = getattr(terms, f"error_{group}"), getattr(terms, f"t_{group}")
        metrics[f"error_{group}"] = (jnp.sum(error), count)
        quarter = jnp.clip(jnp.floor(clock * 4), 0, 3)
        for q in range(4):
            here = (quarter == q).astype(jnp.float32)
            metrics[f"error_{group}_q{q + 1}"] = (jnp.sum(error * here), jnp.sum(here))
    return metrics
