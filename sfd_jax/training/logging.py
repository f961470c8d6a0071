"""What a run writes while it goes: `metrics.jsonl`, one JSON object a line, and TensorBoard event files; where
`train.wandb` names a project also to Weights & Biases.

tensorboardX writes the events whether TensorFlow is there or not: one way for everybody, where clu's writers
would need TensorFlow.

Nothing can be appended to an object of a bucket. There both files grow in a local folder, and are copied whole once a
minute and before each checkpoint: rows behind the newest checkpoint are written again by the run that goes on from it.
"""

import contextlib
import importlib.util
import json
import math
import os
import secrets
import tempfile
import time
from pathlib import Path

import numpy as np
from etils import epath

from sfd_jax.distributed import is_host0
from sfd_jax.errors import SfdError
from sfd_jax.files import copy_files, write_anywhere

COPY_EVERY = 60.0  # seconds between two copies to a bucket


class MetricsLog:
    """Append rows of metrics to both files; on hosts other than 0 write nothing."""

    def __init__(self, workdir: epath.PathLike, restored_step: int = 0, wandb: str = "", config: dict | None = None):
        """Open the files, dropping rows after `restored_step`, which a resumed run will write again.

        Args:
          workdir: folder of the run.
          restored_step: step the run goes on from; 0 for a fresh one.
          wandb: project of Weights & Biases; "" for none.
          config: shown there.

        Raises:
          SfdError: the folder cannot be written, or Weights & Biases is not installed or cannot be reached.
        """
        self._folder = epath.Path(workdir)
        self._events = self._local = self._wandb = None
        if not is_host0():
            return
        # Its SummaryWriter writes from a thread, whose faults nobody would hear of.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        try:
            rows = "".join(json.dumps(row) + "\n" for row in read_metrics(workdir) if row["step"] <= restored_step)
            write_anywhere(self._folder / "metrics.jsonl", rows)
            grow = Path(self._folder)
            if "://" in os.fspath(self._folder):
                self._local = tempfile.TemporaryDirectory(prefix="sfd_metrics_")
                grow = Path(self._local.name)
                (grow / "metrics.jsonl").write_text(rows)
            self._path, self._copied = grow / "metrics.jsonl", time.monotonic()
            (grow / "tensorboard").mkdir(exist_ok=True)
            # Two starts within one second must not share a file.
            self._events = EventsWriter(str(grow / "tensorboard" / "events"), f".{os.getpid()}")
            # Rows from here on that an earlier start wrote are void.
            restart = SessionLog(status=SessionLog.START)
            self._events.write_event(Event(wall_time=time.time(), step=restored_step + 1, session_log=restart))
        except Exception as error:
            raise SfdError(f"cannot write metrics to {self._folder}: {error}") from error
        if wandb:
            self._wandb = _start_wandb(self._folder, wandb, config)

    def write(self, step: int, values: dict[str, float | np.ndarray], *, safely: bool = False) -> None:
        """Write one row.

        Args:
          step: the step it belongs to.
          values: name to number; one that is not finite is written as null. A picture, uint8 (H, W, 3), goes to
            TensorBoard and Weights & Biases alone.
          safely: the row must have reached the folder when this returns, a bucket's too.

        Raises:
          SfdError: the row cannot be written.
        """
        if self._events is None:
            return
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import image, scalar

        row = {"step": step, "time": round(time.time(), 3)}
        pictures = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
        values = {name: value for name, value in values.items() if name not in pictures}
        row |= {name: value if math.isfinite(value) else None for name, value in values.items()}
        try:
            with self._path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            for name, value in values.items():
                self._events.write_event(Event(wall_time=row["time"], step=step, summary=scalar(name, value)))
            for name, value in pictures.items():
                summary = image(name, value, dataformats="HWC")
                self._events.write_event(Event(wall_time=row["time"], step=step, summary=summary))
            self._events.flush()
            if self._wandb:
                import wandb

                shown = {name: wandb.Image(value) for name, value in pictures.items()}
                self._wandb.log({**{name: value for name, value in row.items() if name != "step"}, **shown}, step=step)
            if self._local and safely:
                self._copy()
            elif self._local and time.monotonic() - self._copied > COPY_EVERY:
                with contextlib.suppress(Exception):  # the next one will do
                    self._copy()
        except Exception as error:  # a bucket's client has types of its own
            raise SfdError(
                f"cannot write metrics to {self._folder}: {error}; make room and run the same command again"
            ) from error

    def close(self) -> None:
        """Close the files; what a bucket lacks of them is copied, or, where it cannot be, left out.

        What the disk does not take here `write` has complained of already: it leaves nothing in a buffer.
        """
        if self._events is not None:
            with contextlib.suppress(OSError):
                self._events.close()
        if self._wandb:
            self._wandb.finish()
        if self._local:
            with contextlib.suppress(Exception):
                self._copy()
            self._local.cleanup()

    def _copy(self) -> None:
        copy_files(Path(self._local.name), self._folder)
        self._copied = time.monotonic()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def check_wandb(project: str) -> None:
    """Check that Weights & Biases is installed where a project is given.

    Raises:
      SfdError: it is not.
    """
    if project and is_host0() and importlib.util.find_spec("wandb") is None:
        raise SfdError(f"train.wandb={project} needs the package wandb: pip install wandb, or leave train.wandb empty")


def _start_wandb(folder: epath.Path, project: str, config: dict | None):
    """Start the run on Weights & Biases, or go on with it: its id is kept in the work folder."""
    import wandb

    path = folder / "wandb_id"
    try:
        if not path.exists():
            write_anywhere(path, secrets.token_hex(4))
        about = {"id": path.read_text().strip(), "name": folder.name, "config": config, "resume": "allow"}
        local = {} if "://" in os.fspath(folder) else {"dir": os.fspath(folder)}
        return wandb.init(project=project, **about, **local)
    except Exception as error:
        raise SfdError(
            f"train.wandb={project}: {error}. Log in with `wandb login`, or set WANDB_MODE=offline and upload the "
            "run later with `wandb sync`"
        ) from error


def read_metrics(workdir: epath.PathLike) -> list[dict]:
    """Return the rows of a run's `metrics.jsonl`; a last line cut short by a kill is left out."""
    rows = []
    path = epath.Path(workdir) / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
