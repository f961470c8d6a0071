"""The other networks: Semantic VAE, texture VAE, visual encoders, Inception, and the lists of released keys."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from sfd_jax.convert.checkpoints import identify, import_checkpoint
from sfd_jax.convert.table import import_params, key_shapes
from sfd_jax.diffusion.losses import cosine_distance
from sfd_jax.errors import SfdError
from sfd_jax.generation.sampler import DECODE_AT_ONCE
from sfd_jax.models import Network
from sfd_jax.models.encoders.vit import preprocess
from sfd_jax.models.texture_vae import to_bytes
from sfd_jax.parity.check import Check, relative_error
from sfd_jax.parity.pack import Case
from sfd_jax.training.terms import gaussian_kl

# bfloat16: up to 3e-2 measured on CPU, with a margin for other backends.
BOUND = {"float32": 2e-5, "bfloat16": 1e-1}
ENCODERS_BOUND = BOUND | {"float32": 5e-6}
# Decoded bytes: the fraction that may differ, and by how much.
BYTES_SHARE, BYTES_MOST = 1e-3, 1.0


def load_network(case: Case, dtype: str, given: dict[str, Any]) -> tuple[Network, dict[str, Any]]:
    """Load a case's network with the converter, like an unknown file: identify it and derive its config."""
    state = case.weights()
    _, module = identify(state, f"parity case {case.name}")
    fields, _ = module.read_config(state, given, case.spec.get("config", {}))
    if module.TABLE.network != "inception":  # which is always float32
        fields |= {"compute_dtype": dtype}
    network = Network(module.TABLE.network, fields)
    params = import_params(module.TABLE, state, network, source=f"parity case {case.name}", place=jax.device_put)
    return network, params


def check_semantic_vae(case: Case, dtype: str) -> Iterator[Check]:
    """Compare encoder, sampling, decoder and the terms of the loss."""
    network, params = load_network(case, dtype, {})
    if network.config.arch != case.get("config")["arch"]:
        raise SfdError(f"parity case {case.name}: its weights are of architecture '{network.config.arch}'")
    check = functools.partial(_check, case, BOUND[dtype])
    features, noise = case.array("in_features"), case.array("in_noise")
    mean, logvar = network.apply(params, features, method="encode")
    reconstruction, *_ = network.apply(params, features, noise)
    yield check("mean", mean, case.array("out_mean"))
    yield check("log-variance", logvar, case.array("out_logvar"))
    yield check("posterior sample", mean + np.exp(logvar / 2) * noise, case.array("out_z"))
    yield check("reconstruction", reconstruction, case.array("out_recon"))
    yield check("KL", gaussian_kl(mean, logvar), case.array("out_kl"))
    difference = np.asarray(reconstruction) - features
    yield check("squared error", np.mean(difference**2), case.array("out_mse"))
    yield check("absolute error", np.mean(np.abs(difference)), case.array("out_l1"))
    for axis, name in ((1, "tokens"), (2, "features")):
        distance = cosine_distance(reconstruction, features, axis=axis).mean()
        yield check(f"cosine term over {name}", distance, case.array(f"out_cos_over_{name}"))


def check_texture_vae(case: Case, dtype: str) -> Iterator[Check]:
    """Compare encoder and decoder, and the bytes of the decoded images.

    Always in float32, and decoded like in the sampler: `sfd sample --dtype` is of the diffusion model only.
    """
    dtype = "float32"
    network, params = load_network(case, dtype, {})
    variant = "mar" if case.get("config")["model_type"] == "marvae" else "ldm"
    if network.config.variant != variant:
        raise SfdError(f"parity case {case.name}: its weights are of variant {network.config.variant}")
    check = functools.partial(_check, case, BOUND[dtype])
    mean, logvar = jax.jit(functools.partial(network.apply, method="encode"))(params, case.images("in_x"))

    def decode(params, raw_latents):
        one = lambda raw: network.apply(params, raw[None], method="decode")[0]
        return jax.lax.map(one, raw_latents, batch_size=DECODE_AT_ONCE)

    decoded = jax.jit(decode)(params, case.images("in_z"))
    yield check("mean", mean, case.images("out_mean"))
    yield check("log-variance", logvar, case.images("out_logvar"))
    yield check("decoded pixels", decoded, case.images("out_decoded"))
    released = case.array("out_uint8").astype(int)
    ours = np.asarray(to_bytes(decoded)).astype(int)
    if ours.shape != released.shape:
        raise SfdError(f"parity case {case.name}: {ours.shape} bytes, released {released.shape}")
    off = np.abs(ours - released)
    yield Check(case.name, "bytes: share that differs", float(np.mean(off > 0)), BYTES_SHARE)
    largest = float(off.max())
    yield Check(case.name, "bytes: largest difference", largest, BYTES_MOST)


def check_dinov2(case: Case, dtype: str) -> Iterator[Check]:
    """Compare preprocessing, the resized position table, and all tokens."""
    # The small case's heads are not 64 wide, which its weights do not show.
    network, params = load_network(case, dtype, {"num_heads": case.get("config")["num_heads"]})
    check = functools.partial(_check, case, BOUND[dtype])
    released = case.images("out_preprocessed")
    pixels = preprocess(case.images("in_image"), released.shape[1])
    yield check("preprocessing", pixels, released)
    rows, columns = (side // network.config.patch_size for side in released.shape[1:3])
    positions = network.apply(params, rows, columns, method="positions")
    positions = np.concatenate([params["pos_embed"][:, :1], positions], axis=1)
    yield check("position table", positions, case.array("out_pos"))
    tokens = jax.jit(network.apply)(params, pixels)
    yield check("patch tokens", tokens["patch_tokens"], case.array("out_patch"))
    yield check("class token", tokens["cls_token"], case.array("out_cls"))
    yield check("register tokens", tokens["register_tokens"], case.array("out_reg"))


def check_encoders(case: Case, dtype: str) -> Iterator[Check]:
    """Compare patch features and class token of each encoder, whose file and config.json lie in the case's folder."""
    for name, about in case.get("encoders").items():
        imported = import_checkpoint(case.folder / name)
        network = Network(imported.network.name, imported.network.config_dict() | {"compute_dtype": dtype})
        apply = functools.partial(network.apply, method="tokens")
        grid = about["image_size"] // about["patch_size"]
        tokens = jax.jit(apply, static_argnums=2)(imported.params, case.images(f"in_{name}"), grid)
        for ours, released in (("patch_tokens", "patches"), ("cls_token", "cls")):
            if case.has(answer := f"out_{name}_{released}"):
                yield _check(case, ENCODERS_BOUND[dtype], f"{name}: {released}", tokens[ours], case.array(answer))


def check_inception(case: Case, dtype: str) -> Iterator[Check]:
    """Compare the resize and every feature; this network is always float32."""
    network, params = load_network(case, dtype, {})
    check = functools.partial(_check, case, BOUND["float32"])
    images = case.images("in_image")
    released = case.images("out_resized")
    resized = np.asarray(network.apply(params, images, method="resize"))
    # The pack keeps every n-th pixel.
    stride = -(-resized.shape[1] // released.shape[1])
    yield check("resize", resized[:, ::stride, ::stride], released)
    features = jax.jit(network.apply)(params, images)
    for name in ("pool", "spatial", "logits_unbiased"):
        yield check(name, features[name], case.array(f"out_{name}"))


def check_keys(case: Case, dtype: str) -> Iterator[Check]:
    """Compare a list of released keys and shapes with those of our table for a network of that size."""
    listed = {key: tuple(shape) for key, shape in case.spec.items()}
    state = {key: jax.ShapeDtypeStruct(shape, np.float32) for key, shape in listed.items()}
    _, module = identify(state, f"parity case {case.name}")
    fields, _ = module.read_config(state, {}, {})
    ours = key_shapes(module.TABLE, Network(module.TABLE.network, fields))
    yield Check(case.name, "released keys and shapes", float(ours != listed), 0.0)


def _check(case: Case, bound: float, quantity: str, ours, released) -> Check:
    return Check(case.name, quantity, relative_error(ours, released), bound)
