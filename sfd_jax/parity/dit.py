"""LightningDiT: forward, REPA, guidance, and the released sizes in full."""

import functools
import gc
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sfd_jax.convert import lightning_dit
from sfd_jax.convert.table import import_params, key_shapes
from sfd_jax.diffusion.clocks import FixedOffset, Synchronous
from sfd_jax.diffusion.guidance import autoguidance, classifier_free
from sfd_jax.errors import SfdError
from sfd_jax.latents import LatentLayout
from sfd_jax.models import DiTConfig, Network, dit_config
from sfd_jax.parity.check import Check, relative_error
from sfd_jax.parity.pack import Case

# bfloat16: up to 7e-3 measured on CPU, with a margin for other backends.
FORWARD_BOUND = {"float32": 5e-6, "bfloat16": 3e-2}

# The released config's names for ours.
_FIELDS = {"hidden_size": "width"} | {
    name: name
    for name in ("input_size", "patch_size", "in_channels", "depth", "num_heads", "num_classes", "learn_sigma")
    + ("use_qknorm", "use_swiglu", "use_rope", "use_rmsnorm")
}


def load_dit(
    case: Case, dtype: str, config: str = "config", params: str = "params", seed: str = "seed"
) -> tuple[Network, dict[str, Any]]:
    """Load a case's LightningDiT with the converter: draw its state dict, derive its config from shapes.

    Args:
      case: the case.
      dtype: compute_dtype of the network.
      config, params, seed: the fields of the case that describe it.

    Raises:
      SfdError: the state dict does not fit, or the config derived from its shapes is not that of the case.
    """
    stated = _stated_config(case.get(config), case.spec.get("model_type"))
    expected = DiTConfig(**stated)
    state = case.weights(params, seed) | lightning_dit.TABLE.fixed(expected)
    # Without q/k norm and rotary table, shapes do not determine the heads, as with a real file.
    ambiguous = not (expected.use_qknorm or expected.use_rope)
    given = {"num_heads": expected.num_heads} if ambiguous else {}
    fields, _ = lightning_dit.read_config(state, given, case.get(config))
    if wrong := {k: fields.get(k) for k in stated if fields.get(k, stated[k]) != stated[k]}:
        raise SfdError(
            f"parity case {case.name}: its shapes give {wrong}, its config says " + str({k: stated[k] for k in wrong})
        )
    network = Network("lightning_dit", fields | {"compute_dtype": dtype})
    source = f"parity case {case.name}, {params}"
    return network, import_params(lightning_dit.TABLE, state, network, source=source, place=jax.device_put)


def layout_of(case: Case) -> LatentLayout:
    """Return the case's latent layout; a network with one clock has only texture."""
    config = case.get("config")
    semantic = config.get("semantic_chans", 0)
    return LatentLayout(config["in_channels"] - semantic, semantic)


def clocks_of(case: Case) -> FixedOffset | Synchronous:
    """Return the case's pair of clocks."""
    delta_t = case.get("config").get("semfirst_delta_t")
    return FixedOffset(delta_t) if delta_t else Synchronous()


def check_small(case: Case, dtype: str) -> Iterator[Check]:
    """Compare all outputs and guidances of a small LightningDiT."""
    network, params = load_dit(case, dtype)
    layout, clocks = layout_of(case), clocks_of(case)
    latents, labels = case.images("in_x"), case.array("in_y").astype(np.int32)
    single = "in_t" if case.has("in_t") else None
    t_texture, t_semantic = case.array(single or "in_t_tex"), case.array(single or "in_t_sem")

    def check(quantity: str, answer: str, ours) -> Check:
        released = case.array(answer)
        released = np.moveaxis(released, 1, -1) if released.ndim == 4 else released
        return Check(case.name, quantity, relative_error(ours, released), FORWARD_BOUND[dtype])

    apply = functools.partial(jax.jit(network.apply, static_argnames="return_repa"), params)
    yield check("forward", "out_forward", apply(latents, t_semantic, t_texture, labels))
    if network.config.repa_features:
        _, repa = apply(latents, t_semantic, t_texture, labels, return_repa=True)
        yield check("REPA features", "out_repa", repa)

    for start, answer in ((0.0, "out_cfg_"), (case.get("interval_start"), "out_cfg_interval_")):
        velocity_fn = jax.jit(
            classifier_free(
                apply,
                labels,
                null_label=network.config.num_classes,
                scale=case.get("cfg_scale"),
                layout=layout,
                interval_start=start,
            )
        )
        for when, fraction in (("lo", 0.15), ("hi", 0.9)):
            tau = jnp.full(len(latents), fraction * clocks.tau_end, jnp.float32)
            # The released sampler has every row twice; both halves get the guided velocity.
            guided = np.tile(velocity_fn(latents, *clocks.times(tau)), (2, 1, 1, 1))
            quantity = f"guidance {when}" + (" with interval" if start else "")
            yield check(quantity, answer + when, guided)

    if "weak_config" in case.spec:
        weak, weak_params = load_dit(case, dtype, "weak_config", "weak_params", "weak_seed")
        weak_apply = functools.partial(jax.jit(weak.apply), weak_params)
        for quantity, answer, scales in (
            ("AutoGuidance", "out_autoguidance", dict(scale=AUTOGUIDANCE_SCALE)),
            ("AutoGuidance, two scales", "out_autoguidance_split", AUTOGUIDANCE_SPLIT),
        ):
            velocity_fn = autoguidance(apply, weak_apply, labels, layout=layout, **scales)
            yield check(quantity, answer, velocity_fn(latents, t_semantic, t_texture))


# From the pack's README; not in the JSON.
AUTOGUIDANCE_SCALE = 1.5
AUTOGUIDANCE_SPLIT = dict(scale_semantic=2.0, scale_texture=1.2)


def check_full(case: Case, dtype: str) -> Iterator[Check]:
    """Compare one forward pass of a released size, its keys, and its number of parameters."""
    network, params = load_dit(case, dtype)
    listed = {key: tuple(shape) for key, shape in case.get("state_dict").items()}
    fixed = lightning_dit.TABLE.fixed(network.config)
    ours = key_shapes(lightning_dit.TABLE, network) | {k: v.shape for k, v in fixed.items()}
    yield Check(case.name, "released keys and shapes", float(ours != listed), 0.0)
    # PyTorch counts the position table as a parameter.
    counted = network.num_params() + fixed["pos_embed"].size
    yield Check(case.name, "number of parameters", float(counted != case.get("num_params")), 0.0)

    latents = case.images("in_x")
    batch = len(latents)
    times = [np.full(batch, case.get(name), np.float32) for name in ("t_sem", "t_tex")]
    labels = np.full(batch, case.get("y"), np.int32)
    velocity = jax.jit(network.apply)(params, latents, *times, labels)
    error = relative_error(velocity, case.images("out_forward"))
    yield Check(case.name, "forward", error, FORWARD_BOUND[dtype])
    # Free a billion parameters before the next case.
    del params, velocity
    gc.collect()


def _stated_config(config: dict[str, Any], model_type: str | None) -> dict[str, Any]:
    """Return the fields of DiTConfig that a released config states."""
    fields: dict[str, Any] = {}
    if model_type:
        size, _, patch = model_type.removeprefix("LightningDiT-").partition("/")
        size_config = dit_config(size)
        fields = {name: getattr(size_config, name) for name in ("width", "depth", "num_heads")}
        fields["patch_size"] = int(patch)
    fields |= {ours: config[theirs] for theirs, ours in _FIELDS.items() if theirs in config}
    fields["use_shift"] = not config.get("wo_shift", False)
    if config.get("use_repa"):
        fields["repa_depth"] = config["repa_depth"]
        fields["repa_width"] = config.get("repa_projector_dim", 2048)
    return fields
