"""bf16 training stays finite: sensitive operations are float32; large latents, features and weights are fine."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_diffusion_task import DIT, make_batch, make_task

from sfd_jax.distributed import make_mesh, put_batch
from sfd_jax.models import Network, layers
from sfd_jax.training import OptimizerConfig, TrainConfig, make_optimizer, make_train_step
from sfd_jax.training.randomness import stream_key
from sfd_jax.training.state import state_from_params

BF16 = dataclasses.replace(DIT, depth=1, compute_dtype="bfloat16")
# All operations of a network in bfloat16 besides moving numbers: matmuls, bias, and the SiLU between two matmuls with
# its gradient. Norms (rsqrt), softmax (exp, reduce_max, div), the loss (sqrt) and the clocks (sin, cos) need more.
ARITHMETIC = {"dot_general", "add", "add_any", "mul", "sub", "neg", "logistic", "reduce_sum", "max"}
MOVES = {
    "broadcast_in_dim",
    "concatenate",
    "convert_element_type",
    "pad",
    "reshape",
    "slice",
    "split",
    "squeeze",
    "transpose",
    "select_n",
    "dynamic_slice",
    "dynamic_update_slice",
    "copy",
    "stop_gradient",
    "optimization_barrier",
}


def equations(jaxpr):
    """Yield the equations of a jaxpr that hold no jaxpr of their own, at any depth."""
    for equation in jaxpr.eqns:
        inner = [
            x for value in equation.params.values() for x in (value if isinstance(value, (list, tuple)) else [value])
        ]
        inner = [getattr(x, "jaxpr", x) for x in inner]
        inner = [x for x in inner if hasattr(x, "eqns")]
        for one in inner:
            yield from equations(one)
        if not inner:
            yield equation


@pytest.mark.parametrize("more", [{}, {"use_rmsnorm": False, "use_swiglu": False, "use_shift": False}])
def test_operations_in_bfloat16(more):
    task = make_task(dataclasses.replace(BF16, **more))
    batch = {**make_batch(), "row_indices": jnp.arange(16)}
    step = jax.value_and_grad(lambda params: task.loss(params, batch, jax.random.key(1))[0])
    jaxpr = jax.make_jaxpr(step)(jax.eval_shape(task.init, jax.random.key(0)))
    is_half = lambda x: getattr(x.aval, "dtype", None) == jnp.bfloat16
    half = [e for e in equations(jaxpr.jaxpr) if any(map(is_half, e.invars))]
    names = {equation.primitive.name for equation in half}
    assert "dot_general" in names  # the search includes scans and custom gradients
    allowed = ARITHMETIC | (
        {"tanh", "integer_pow", "one_minus_square"} if more else set()
    )  # GELU, the last with jax 0.11
    assert names <= allowed | MOVES, names - allowed - MOVES
    for equation in half:
        if equation.primitive.name == "reduce_sum":  # the gradient of a bias, and of nothing else
            assert equation.outvars[0].aval.ndim == 1, equation
        if equation.primitive.name == "dot_general":  # tokens; modulation and time embedding have no token axis
            assert equation.invars[0].aval.ndim >= 3, equation


def test_norms_return_float32():
    """For bfloat16 inputs too: the result is modulated next, in float32."""
    rngs, x = nnx.Rngs(0), jnp.ones((2, 4), jnp.bfloat16)
    for norm in (layers.rms_norm(4, rngs=rngs), layers.layer_norm(4, rngs=rngs), layers.group_norm(4, 2, rngs=rngs)):
        assert norm(x).dtype == jnp.float32


@pytest.fixture(scope="module")
def step():
    """(latents' scale, features' scale, weights' scale) -> (old state, new state, metrics) of one compiled step."""
    mesh = make_mesh(1, 1, devices=jax.devices()[:1])
    config = TrainConfig(OptimizerConfig(learning_rate=0.01, clip_norm=1.0), steps=5, global_batch_size=16)
    optimizer = make_optimizer(config.optimizer, config.steps)
    compiled = make_train_step(make_task(BF16), optimizer, config, mesh)
    rng = np.random.default_rng(1)
    shapes = Network("lightning_dit", BF16).abstract_params()
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), shapes)

    def run(latents, features, weights):
        batch = make_batch()
        batch["latents"] = batch["latents"] * np.float32(latents)
        batch["repa_features"] = batch["repa_features"].astype(np.float32) * np.float32(features)
        old = state_from_params(jax.tree.map(lambda x: x * np.float32(weights), params), optimizer, mesh)
        kept = jax.device_get(old)
        state, metrics = compiled(old, put_batch(batch, mesh), stream_key(5, "loss", mesh))
        return (
            kept,
            jax.device_get(state),
            {name: value[0] / max(1, value[1]) for name, value in jax.device_get(metrics).items()},
        )

    return run


@pytest.mark.slow
def test_large_numbers_stay_finite_and_too_large_ones_are_skipped(step):
    for scales in (
        (1, 1, 1),
        (1e3, 1, 1),
        (1e6, 1e6, 1),
        (1, 1, 10),
        (1e4, 1e4, 10),
        (1e12, 1, 1),
        (0, 0, 1),
        (1e-20, 1e-20, 1e-3),
    ):
        old, new, metrics = step(*scales)
        assert (int(new.skipped), int(new.bad_steps)) == (0, 0), scales
        assert all(np.isfinite(value) for value in metrics.values()), (scales, metrics)
        for tree in (new.params, new.ema_params, new.opt_state):
            assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)), scales
        assert metrics["grad_norm"] > 0 and not np.array_equal(
            *(s.params["final"]["linear"]["kernel"] for s in (old, new))
        )

    # 1e25 squared overflows float32: the step is skipped and counted, and nothing else changes.
    old, new, metrics = step(1e25, 1, 1)
    assert (int(new.step), int(new.skipped), int(new.bad_steps)) == (1, 1, 1) and metrics["skipped"] == 1
    for name in ("params", "ema_params", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(old, name), getattr(new, name))
