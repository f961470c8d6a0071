"""What a run writes while it goes: `metrics.jsonl`, one JSON object a line, and TensorBoard event files.

tensorboardX writes the events whether TensorFlow is there or not: one way for everybody, where clu's writers
would need TensorFlow, and it can mark the rows after a restored step as void, which they cannot.
"""

import json
import math
import os
import time

from etils import epath

from sfd_jax.distributed import is_host0
from sfd_jax.errors import SfdError


class MetricsLog:
    """Append rows of metrics to both files; on hosts other than 0 write nothing."""

    def __init__(self, workdir, restored_step: int = 0):
        """Open the files, dropping rows after `restored_step`, which a resumed run will write again.

        Args:
          workdir: folder of the run.
          restored_step: step the run goes on from; 0 for a fresh one.

        Raises:
          SfdError: the folder cannot be written.
        """
        self._path = epath.Path(workdir) / "metrics.jsonl"
        self._events = None
        if not is_host0():
            return
        from tensorboardX import SummaryWriter

        try:
            _drop_rows_after(self._path, restored_step)
            self._events = SummaryWriter(
                str(self._path.parent / "tensorboard"),
                purge_step=restored_step + 1,
                # Two starts within one second must not share a file.
                filename_suffix=f".{os.getpid()}",
            )
        except OSError as error:
            raise SfdError(f"cannot write metrics to {self._path.parent}: {error}") from error

    def write(self, step: int, values: dict[str, float]) -> None:
        """Write one row.

        Args:
          step: the step it belongs to.
          values: name to number; one that is not finite is written as null.

        Raises:
          SfdError: the row cannot be written.
        """
        if self._events is None:
            return
        row = {"step": step, "time": round(time.time(), 3)}
        row |= {name: value if math.isfinite(value) else None for name, value in values.items()}
        try:
            with self._path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            for name, value in values.items():
                self._events.add_scalar(name, value, step)
            self._events.flush()
        except OSError as error:
            raise SfdError(f"cannot write {self._path}: {error}; make room and run the same command again") from error

    def close(self) -> None:
        """Close the event file."""
        if self._events is not None:
            self._events.close()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def read_metrics(workdir) -> list[dict]:
    """Return the rows of a run's `metrics.jsonl`; a last line cut short by a kill is left out."""
    rows = []
    path = epath.Path(workdir) / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _drop_rows_after(path: epath.Path, step: int) -> None:
    rows = [row for row in read_metrics(path.parent) if row["step"] <= step]
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text("".join(json.dumps(row) + "\n" for row in rows))
    part.replace(path)
