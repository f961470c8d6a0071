"""Every network can be differentiated forwards and backwards: u (J v) = (J^T u) v for its Jacobian J."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_testing import random_params

from sfd_jax.models import NETWORKS, Network, kernels
from sfd_jax.models.execution import PLAIN, Execution, executing

DIT = dict(width=16, depth=2, num_heads=2, input_size=4, patch_size=2, in_channels=3, num_classes=2, repa_features=5)
DIT |= dict(repa_depth=1, repa_width=6)
BARE = dict(use_qknorm=False, use_swiglu=False, use_rope=False, use_rmsnorm=False, use_shift=False, two_clocks=False)
SEMANTIC = dict(input_dim=6, bottleneck_dim=2, hidden_dim=8, transformer_heads=2, transformer_blocks=1, num_layers=1)
SEMANTIC |= dict(num_res_blocks=1)
TEXTURE = dict(z_channels=2, ch=2, ch_mult=(1,), num_res_blocks=1, norm_groups=2)
DINO = dict(width=8, depth=1, num_heads=2, image_size=6, patch_size=2)
TUNED = Execution(attention=kernels.tuned_attention, product=kernels.cpu_product)


def draw(*shapes):
    random = np.random.default_rng(1)
    return [random.standard_normal(shape, np.float32) for shape in shapes]


def dit(network, params, latents, t_semantic, t_texture):
    return network.apply(params, latents, t_semantic, t_texture, jnp.array([0, 2]), return_repa=True)


def method(name):
    return lambda network, params, *args: network.apply(params, *args, method=name)


def whole(network, params, *args):
    return network.apply(params, *args)


# name -> network, its config, the function of (network, params, *inputs), shapes of the inputs
CASES = {
    "lightning_dit": ("lightning_dit", DIT, dit, [(2, 4, 4, 3), (2,), (2,)]),
    "lightning_dit, bare": ("lightning_dit", DIT | BARE, dit, [(2, 4, 4, 3), (2,), (2,)]),
    "texture_vae": ("texture_vae", TEXTURE, whole, [(1, 4, 4, 3)]),
    "texture_vae, decoder": ("texture_vae", TEXTURE | {"variant": "mar"}, method("decode"), [(1, 4, 4, 2)]),
    **{
        f"semantic_vae, {arch}": (
            "semantic_vae",
            SEMANTIC | {"arch": arch, "num_layers": 2 if arch == "mlp" else 1},
            whole,
            [(1, 4, 6), (1, 4, 2)],
        )
        for arch in ("transformer", "mlp", "resnet")
    },
    "dinov2": ("dinov2", DINO, whole, [(1, 4, 6, 3)]),
    "dinov2, swiglu": ("dinov2", DINO | {"ffn": "swiglu", "num_registers": 0}, whole, [(1, 4, 6, 3)]),
    **{name: (name, DINO, whole, [(1, 4, 6, 3)]) for name in ("dinov3", "siglip2", "clip", "mae")},
    # Enough channels that no pixel is zero in all of them, where the distance has no derivative.
    "lpips": ("lpips", dict(channels=(16, 24), depths=(1, 1)), whole, [(1, 8, 8, 3)] * 2),
    "inception": ("inception", {}, whole, [(1, 16, 16, 3)]),
}


def dot(a, b):
    return sum(jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def like(tree, seed):
    """Draw a tree like another one, with leaves of about the same magnitude; by NumPy, so that nothing is compiled."""
    random = np.random.default_rng(seed)
    scale = lambda leaf: jnp.sqrt(jnp.mean(leaf**2)) + 0.01
    return jax.tree.map(lambda leaf: scale(leaf) * random.standard_normal(leaf.shape, np.float32), tree)


def numbers(name, execution, differentiate):
    kind, config, function, shapes = CASES[name]
    network = Network(kind, config)
    at = (random_params(network), *draw(*shapes))
    with executing(execution):
        program = jax.jit(lambda *at: differentiate(lambda *args: function(network, *args), at))
        return np.asarray(program(*at))


def both(f, at):
    """Return u (J v) and (J^T u) v for drawn u and v."""
    v = like(at, 2)
    out, linear = jax.linearize(f, *at)
    u, tangent = like(out, 3), linear(*v)
    gradient = jax.linear_transpose(linear, *at)(u)
    return jnp.stack([dot(u, tangent), dot(gradient, v)]) / jnp.sqrt(dot(u, u) * dot(tangent, tangent))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, execution",
    [
        *((name, PLAIN) for name in CASES if name != "inception"),
        *((name, TUNED) for name in ("lightning_dit", "texture_vae, decoder")),
    ],
)
def test_tangents_and_gradients_are_of_one_linear_map(name, execution):
    forward, backward = numbers(name, execution, both)
    assert abs(backward) > 1e-4  # random vectors, not zeros
    np.testing.assert_allclose(forward, backward, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("execution", [PLAIN, TUNED], ids=["plain", "tuned"])
def test_the_gradient_of_a_tangent(execution):
    """For losses that contain a tangent: the derivative of u (J v) along w, also by another tangent."""

    def two(f, at):
        v, w = like(at, 2), like(at, 4)
        tangent = lambda *args: jax.jvp(f, args, v)[1]
        along, second = jax.jvp(tangent, at, w)
        u = like(along, 3)
        gradient = jax.grad(lambda args: dot(u, tangent(*args)))(at)
        return jnp.stack([dot(u, second), dot(gradient, w)]) / jnp.sqrt(dot(u, u) * dot(second, second))

    forward, backward = numbers("semantic_vae, transformer", execution, two)
    assert abs(backward) > 1e-4
    np.testing.assert_allclose(forward, backward, atol=1e-4)


def test_inception_is_differentiated():
    """Only traced: its convolutions and pools are JAX's own, and compiling it takes minutes."""
    _, config, function, shapes = CASES["inception"]
    network = Network("inception", config)
    at = (network.abstract_params(), *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))
    assert jax.eval_shape(lambda *at: both(lambda *args: function(network, *args), at), *at).shape == (2,)


def test_every_network_is_covered():
    assert {case[0] for case in CASES.values()} == set(NETWORKS)
