"""The training loss with given noise and time, its gradients, and three steps of training."""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from sfd_jax.convert import lightning_dit
from sfd_jax.convert.table import to_their_keys
from sfd_jax.diffusion.losses import Draws, LossConfig, LossTerms, velocity_loss
from sfd_jax.distributed import make_mesh
from sfd_jax.models import Network
from sfd_jax.parity.check import Check, relative_error, rounding_neighbours, worst_of
from sfd_jax.parity.dit import clocks_of, layout_of, load_dit
from sfd_jax.parity.pack import Case
from sfd_jax.training.optimizer import OptimizerConfig, make_optimizer
from sfd_jax.training.state import TrainState, state_from_params
from sfd_jax.training.step import TrainConfig, make_train_step, mean_metrics
from sfd_jax.training.task import Task

# bfloat16 measured on CPU: terms 3e-4, gradients 2e-2, parameters 1.4e-2; with a margin for other backends.
TERMS_BOUND = {"float32": 1e-5, "bfloat16": 5e-3}
GRADIENT_BOUND = {"float32": 1e-4, "bfloat16": 1e-1}
TRAIN_BOUND = {"float32": 1e-4, "bfloat16": 1e-1}
RUNS = 8

# The three settings of the case `loss`. They are not in its JSON; these reproduce the answers.
SETTINGS = {
    "sfd": LossConfig(semantic_weight=2.0, repa_kind="cos"),
    "mse": LossConfig(semantic_weight=1.0, repa_kind="mse"),
    "cos_mse": LossConfig(semantic_weight=0.5, repa_kind="cos_mse"),
}


def check_loss(case: Case, dtype: str) -> Iterator[Check]:
    """Compare the terms of the loss per sample, and the gradient of every parameter."""
    network, params = load_dit(case, dtype)
    batch = _batch(case, "")

    def total(params):
        terms = _loss(case, network, params, batch, SETTINGS["sfd"])
        return terms.total.mean(), terms

    (_, terms), gradients = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
    for name, config in SETTINGS.items():
        if name != "sfd":
            terms = jax.jit(lambda p, config=config: _loss(case, network, p, batch, config))(params)
        for ours, theirs in (("velocity", "loss"), ("cosine", "cos_loss"), ("repa", "repa_loss")):
            error = relative_error(getattr(terms, ours), case.array(f"out_{name}_{theirs}"))
            yield Check(case.name, f"{name}: {ours} term", error, TERMS_BOUND[dtype])
    released = case.arrays("grad_")
    error, worst = worst_of(_by_released_key(network, gradients), released)
    yield Check(case.name, "gradient, worst parameter", error, GRADIENT_BOUND[dtype], worst)


def check_train(case: Case, dtype: str) -> Iterator[Check]:
    """Compare training steps: losses, gradient norms, parameters and their EMA.

    Adam's first update of a parameter is its gradient divided by the gradient's magnitude. Where the
    gradient is only rounding (5e-9, when the largest is 5e-2), so is the update: runs whose weights
    differ by one unit in the last place end 5e-5 to 1.4e-4 apart. As for the adaptive solver, the
    closest of a few such runs counts.
    """
    network, params = load_dit(case, dtype)
    train = _trainer(case, network)
    released = {prefix: case.arrays(prefix) for prefix in ("after_", "ema_")}
    runs = []
    for state, metrics in map(train, rounding_neighbours(params, RUNS)):
        trees = {"after_": state.params, "ema_": state.ema_params}
        worst = {prefix: worst_of(_by_released_key(network, tree), released[prefix]) for prefix, tree in trees.items()}
        runs.append((max(error for error, _ in worst.values()), metrics, worst))
        if runs[-1][0] <= TRAIN_BOUND[dtype]:
            break
    _, metrics, worst = min(runs, key=lambda run: run[0])
    for number, step in enumerate(metrics):
        for quantity in ("loss", "grad_norm"):
            error = relative_error(step[quantity], case.array(f"out_{quantity}_{number}"))
            yield Check(case.name, f"step {number + 1}: {quantity}", error, TRAIN_BOUND[dtype])
    for prefix, what in (("after_", "parameter"), ("ema_", "average")):
        error, where = worst[prefix]
        note = where if len(runs) == 1 else f"{where}; closest of {len(runs)} runs that differ by rounding"
        quantity = f"after {len(metrics)} steps, worst {what}"
        yield Check(case.name, quantity, error, TRAIN_BOUND[dtype], note)


def _trainer(case: Case, network: Network) -> Callable[[dict], tuple[TrainState, list[dict]]]:
    """Return a function from parameters to the state and the metrics after all steps of the case."""
    b1, b2 = case.get("betas")
    config = TrainConfig(
        optimizer=OptimizerConfig(
            learning_rate=case.get("lr"),
            b1=b1,
            b2=b2,
            eps=case.get("eps"),
            weight_decay=case.get("weight_decay"),
            clip_norm=case.get("max_grad_norm"),
        ),
        global_batch_size=len(case.array("in_t_0")),
        ema_decay=case.get("ema_decay"),
    )
    batches = []
    while case.has(f"in_t_{len(batches)}"):
        batches.append(jax.tree.map(jnp.asarray, _batch(case, f"_{len(batches)}")))

    def loss(params, batch, key):
        return _loss(case, network, params, batch, SETTINGS["sfd"]).total.mean(), {}

    task = Task("parity", network, network.init, loss)
    # One device, since the batch may not divide over more.
    mesh = make_mesh(devices=jax.devices()[:1])
    optimizer = make_optimizer(config.optimizer, config.steps)
    step = make_train_step(task, optimizer, config, mesh)

    def train(params):
        state, metrics = state_from_params(params, optimizer, mesh), []
        for batch in batches:
            state, step_metrics = step(state, batch, jax.random.key(0))
            metrics.append(mean_metrics(step_metrics))
        return state, metrics

    return train


def _loss(case: Case, network: Network, params, batch, config: LossConfig) -> LossTerms:
    return velocity_loss(
        lambda *args: network.apply(params, *args, return_repa=True),
        batch["data"],
        Draws(batch["noise"], batch["t"], batch["labels"]),
        layout=layout_of(case),
        clocks=clocks_of(case),
        config=config,
        repa_features=batch["features"],
    )


def _batch(case: Case, suffix: str) -> dict[str, np.ndarray]:
    features = case.images(f"in_feat{suffix}")  # (B, H, W, F)
    return {
        "data": case.images(f"in_x1{suffix}"),
        "noise": case.images(f"in_x0{suffix}"),
        "t": case.array(f"in_t{suffix}"),
        "labels": case.array(f"in_y{suffix}").astype(np.int32),
        "features": features.reshape(len(features), -1, features.shape[-1]),
    }


def _by_released_key(network: Network, tree) -> dict[str, np.ndarray]:
    tree = jax.device_get(tree)
    return dict(to_their_keys(lightning_dit.TABLE, tree, network))
