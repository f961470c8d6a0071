"""Guidance: combine two velocities so that samples follow their condition more closely.

These functions turn `apply(latents (B,H,W,C), t_semantic (B,), t_texture (B,), labels (B,)) ->
(B,H,W,C)`, a network with its parameters, into the velocity function that `sampling.sample` takes:

    velocity = other + scale * (conditional - other)

where `other` is the same network without a label (classifier-free guidance) or a weaker network
with the same label (AutoGuidance). A group of channels whose clock is below `interval_start` takes
the conditional velocity alone. A network is not evaluated where the formula would not use it: outside the interval,
and, if a sampler tells which groups move (`velocity_at`), where only groups of scale 1 do.

Source: arXiv 2512.04926, section 4; released `models/lightningdit.py`, `forward_with_cfg` and
`forward_with_autoguidance`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from sfd_jax.diffusion.clocks import Clocks
from sfd_jax.errors import SfdError, nearest
from sfd_jax.latents import LatentLayout

Apply = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
VelocityFn = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

INTERVAL_GROUPS = ("tex", "sem", "both")


def conditional(apply: Apply, labels: jax.Array) -> VelocityFn:
    """Return the velocity function without guidance, for labels (B,) int32."""
    return lambda latents, t_semantic, t_texture: apply(latents, t_semantic, t_texture, labels)


def classifier_free(
    apply: Apply,
    labels: jax.Array,
    *,
    null_label: int,
    scale: float,
    layout: LatentLayout,
    interval_start: float = 0.0,
    interval_groups: str = "both",
) -> VelocityFn:
    """Return the velocity function of classifier-free guidance.

    Conditional and null rows go through the network in one batch of 2B.

    Args:
      apply: network with its parameters.
      labels: (B,) int32 classes.
      null_label: the label that was trained as "no label".
      scale: 1 is no guidance; then only B rows are evaluated.
      layout: which channels are texture.
      interval_start: clock below which a group takes the conditional velocity alone; 0 for always guided.
      interval_groups: which groups `interval_start` applies to: "tex", "sem" or "both".

    Raises:
      SfdError: if `interval_groups` is unknown.

    Source: released `forward_with_cfg`; it tests the clock of the first row only, which in its
    sampler is that of all rows. Here each row is tested.
    """
    check_groups(interval_groups)
    if scale == 1:
        return conditional(apply, labels)
    both_labels = jnp.stack([labels, jnp.full_like(labels, null_label)], axis=1).reshape(-1)

    def both(latents, t_semantic, t_texture):
        # Rows alternate, so that both rows of a sample are on the device of the sample.
        doubled = [jnp.repeat(a, 2, axis=0) for a in (latents, t_semantic, t_texture)]
        pairs = apply(*doubled, both_labels).reshape(len(latents), 2, *latents.shape[1:])
        return pairs[:, 0], pairs[:, 1]

    main = conditional(apply, labels)
    return _guided(main, both, scale, scale, layout, interval_start, interval_groups)


def autoguidance(
    apply: Apply,
    weak_apply: Apply,
    labels: jax.Array,
    *,
    layout: LatentLayout,
    scale: float = 1.0,
    scale_semantic: float | None = None,
    scale_texture: float | None = None,
    interval_start: float = 0.0,
    interval_groups: str = "both",
) -> VelocityFn:
    """Return the velocity function of AutoGuidance: away from a weaker model, with the same label.

    Args:
      apply: the network with its parameters.
      weak_apply: the weaker network with its parameters.
      labels: (B,) int32.
      layout: which channels are texture.
      scale: guidance scale of both groups; 1 is no guidance; then the weak model is not evaluated.
      scale_semantic, scale_texture: scale of one group; `scale` by default.
      interval_start, interval_groups: as for `classifier_free`.

    Raises:
      SfdError: if `interval_groups` is unknown.

    Source: released `forward_with_autoguidance`; Karras et al., arXiv 2406.02507.
    """
    check_groups(interval_groups)
    scale_semantic = scale if scale_semantic is None else scale_semantic
    scale_texture = scale if scale_texture is None else scale_texture
    main, weak = conditional(apply, labels), conditional(weak_apply, labels)
    if scale_semantic == 1 and scale_texture == 1:
        return main

    def both(*at):
        return main(*at), weak(*at)

    scales = scale_semantic, scale_texture
    return _guided(main, both, *scales, layout, interval_start, interval_groups)


def _guided(main, both, scale_semantic, scale_texture, layout, interval_start, interval_groups):
    """Return the guided velocity function, from `both` -> (conditional, other)."""
    scales = layout.per_channel(scale_texture, scale_semantic)
    one_scale = scale_semantic == 1 or scale_texture == 1

    def always(latents, t_semantic, t_texture):
        velocity, other = both(latents, t_semantic, t_texture)
        return combine(velocity, other, scales.reshape((1,) * (latents.ndim - 1) + (-1,)))

    if interval_start <= 0 and not one_scale:
        return always

    def inside(latents, t_semantic, t_texture):
        velocity, other = both(latents, t_semantic, t_texture)
        semantic, texture = guided_groups(t_semantic, t_texture, interval_start, interval_groups)
        # Select: combining with scale 1 would not return the conditional velocity bit for bit.
        on = layout.per_channel(texture, semantic) > 0
        on = on.reshape(len(latents), *(1,) * (latents.ndim - 2), -1)
        guided = combine(velocity, other, scales.reshape((1,) * (latents.ndim - 1) + (-1,)))
        return jnp.where(on, guided, velocity)

    def velocity_fn(latents, t_semantic, t_texture, moves=(True, True)):
        # The other velocity is evaluated only if a moving group of some row is guided with a scale other than 1.
        semantic, texture = guided_groups(t_semantic, t_texture, interval_start, interval_groups)
        semantic, texture = semantic & moves[0] & (scale_semantic != 1), texture & moves[1] & (scale_texture != 1)
        guided = inside if interval_start > 0 else always
        return jax.lax.cond(jnp.any(semantic | texture), guided, main, latents, t_semantic, t_texture)

    velocity_fn.takes_moves = True
    return velocity_fn


def velocity_at(
    velocity_fn: VelocityFn, latents: jax.Array, times: tuple[jax.Array, jax.Array], moves: tuple[jax.Array, jax.Array]
) -> jax.Array:
    """Evaluate a velocity function where only some groups move.

    Args:
      velocity_fn: any; one of this module then leaves out networks that the moving groups do not need.
      latents: (B,H,W,C).
      times: t_semantic, t_texture, (B,) each.
      moves: whether the semantic and the texture group move, (B,) bool each.

    Returns:
      (B,H,W,C); that of a group that stands still must not be used.
    """
    more = {"moves": moves} if getattr(velocity_fn, "takes_moves", False) else {}
    return velocity_fn(latents, *times, **more)


def combine(velocity: jax.Array, other: jax.Array, scale: jax.Array | float) -> jax.Array:
    """Return other + scale * (velocity - other): 1 gives `velocity`, more moves away from `other`.

    Args:
      velocity, other: (B,H,W,C).
      scale: broadcasts against them.
    """
    return other + scale * (velocity - other)


def guided_groups(
    t_semantic: jax.Array, t_texture: jax.Array, interval_start: float, interval_groups: str
) -> tuple[jax.Array, jax.Array]:
    """Return which rows are guided, by group: (semantic, texture), (B,) bool each.

    A group outside `interval_groups` is always guided.
    """
    semantic, texture = t_semantic >= interval_start, t_texture >= interval_start
    if interval_groups == "tex":
        semantic = jnp.ones_like(semantic)
    if interval_groups == "sem":
        texture = jnp.ones_like(texture)
    return semantic, texture


def jumps(clocks: Clocks, *, interval_start: float = 0.0, interval_groups: str = "both") -> tuple[float, ...]:
    """Return the global times at which the guided velocity jumps, for `sampling.sample`.

    Guidance of a group starts abruptly when its clock passes `interval_start`. An integrator that
    does not know this time wastes most of its evaluations there.
    """
    check_groups(interval_groups)
    if not 0 < interval_start < 1:
        return ()
    semantic, texture = clocks.tau_at(interval_start)
    return {"sem": (semantic,), "tex": (texture,), "both": (semantic, texture)}[interval_groups]


def check_groups(interval_groups: str) -> None:
    if interval_groups not in INTERVAL_GROUPS:
        raise SfdError(
            f"unknown guidance interval groups {interval_groups!r}: {nearest(interval_groups, INTERVAL_GROUPS)}"
        )
