"""float32 means float32 on a TPU: the precision of every product in networks, step and sampler, as lowered."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sfd_jax.diffusion.clocks import FixedOffset
from sfd_jax.diffusion.losses import LossConfig
from sfd_jax.distributed import make_mesh
from sfd_jax.evaluation.metrics import _merge_smallest, _unbiased_mmd
from sfd_jax.execution import choose_execution
from sfd_jax.generation.sampler import SampleConfig, Sampler
from sfd_jax.latents import LatentLayout, LatentStatistics
from sfd_jax.models import Network
from sfd_jax.models.encoders import Tiling, VisualEncoder
from sfd_jax.models.execution import executing
from sfd_jax.models.latent_encoder import LatentEncoder
from sfd_jax.training import OptimizerConfig, TrainConfig, make_optimizer
from sfd_jax.training.diffusion import diffusion_task
from sfd_jax.training.semantic_vae import SemanticVAELoss, semantic_vae_task
from sfd_jax.training.state import abstract_state
from sfd_jax.training.step import _jit_step
from sfd_jax.training.texture_vae import TextureVAELoss, texture_vae_task

PRODUCTS = re.compile(r"stablehlo\.(?:dot_general|convolution)\b.*")
OPERANDS = re.compile(r": \(tensor<(?:\d+x)*(\w+)>, tensor<(?:\d+x)*(\w+)>\)")


def products(lowered) -> list[tuple[str, bool]]:
    """Return the dtype of the factors of each product of a program, and whether its precision is the highest."""
    found = []
    for line in PRODUCTS.findall(lowered.as_text()):
        first, second = OPERANDS.search(line).groups()
        assert first == second, line
        found.append((first, line.count("HIGHEST") == 2))
    return found


def lower(function, *args):
    return jax.jit(function).trace(*args).lower(lowering_platforms=("tpu",))


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def gradients(network, *args, method="__call__"):
    """Lower the network with the gradient of all its outputs, by parameters and inputs."""

    def loss(params, *args):
        with executing(choose_execution(make_mesh())):  # as in every step
            leaves = jax.tree.leaves(network.apply(params, *args, method=method))
        return sum(jnp.sum(leaf**2) for leaf in leaves if leaf.dtype == jnp.float32)

    return lower(jax.value_and_grad(loss, argnums=(0, 1)), network.abstract_params(), *args)


DIT = dict(width=32, depth=2, num_heads=2, input_size=4, in_channels=5, num_classes=3, repa_features=7, repa_depth=1)
VAE = dict(ch=8, ch_mult=(1, 2), num_res_blocks=1, z_channels=3, norm_groups=4)
SEMANTIC = dict(input_dim=16, bottleneck_dim=2, hidden_dim=8, transformer_blocks=1, transformer_heads=2)
DINO = dict(width=8, depth=2, num_heads=2, image_size=20, patch_size=5)


def dit_args(rows=2):
    return shape(rows, 4, 4, 5), shape(rows), shape(rows), shape(rows, dtype=jnp.int32)


def step(task, batch, **changes):
    config = TrainConfig(OptimizerConfig(clip_norm=1.0), global_batch_size=16, accumulation=2, **changes)
    mesh, optimizer = make_mesh(4, 2), make_optimizer(config.optimizer, config.steps)
    key = jax.eval_shape(lambda: jax.random.key(0))
    arguments = abstract_state(task, optimizer, mesh), batch, key, ()
    return _jit_step(task, optimizer, config, mesh).trace(*arguments).lower(lowering_platforms=("tpu",))


def dit_step(dtype, **changes):
    task = diffusion_task(
        Network("lightning_dit", {**DIT, "compute_dtype": dtype}),
        LatentLayout(3, 2),
        FixedOffset(0.3),
        LossConfig(),
    )
    batch = {
        "latents": shape(16, 4, 4, 5),
        "labels": shape(16, dtype=jnp.int32),
        "repa_features": shape(16, 16, 7, dtype=jnp.float16),
    }
    return step(task, batch, **changes)


def sampler(dtype):
    networks = Network("lightning_dit", DIT | {"compute_dtype": dtype, "repa_features": 0}), Network("texture_vae", VAE)
    ones = lambda n: np.ones(n, np.float32)
    sampler = Sampler(
        *((network, network.abstract_params()) for network in networks),
        layout=LatentLayout(3, 2),
        statistics=LatentStatistics(ones(3), ones(3), ones(2), ones(2)),
        clocks=FixedOffset(0.3),
        config=SampleConfig(guidance="cfg", guidance_scale=1.5),
        mesh=make_mesh(),
    )
    rows = shape(8, dtype=jnp.uint32), shape(8, dtype=jnp.int32)
    return [
        program.trace(sampler._params, *args).lower(lowering_platforms=("tpu",))
        for program, args in (
            (sampler._run_sample, (sampler._seed, *rows)),
            (sampler._run_decode, (shape(8, 4, 4, 5),)),
        )
    ]


def encoder(dtype):
    networks = [
        Network(name, fields | {"compute_dtype": dtype})
        for name, fields in (("texture_vae", VAE), ("dinov2", DINO), ("semantic_vae", SEMANTIC | {"input_dim": 8}))
    ]
    texture, visual, semantic = networks
    encode = LatentEncoder(texture, VisualEncoder(visual, Tiling(16, 8)), semantic, repa=True, flips=True)
    params = {
        name: network.abstract_params()
        for name, network in zip(("texture_vae", "visual", "semantic_vae"), networks, strict=True)
    }
    return lower(encode, params, shape(2, 16, 16, 3, dtype=jnp.uint8), shape(2, dtype=jnp.int32))


PROGRAMS = {
    "lightning_dit, MLP without norms": lambda dtype: gradients(
        Network(
            "lightning_dit",
            DIT
            | {
                "compute_dtype": dtype,
                "use_swiglu": False,
                "use_qknorm": False,
                "use_rope": False,
                "use_rmsnorm": False,
                "two_clocks": False,
            },
        ),
        *dit_args(),
    ),
    "step": dit_step,
    "step, remat": lambda dtype: dit_step(dtype, remat="dots", scan_blocks=False),
    "sampler": sampler,
    "extraction": encoder,
    "semantic_vae step": lambda dtype: step(
        semantic_vae_task(Network("semantic_vae", SEMANTIC | {"compute_dtype": dtype}), SemanticVAELoss()),
        {"features": shape(16, 16, 16), "labels": shape(16, dtype=jnp.int32)},
    ),
    "texture_vae step": lambda dtype: step(
        texture_vae_task(Network("texture_vae", VAE | {"compute_dtype": dtype}), TextureVAELoss()),
        {"pixels": shape(16, 16, 16, 3), "labels": shape(16, dtype=jnp.int32)},
    ),
    **{
        f"semantic_vae {arch}": lambda dtype, arch=arch: gradients(
            Network("semantic_vae", SEMANTIC | {"arch": arch, "compute_dtype": dtype}), shape(2, 16, 16)
        )
        for arch in ("mlp", "resnet")
    },
    **{
        f"dinov2 {ffn}, {registers} registers": lambda dtype, ffn=ffn, registers=registers: gradients(
            Network("dinov2", DINO | {"ffn": ffn, "num_registers": registers, "compute_dtype": dtype}),
            shape(2, 10, 15, 3),
        )
        for ffn, registers in (("mlp", 4), ("swiglu", 0))
    },
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_every_product_of_float32_is_float32(name, dtype):
    programs = PROGRAMS[name](dtype)
    found = [product for program in np.atleast_1d(programs) for product in products(program)]
    assert found and {kind for kind, _ in found} <= {"f32", "bf16"}
    # In bfloat16 networks too, some products are float32 by design (patches, times, modulation, the last layer).
    assert all(highest for kind, highest in found if kind == "f32"), found
    if dtype == "float32":
        assert {kind for kind, _ in found} == {"f32"}
    else:
        fast = [highest for kind, highest in found if kind == "bf16"]
        assert fast and not any(fast)


@pytest.mark.parametrize(
    "name, fields, images",
    [
        ("inception", {}, [shape(2, 32, 32, 3)]),
        ("lpips", dict(channels=(4, 6, 8, 8, 8)), [shape(2, 32, 32, 3)] * 2),
    ],
)
def test_networks_that_are_always_float32(name, fields, images):
    found = products(gradients(Network(name, fields), *images))
    assert len(found) > 20 and set(found) == {("f32", True)}


def test_metrics_on_the_device():
    mmd = lower(_unbiased_mmd, shape(8, 4), shape(8, 4))
    block = shape(8, 4), shape(8), shape(8)
    smallest = _merge_smallest.trace(shape(8, 4), shape(8, 4), *block, *block, half=True)
    for program in (mmd, smallest.lower(lowering_platforms=("tpu",))):
        assert set(products(program)) == {("f32", True)}
