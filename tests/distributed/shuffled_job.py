"""Three steps of a small LightningDiT in one process of a job: `shuffled_job.py OUT ORDER PARTS`.

ORDER is a JSON list of the eight devices, by their place in `jax.devices()`, as they follow each other in the mesh.
"""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1] / "training")]

from test_diffusion_task import DIT, make_task  # noqa: E402

from sfd_jax.data.pipeline import make_batches  # noqa: E402
from sfd_jax.diffusion.losses import LossConfig, draw  # noqa: E402
from sfd_jax.distributed import host_rows, put_batch, replicated, sharding, start  # noqa: E402
from sfd_jax.training import OptimizerConfig, TrainConfig, make_optimizer, make_train_step  # noqa: E402
from sfd_jax.training.randomness import stream_key  # noqa: E402
from sfd_jax.training.state import state_from_params  # noqa: E402

RECORDS, ROWS, STEPS = 17, 16, 3  # a batch may hold rows of two epochs
NETWORK = dataclasses.replace(DIT, num_classes=RECORDS, repa_features=0)


class Records:
    """A source whose record i has label i."""

    def __len__(self):
        return RECORDS

    def read(self, indices, flip):
        latents = np.random.default_rng(0).standard_normal((2, RECORDS, 2, 2, 5)).astype(np.float32)
        return {"latents": latents[flip.astype(int), indices], "labels": indices.astype(np.int32)}


def drawing(task):
    """Return the task with each record's draws among its metrics, sums in which all other rows are zero.

    A metric is a pair of sums: noise and time of a record; and one bit for each record, of the dropped and of all.
    """

    def loss(params, batch, key):
        value, metrics = task.loss(params, batch, key)
        config = LossConfig(repa_weight=0.0, label_dropout=0.5)
        draws = draw(
            key, batch["latents"], batch["labels"], config=config, null_label=RECORDS, row_indices=batch["row_indices"]
        )
        for record in range(RECORDS):
            of = lambda values, mine=batch["labels"] == record: jnp.sum(jnp.where(mine, values, 0.0))
            metrics[f"draws_{record}"] = (of(draws.noise[:, 0, 0, 0]), of(draws.t))
        bits = (1 << batch["labels"]).astype(jnp.float32)  # which adds 16 of them exactly
        metrics["draws_dropped"] = (jnp.sum(jnp.where(draws.labels == RECORDS, bits, 0.0)), jnp.sum(bits))
        return value, metrics

    return dataclasses.replace(task, loss=loss)


def main(out, order, parts):
    start()
    sharding.MIN_ELEMENTS = 1  # or nothing of this size would be split
    mesh = jax.sharding.Mesh(np.array(jax.devices())[json.loads(order)].reshape(4, 2), ("data", "fsdp"))
    # With eps 1 Adam's updates are as smooth in the gradient as the gradient itself (see test_sharded_dit.py).
    config = TrainConfig(
        OptimizerConfig(learning_rate=0.1, eps=1.0),
        steps=STEPS,
        global_batch_size=ROWS,
        ema_decay=0.5,
        accumulation=int(parts),
    )
    task = drawing(make_task(NETWORK, repa_weight=0.0, label_dropout=0.5))
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda leaf: 0.3 * rng.standard_normal(leaf.shape, np.float32), task.network.abstract_params()
    )
    optimizer = make_optimizer(config.optimizer, STEPS)
    state, step = state_from_params(params, optimizer, mesh), make_train_step(task, optimizer, config, mesh)
    batches = make_batches(Records(), seed=3, global_batch_size=ROWS, rows=host_rows(mesh, ROWS), flips=True)
    whole = jax.jit(lambda tree: tree, out_shardings=replicated(mesh))
    results = {}
    for number in range(STEPS):
        batch = put_batch(batches.at(number), mesh)
        results |= {f"batch_{number}_{name}": np.asarray(x) for name, x in whole(batch).items()}
        state, metrics = step(state, batch, stream_key(5, "loss", mesh))
        results |= {f"metric_{number}_{name}": np.asarray(pair) for name, pair in metrics.items()}
    for path, leaf in jax.tree_util.tree_leaves_with_path(whole((state.params, state.ema_params))):
        results[f"params{jax.tree_util.keystr(path)}"] = np.asarray(leaf)
    if jax.process_index() == 0:
        np.savez(out, **results)


if __name__ == "__main__":
    main(*sys.argv[1:])
