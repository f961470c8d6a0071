"""One process of a job with a fault: `toy_job.py WHAT`, with the job's folder in RUN.

What happens to process SUFFERER (default 1) is TROUBLE, "phase:what", e.g. "step:kill".
"""

import os
import signal
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1] / "training")]

from sfd_jax.cli.main import run_command  # noqa: E402
from sfd_jax.errors import SfdError  # noqa: E402

PHASE, _, WHAT = os.environ.get("TROUBLE", "").partition(":")
SUFFERS = os.environ.get("SUFFERER", "1") == os.environ.get("JAX_PROCESS_ID", "0")
SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM}


def trouble(phase: str) -> None:
    if phase == PHASE and SUFFERS:
        if WHAT in SIGNALS:
            os.kill(os.getpid(), SIGNALS[WHAT])
        elif WHAT == "sleep":
            time.sleep(20)
        else:
            raise {"error": ValueError("a bug"), "fault": SfdError("a disk is missing")}[WHAT]


def count_together(_) -> None:
    """Only wait for each other, as `extract` and `evaluate` do: work that does not save."""
    trouble("flags")
    from sfd_jax.distributed import hosts
    from sfd_jax.distributed.preflight import Job

    settings = {"config": {"steps": int(os.environ.get("END", "4"))}}
    hosts.start(Job(settings, os.environ["RUN"], needs=(os.environ.get("NEEDS"),)))
    for step in range(4):
        trouble("step")
        time.sleep(0.1)  # a signal arrives
        hosts.barrier("counted", timeout=5.0 if WHAT == "sleep" else 300.0)
        hosts.say(f"step {step}")


def train(_) -> None:
    """Train the toy."""
    from sfd_jax.distributed import make_mesh, start
    from sfd_jax.distributed.preflight import Job

    start(Job(folder=os.environ["RUN"], saves=True))
    fit_toy(os.environ["RUN"], make_mesh(2, -1), int(os.environ.get("END", "8")))


def fit_toy(folder, mesh, steps: int):
    """Train the toy on this process's rows; returns the state."""
    from toy_training import toy_batches, toy_config, toy_task

    from sfd_jax.distributed import host_rows
    from sfd_jax.training import Checkpointer, Task, fit

    task, rows, save = toy_task(), host_rows(mesh, 16), Checkpointer.save

    def batches(start):
        for batch in toy_batches()(start):
            if steps > 100:  # a run that only a signal ends may be slow
                time.sleep(0.01)
            yield {name: array[rows] for name, array in batch.items()}

    def init(key):
        trouble("compile")
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
    try:
        toy, config = Task("toy", None, init, task.loss), toy_config(steps=steps, checkpoint_every=2)
        return fit(toy, batches, config, folder, mesh=mesh, evaluate=evaluate, progress=False)
    finally:
        Checkpointer.save = save


if __name__ == "__main__":
    from sfd_jax.distributed import sharding

    sharding.MIN_ELEMENTS = 1  # or nothing of this size would be split
    sys.modules["torch"] = None  # tensorboardX would import it, for seconds
    sys.exit(run_command({"count": count_together, "train": train}[sys.argv[1]], sys.argv[1], []))
