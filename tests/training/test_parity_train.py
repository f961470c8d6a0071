"""Three steps of the published optimisation (AdamW, clipping, EMA), number by number."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sfd_jax.convert.lightning_dit import TABLE
from sfd_jax.convert.table import import_params
from sfd_jax.diffusion.clocks import make_clocks
from sfd_jax.diffusion.losses import Draws, LossConfig, velocity_loss
from sfd_jax.distributed import make_mesh, put_batch
from sfd_jax.latents import LatentLayout
from sfd_jax.models import Network
from sfd_jax.parity.pack import Case
from sfd_jax.training import OptimizerConfig, Task, TrainConfig, make_optimizer, make_train_step
from sfd_jax.training.randomness import stream_key
from sfd_jax.training.state import state_from_params


@pytest.mark.slow
def test_three_steps(parity_dir):
    case = Case(parity_dir, "train")
    theirs = case.get("config")
    same = ("input_size", "patch_size", "in_channels", "depth", "num_heads", "num_classes", "use_qknorm",
            "use_swiglu", "use_rope", "use_rmsnorm", "repa_depth")
    config = {name: theirs[name] for name in same} | {
        "width": theirs["hidden_size"],
        "use_shift": not theirs["wo_shift"],
        "repa_features": case.array("in_feat_0").shape[1],
        "repa_width": theirs["repa_projector_dim"],
    }
    network = Network("lightning_dit", config)
    params = import_params(TABLE, case.weights(), network)
    layout = LatentLayout(theirs["in_channels"] - theirs["semantic_chans"], theirs["semantic_chans"])
    clocks = make_clocks("fixed_offset", delta_t=theirs["semfirst_delta_t"])

    def loss(params, batch, key):
        terms = velocity_loss(
            lambda *inputs: network.apply(params, *inputs, return_repa=True),
            batch["data"],
            Draws(batch["noise"], batch["t"], batch["labels"]),
            layout=layout, clocks=clocks, config=LossConfig(), repa_features=batch["features"],
        )
        return terms.total.mean(), {}

    b1, b2 = case.get("betas")
    config = TrainConfig(
        OptimizerConfig(case.get("lr"), b1, b2, case.get("eps"), case.get("weight_decay"),
                        clip_norm=case.get("max_grad_norm")),
        steps=3, global_batch_size=len(case.array("in_t_0")), ema_decay=case.get("ema_decay"),
    )
    mesh = make_mesh(1, 1, devices=jax.devices()[:1])
    optimizer = make_optimizer(config.optimizer, config.steps)
    state = state_from_params(params, optimizer, mesh)
    step = make_train_step(Task("train", network, network.init, loss), optimizer, config, mesh)
    for i in range(3):
        features = case.images(f"in_feat_{i}")
        batch = {
            "data": case.images(f"in_x1_{i}"),
            "noise": case.images(f"in_x0_{i}"),
            "t": case.array(f"in_t_{i}"),
            "labels": case.array(f"in_y_{i}").astype(np.int32),
            "features": features.reshape(len(features), -1, features.shape[-1]),
        }
        with jax.default_matmul_precision("highest"):
            state, metrics = step(state, put_batch(batch, mesh), stream_key(0, "loss", mesh))
        # float32 on other kernels; the gradient's norm goes through all layers.
        np.testing.assert_allclose(metrics["loss"][0], case.array(f"out_loss_{i}"), rtol=1e-5)
        np.testing.assert_allclose(metrics["grad_norm"][0], case.array(f"out_grad_norm_{i}"), rtol=1e-4)

    for prefix, tree in (("after_", state.params), ("ema_", state.ema_params)):
        expected = import_params(TABLE, case.arrays(prefix), network)
        worst = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), tree, expected)
        # A step moves a parameter by about lr = 1e-3; where a gradient is near zero, Adam's quotient
        # amplifies rounding.
        assert max(jax.tree.leaves(worst)) < 1e-4, worst
    assert not case.unread()
