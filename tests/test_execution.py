"""How networks are computed is chosen for the mesh's devices, and applied where they are traced."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sfd_jax.distributed import make_mesh
from sfd_jax.errors import SfdError
from sfd_jax.execution import choose_execution
from sfd_jax.models import Network, dit_config, kernels
from sfd_jax.models.execution import PLAIN, Execution, current, executing
from sfd_jax.training import TrainConfig


def mesh_of(kind="", platform="cpu", chips=1, fsdp=None, **attributes):
    device = types.SimpleNamespace(platform=platform, device_kind=kind, **attributes)
    shape = {"data": 1, "fsdp": chips if fsdp is None else fsdp}
    return types.SimpleNamespace(devices=np.array([device] * chips), size=chips, shape=shape)


def test_operations_by_backend():
    cpu, tpu = (choose_execution(mesh_of(platform=platform)) for platform in ("cpu", "tpu"))
    gpu = choose_execution(mesh_of(platform="gpu", compute_capability="9.0"))
    assert [e.attention for e in (cpu, gpu)] == [kernels.tuned_attention, kernels.cudnn_attention]
    for platform in ("tpu", "gpu"):
        mesh = mesh_of(platform=platform, compute_capability="9.0")
        assert choose_execution(mesh, fused_attention=False).attention is kernels.tuned_attention
    assert [e.product for e in (cpu, tpu, gpu)] == [kernels.cpu_product] + [kernels.product] * 2
    assert [e.scan for e in (cpu, tpu, gpu)] == [True, True, False]
    assert choose_execution(mesh_of(platform="gpu"), scan=True).scan
    # A T4 and AMD's cards have no fused attention by cuDNN.
    for capability in ("7.5", "gfx942"):
        other = choose_execution(mesh_of(platform="gpu", compute_capability=capability))
        assert other.attention is kernels.tuned_attention and not other.scan
    assert (cpu.gather, cpu.split) == (PLAIN.gather, PLAIN.split)
    split = choose_execution(mesh_of(chips=4, fsdp=1))
    assert split.gather is PLAIN.gather and split.split is not PLAIN.split


def test_remat_auto_keeps_what_fits_the_device():
    kept = dit_config("XL", compute_dtype="bfloat16").kept_by_dots

    def choice(chips, rows, kind="TPU v5 lite", platform="tpu", **more):
        mesh = mesh_of(kind, platform, chips)
        return choose_execution(mesh, remat="auto", rows=rows, kept_by_dots=kept, **more).remat

    assert choice(16, 256) == "dots" and choice(4, 256) == "full"
    assert choice(1, 16, kind="unknown") == "dots" and choice(1, 64, kind="unknown") == "full"
    assert choice(16, 16, scan=False) == "dots"  # what "none" keeps of unrolled blocks is known only for GPUs

    h100 = functools.partial(choice, kind="NVIDIA H100 80GB HBM3", platform="gpu")
    assert [h100(1, rows) for rows in (64, 128, 256)] == ["none", "dots", "full"]
    assert h100(1, 64, scan=True) == "dots"
    assert choice(1, 64, kind="NVIDIA A100-SXM4-40GB", platform="gpu") == "dots"


def test_cudnn_attention_is_used_where_supported(monkeypatch):
    took = []

    def dot_product_attention(query, key, value, *, implementation):
        took.append((query.dtype, query.shape[-1], implementation))
        return value

    monkeypatch.setattr(jax.nn, "dot_product_attention", dot_product_attention)
    # XL's head width is 72, a multiple of 8; cuDNN has no float32.
    for dtype, width in ((jnp.bfloat16, 72), (jnp.float32, 72), (jnp.bfloat16, 20), (jnp.bfloat16, 512)):
        kernels.cudnn_attention(*[jnp.ones((1, 2, 1, width), dtype)] * 3)
    assert took == [(jnp.bfloat16, 72, "cudnn")]


def test_a_tpu_attends_to_many_tokens_by_the_fused_kernel_on_each_device(monkeypatch):
    took = []

    def splash_attention(query, key, value):
        took.append(query.shape)
        return kernels.attention(query, key, value)

    monkeypatch.setattr(kernels, "splash_attention", splash_attention)
    monkeypatch.setattr("sfd_jax.execution.SPLASH_FROM", 8)
    attend = choose_execution(mesh_of(platform="tpu", chips=8)).attention.func
    for rows, tokens in ((16, 8), (16, 4), (12, 8)):  # many tokens; few; rows that the devices do not divide
        query, key, value = (jax.random.normal(jax.random.key(i), (rows, tokens, 2, 4)) for i in range(3))
        out = jax.jit(functools.partial(attend, make_mesh(2, 4)))(query, key, value)
        np.testing.assert_allclose(out, kernels.attention(query, key, value), atol=1e-6)
    assert took == [(2, 8, 2, 4)]


def test_weights_are_gathered_and_batches_split_alike(monkeypatch):
    monkeypatch.setattr("sfd_jax.distributed.sharding.MIN_ELEMENTS", 1)
    execution = choose_execution(make_mesh(2, 4))
    weights, x = jnp.arange(32.0).reshape(8, 4), jnp.ones((16, 8))

    @jax.jit
    def both(weights, x):
        f = lambda weights, x: jnp.sum(execution.split(jnp.sin(x @ execution.gather({"w": weights})["w"])))
        return jax.grad(f, (0, 1))(weights, x), jax.jvp(f, (weights, x), (weights, x)), weights

    text = both.lower(weights, x).as_text()
    assert text.count("sharding_constraint") >= 3  # gather, scatter, and the batch
    plain = lambda weights, x: jnp.sum(jnp.sin(x @ weights))
    (gradients, tangents, _) = both(weights, x)
    for a, b in zip(gradients, jax.grad(plain, (0, 1))(weights, x), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    for a, b in zip(tangents, jax.jvp(plain, (weights, x), (weights, x)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4)
    assert execution.split(x[:3]) is not None  # a batch that the devices do not divide is not split


def test_executing_reaches_the_modules_and_ends():
    network = Network("semantic_vae", dict(input_dim=4, bottleneck_dim=2, hidden_dim=4, transformer_heads=1))
    params, used = network.init(jax.random.key(0)), []

    def product(x, kernel):
        used.append(kernel.shape)
        return kernels.product(x, kernel)

    features = jnp.ones((1, 2, 4))
    with pytest.raises(KeyError), executing(Execution(product=product)):
        network.apply(params, features)
        raise KeyError
    assert (4, 12) in used and current() is PLAIN  # the queries, keys and values of a block
    count = len(used)
    network.apply(params, features)
    assert len(used) == count


def test_the_error_for_an_unknown_remat_gives_the_nearest():
    with pytest.raises(SfdError, match="'full'"):
        TrainConfig(remat="ful")
