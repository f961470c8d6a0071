"""A door that trains the toy on all hosts, and gets into the trouble that the environment variable TROUBLE names.

TROUBLE is "phase:what", e.g. "step:stop" or "save:kill"; it comes over process SUFFERER (default 1).
"""

import os
import signal
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1] / "training")]

from sfd_jax.cli.main import open_door  # noqa: E402
from sfd_jax.errors import SfdError  # noqa: E402

PHASE, _, WHAT = os.environ.get("TROUBLE", "").partition(":")
SUFFERS = os.environ.get("SUFFERER", "1") == os.environ.get("JAX_PROCESS_ID", "0")
SIGNALS = {"stop": signal.SIGSTOP, "kill": signal.SIGKILL, "term": signal.SIGTERM}


def trouble(phase: str) -> None:
    if phase == PHASE and SUFFERS:
        if WHAT in SIGNALS:
            os.kill(os.getpid(), SIGNALS[WHAT])
        else:
            raise {"error": ValueError("a bug"), "fault": SfdError("a disk is missing")}[WHAT]


def main(argv: list[str]) -> int:
    trouble("flags")
    from sfd_jax.distributed import host_rows, hosts, make_mesh, sharding
    from sfd_jax.distributed.preflight import Job

    folder, steps = os.environ["RUN"], int(os.environ.get("END", "8"))
    hosts.start(Job({"config": {"steps": steps}}, folder, needs=(os.environ.get("NEEDS"),)))
    import jax
    import numpy as np
    from toy_training import toy_batches, toy_config, toy_task

    from sfd_jax.training import Checkpointer, Task, fit

    sharding.MIN_ELEMENTS = 1
    task, save, mesh = toy_task(), Checkpointer.save, make_mesh(2, -1)
    rows = host_rows(mesh, 16)

    def batches(start):
        for step, batch in enumerate(toy_batches()(start), start + 1):
            if step == 6:
                trouble("step")
            if steps > 100:  # a run that only a signal ends need not hurry
                time.sleep(0.01)
            yield {name: array[rows] for name, array in batch.items()}

    def init(key):
        trouble("compile")
        time.sleep(2 if PHASE == "compile" else 0)
        return task.init(key)

    def save_in_trouble(self, step, *args):
        save(self, step, *args)
        if step == 4:
            trouble("save")

    def evaluate(state, step):
        if step == 4:
            trouble("evaluate")
        return {}

    Checkpointer.save = save_in_trouble
    config = toy_config(steps=steps, checkpoint_every=2)
    state = fit(
        Task("toy", None, init, task.loss), batches, config, folder, mesh=mesh, evaluate=evaluate, progress=False
    )
    kernel = jax.jit(lambda x: x, out_shardings=sharding.replicated(mesh))(state.params["hidden"]["kernel"])
    if hosts.is_host0():
        np.save(Path(folder) / "kernel.npy", np.asarray(kernel))
    return 0


if __name__ == "__main__":
    sys.exit(open_door(main, "train", sys.argv[1:]))
