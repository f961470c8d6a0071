"""A small task with all that a loop handles: noise from the key, metrics, and batches by step."""

import jax
import jax.numpy as jnp
import numpy as np

from sfd_jax.randomness import normal_by_row
from sfd_jax.training import OptimizerConfig, Task, TrainConfig

INPUTS, HIDDEN, OUTPUTS = 5, 16, 3


def toy_task(noise: float = 0.1, scale: float = 1.0) -> Task:
    """Regression with one hidden layer and input noise drawn from the step's key."""

    def init(key):
        first, second = jax.random.split(key)
        return {
            "hidden": {"kernel": jax.random.normal(first, (INPUTS, HIDDEN)), "bias": jnp.zeros(HIDDEN)},
            "out": {"kernel": scale * jax.random.normal(second, (HIDDEN, OUTPUTS)) / 4},
        }

    def loss(params, batch, key):
        x = batch["x"] + noise * normal_by_row(key, batch["row_indices"], batch["x"].shape[1:])
        hidden = jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"][None])
        error = jnp.square(hidden @ params["out"]["kernel"] - batch["y"]).sum(-1)
        high = batch["x"][:, 0] > 0
        return error.mean(), {"error": error.mean(), "error_high": (jnp.sum(error * high), jnp.sum(high))}

    return Task("toy", None, init, loss)


def toy_batches(rows: int = 16, bad_steps: tuple[int, ...] = ()):
    """Return batches(start_step), each a function of its step; steps in `bad_steps` hold a NaN."""

    def batches(start):
        step = start
        while True:
            step += 1
            rng = np.random.default_rng(step)
            x = rng.standard_normal((rows, INPUTS)).astype(np.float32)
            y = np.sin(x[:, :OUTPUTS])
            if step in bad_steps:
                x[0, 0] = np.nan
            yield {"x": x, "y": y, "index": np.arange(rows)}

    return batches


def toy_config(**changes) -> TrainConfig:
    optimizer = OptimizerConfig(learning_rate=0.01, weight_decay=0.1, clip_norm=1.0)
    settings = {
        "optimizer": optimizer,
        "steps": 6,
        "global_batch_size": 16,
        "ema_decay": 0.9,
        "log_every": 1,
        "checkpoint_every": 2,
    }
    return TrainConfig(**{**settings, **changes})
