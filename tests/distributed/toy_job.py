"""A door that trains the toy on all hosts, and gets into the trouble that the environment variable TROUBLE names.

TROUBLE is "phase:what", e.g. "step:stop" or "save:kill"; it comes over process SUFFERER (default 1), or over both.
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
SUFFERS = os.environ.get("SUFFERER", "1") in (os.environ.get("JAX_PROCESS_ID", "0"), "both")


def trouble(phase: str) -> None:
    if phase != PHASE or not SUFFERS:
        return
    if WHAT == "error":
        raise ValueError("a bug")
    if WHAT == "fault":
        raise SfdError("a disk is missing")
    os.kill(os.getpid(), getattr(signal, {"stop": "SIGSTOP", "kill": "SIGKILL", "term": "SIGTERM"}[WHAT]))


def main(argv: list[str]) -> int:
    trouble("flags")
    from sfd_jax.distributed import hosts, make_mesh, sharding
    from sfd_jax.distributed.preflight import Job

    folder = os.environ["RUN"]
    settings = {"config": {"steps": int(os.environ.get("END", "8"))}}
    hosts.start(Job(settings, folder, needs=tuple(filter(None, [os.environ.get("NEEDS")]))))
    import jax
    from toy_training import toy_batches, toy_config, toy_task

    from sfd_jax.training import fit

    sharding.MIN_ELEMENTS = 1
    index, count = jax.process_index(), jax.process_count()
    rows, task = 16 // count, toy_task()

    def batches(start):
        for step, batch in enumerate(toy_batches()(start), start + 1):
            if step == start + 4:
                trouble("step")
            if step > 8:
                time.sleep(0.01)
            yield {name: array[index * rows : (index + 1) * rows] for name, array in batch.items()}

    def init(key):
        trouble("compile")
        if PHASE == "compile":
            time.sleep(2)
        return task.init(key)

    def evaluate(state, step):
        if step == 4:
            trouble("evaluate")
        return {}

    if PHASE == "save":
        from sfd_jax.training.checkpoint import Checkpointer

        save = Checkpointer.save

        def interrupted(self, step, *args):
            save(self, step, *args)
            if step == 4:
                trouble("save")

        Checkpointer.save = interrupted
    config = toy_config(steps=settings["config"]["steps"], checkpoint_every=2)
    mesh = make_mesh(2, -1)
    state = fit(type(task)("toy", None, init, task.loss), batches, config, folder, mesh=mesh, evaluate=evaluate,
                progress=False)
    kernel = jax.jit(lambda x: x, out_shardings=sharding.replicated(mesh))(state.params["hidden"]["kernel"])
    if index == 0:
        import numpy as np

        np.save(Path(folder) / "kernel.npy", np.asarray(kernel))
    return 0


if __name__ == "__main__":
    sys.exit(open_door(main, "train", sys.argv[1:]))
