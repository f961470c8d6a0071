"""The step: known results, and invariance to mesh, accumulation and a bad batch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_training import toy_batches, toy_config, toy_task

from sfd_jax.distributed import make_mesh, put_batch
from sfd_jax.errors import SfdError
from sfd_jax.training import Task, TrainConfig, init_state, make_optimizer, make_train_step
from sfd_jax.training.optimizer import OptimizerConfig, make_schedule
from sfd_jax.training.randomness import stream_key

TOY = toy_task()
ALONE = make_mesh(1, 1, devices=jax.devices()[:1])


@functools.lru_cache  # compiling takes most of these tests' time
def compiled(task, config, mesh):
    optimizer = make_optimizer(config.optimizer, config.steps)
    return make_train_step(task, optimizer, config, mesh), optimizer


def run(task, config, mesh, batches, steps=3):
    step, optimizer = compiled(task, config, mesh)
    state = init_state(task, optimizer, mesh, seed=7)
    key = stream_key(7, "loss", mesh)
    iterator, history = batches(0), []
    for _ in range(steps):
        batch = next(iterator)
        batch.pop("index", None)
        state, metrics = step(state, put_batch(batch, mesh), key)
        history.append(jax.device_get(metrics))
    return state, history


def test_adamw_ema_and_clipping_by_hand():
    """Two steps of the textbook recursions in numpy float64."""
    optimizer = OptimizerConfig(learning_rate=0.1, b1=0.8, b2=0.95, eps=1e-3, weight_decay=0.3, clip_norm=2.0)
    config = TrainConfig(optimizer=optimizer, steps=5, global_batch_size=2, ema_decay=0.75)
    w = np.array([0.5, -1.0, 2.0])
    slopes = [np.array([3.0, -4.0, 12.0]), np.array([0.1, 0.2, -0.3])]  # norms 13 (clipped) and 0.37 (not)
    task = Task(
        "line",
        None,
        lambda key: {"w": jnp.asarray(w, jnp.float32)},
        lambda params, batch, key: (jnp.sum(params["w"][None] * batch["g"], axis=-1).mean(), {}),
    )
    batches = lambda start: ({"g": np.stack([g, g]).astype(np.float32)} for g in slopes)
    state, history = run(task, config, ALONE, batches, steps=2)

    ema, m, v = w.copy(), 0.0, 0.0
    for t, g in enumerate(slopes, 1):
        np.testing.assert_allclose(history[t - 1]["grad_norm"][0], np.linalg.norm(g), rtol=1e-6)
        g = g * min(1.0, 2.0 / (np.linalg.norm(g) + 1e-6))
        m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g**2
        adam = (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-3)
        w = w * (1 - 0.1 * 0.3) - 0.1 * adam
        ema = 0.75 * ema + 0.25 * w
    # float32 against float64 over a dozen operations.
    np.testing.assert_allclose(state.params["w"], w, rtol=2e-6)
    np.testing.assert_allclose(state.ema_params["w"], ema, rtol=2e-6)
    assert int(state.step) == 2 and int(state.skipped) == 0


def test_the_first_moment_may_be_bfloat16():
    params, grads = {"w": jnp.float32([0.5, -1.0])}, {"w": jnp.float32([0.3, -0.7])}
    outcomes = []
    for dtype in ("float32", "bfloat16"):
        optimizer = make_optimizer(OptimizerConfig(first_moment_dtype=dtype), 1)
        updates, state = optimizer.update(grads, optimizer.init(params), params)
        adam = state[0]
        assert adam.mu["w"].dtype == dtype and adam.nu["w"].dtype == jnp.float32
        outcomes.append(updates["w"])
    np.testing.assert_allclose(*outcomes, rtol=2**-8)  # the first moment's rounding
    with pytest.raises(SfdError, match="unknown optimizer.first_moment_dtype 'float16'"):
        OptimizerConfig(first_moment_dtype="float16")


def test_ema_starts_as_the_parameters():
    state = init_state(TOY, make_optimizer(OptimizerConfig(), 1), ALONE, seed=3)
    jax.tree.map(np.testing.assert_array_equal, state.params, state.ema_params)


def test_schedules_at_their_boundaries():
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=10, warmup_fraction=0.01)
    constant = make_schedule(config, 100)
    assert [float(constant(n)) for n in (0, 5, 10, 99)] == pytest.approx([0.02, 1.01, 2.0, 2.0])
    falling = make_schedule(
        dataclasses.replace(config, schedule="constant_cosine", constant_steps=60, final_fraction=0.1), 100
    )
    # Halfway down a cosine is the mean of its ends: (1 + 0.1) / 2 of the peak.
    assert [float(falling(n)) for n in (0, 10, 60, 80, 100)] == pytest.approx([0.02, 2.0, 2.0, 1.1, 0.2])
    cosine = make_schedule(dataclasses.replace(config, schedule="cosine", warmup_steps=0), 100)
    assert [float(cosine(n)) for n in (0, 50, 100)] == pytest.approx([2.0, 1.0, 0.0], abs=1e-6)
    with pytest.raises(SfdError, match="did you mean 'cosine'"):
        make_schedule(dataclasses.replace(config, schedule="cosin"), 100)
    with pytest.raises(SfdError, match="constant_steps=200, steps=100"):
        make_schedule(dataclasses.replace(config, schedule="constant_cosine", constant_steps=200), 100)


@pytest.mark.parametrize("shape", [(1, 8), (2, 4), (8, 1)])
def test_mesh_changes_nothing_and_one_trace_suffices(shape, monkeypatch):
    # The toy's arrays are small; a rule that splits everything exercises the shardings.
    monkeypatch.setattr("sfd_jax.distributed.sharding.MIN_ELEMENTS", 1)
    traces = []
    task = TOY
    counted = dataclasses.replace(task, loss=lambda *args: (traces.append(1), task.loss(*args))[1])
    config = toy_config()
    alone, history = run(task, config, ALONE, toy_batches())
    state, spread_history = run(counted, config, make_mesh(*shape), toy_batches())
    # Reductions run in another order: a few float32 roundings over three steps.
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, jax.device_get(alone), jax.device_get(state))
    jax.tree.map(close, history, spread_history)
    assert len(traces) == 1
    kernel = state.opt_state[1][0].mu["hidden"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (5, 16 // shape[1])


def test_state_is_created_sharded(monkeypatch):
    """One jitted init makes parameters, EMA and both moments in eighths, all different."""
    monkeypatch.setattr("sfd_jax.distributed.sharding.MIN_ELEMENTS", 1)
    mesh = make_mesh(1, 8)
    state = init_state(TOY, make_optimizer(OptimizerConfig(), 1), mesh, seed=1)
    for tree in (state.params, state.ema_params, state.opt_state[0].mu, state.opt_state[0].nu):
        kernel = tree["hidden"]["kernel"]
        assert {shard.data.shape for shard in kernel.addressable_shards} == {(5, 2)}
        assert sorted(shard.index[1].start for shard in kernel.addressable_shards) == list(range(0, 16, 2))


def test_accumulation_equals_one_big_batch():
    task = TOY  # its noise depends on the row indices, so it is split with the rows
    whole, history = run(task, toy_config(), ALONE, toy_batches())
    parts, part_history = run(task, toy_config(accumulation=4), ALONE, toy_batches())
    # The mean of four means is rounded differently from one mean.
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, jax.device_get(whole), jax.device_get(parts))
    for row, part_row in zip(history, part_history, strict=True):
        mean = lambda row: {name: value / count for name, (value, count) in row.items()}
        jax.tree.map(close, mean(row), mean(part_row))


def test_a_bad_step_changes_only_the_counters():
    good, _ = run(TOY, toy_config(), ALONE, toy_batches(), steps=2)
    state, history = run(TOY, toy_config(), ALONE, toy_batches(bad_steps=(3,)), steps=3)
    same = lambda a, b: np.testing.assert_array_equal(jax.device_get(a), jax.device_get(b))
    for name in ("params", "ema_params", "opt_state"):
        jax.tree.map(same, getattr(good, name), getattr(state, name))
    assert (int(state.step), int(state.bad_steps), int(state.skipped)) == (3, 1, 1)
    assert history[2]["loss"] == (0.0, 0.0) and history[2]["skipped"] == (1.0, 1.0)

    # The next good step resets the count in a row but not the total.
    state, _ = run(TOY, toy_config(), ALONE, toy_batches(bad_steps=(2,)), steps=3)
    assert (int(state.bad_steps), int(state.skipped)) == (0, 1)


def test_too_many_bad_steps_freeze_the_state():
    """So that the loop, which checks only at log steps, cannot miss them."""
    config = toy_config(max_bad_steps=2)
    state, _ = run(TOY, config, ALONE, toy_batches(bad_steps=(2, 3)), steps=5)
    assert (int(state.bad_steps), int(state.skipped)) == (4, 4)


def test_noise_depends_on_the_step():
    """Two steps with the same batch and frozen parameters have different losses."""
    same = lambda start: iter([next(toy_batches()(0)) for _ in range(2)])
    config = toy_config(optimizer=OptimizerConfig(learning_rate=1e-30))
    _, history = run(TOY, dataclasses.replace(config), ALONE, same, steps=2)
    assert history[0]["loss"] != history[1]["loss"]


def test_batch_that_does_not_divide_is_refused():
    config = toy_config(global_batch_size=12, accumulation=2)
    optimizer = make_optimizer(config.optimizer, config.steps)
    with pytest.raises(SfdError, match="global_batch_size=12 .* 8 devices .*accumulation=2"):
        make_train_step(TOY, optimizer, config, make_mesh(8, 1))
