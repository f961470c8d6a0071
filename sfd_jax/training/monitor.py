"""Speed, memory and profiles of a training run."""

import tempfile
from pathlib import Path
from typing import Any

import jax
from etils import epath

from sfd_jax.distributed import is_host0, say
from sfd_jax.errors import SfdError
from sfd_jax.files import copy_files


def speed(steps_per_second: float, batch_size: int, ideal_seconds: float | None) -> dict[str, float]:
    """Return the speed of a run for its log.

    Args:
      steps_per_second: measured.
      batch_size: over all devices.
      ideal_seconds: time of a step at the devices' peak rate; None if that is unknown.

    Returns:
      steps_per_second, images_per_second and, where it is known, mfu: the share of the devices' peak bfloat16 rate
      that the step's matrix products and convolutions take, without what is computed twice to save memory.
    """
    values = {"steps_per_second": steps_per_second, "images_per_second": steps_per_second * batch_size}
    return values | ({"mfu": steps_per_second * ideal_seconds} if ideal_seconds else {})


def device_memory() -> dict[str, float]:
    """Return the largest peak so far of memory in use among this host's devices, in GiB; {} where they do not tell."""
    known = [stats.get("peak_bytes_in_use", 0) for device in jax.local_devices() if (stats := device.memory_stats())]
    return {"peak_memory_gib": max(known) / 2**30} if any(known) else {}


class Profiler:
    """Record some steps of host 0 with JAX's profiler, for TensorBoard's profile plugin, Perfetto or XProf.

    Used as a context, so that an interrupted run ends its trace.
    """

    def __init__(self, workdir: epath.PathLike, steps: tuple[int, int] | None):
        """Set what is recorded.

        Args:
          workdir: folder of the run; the trace goes to its `profile/`.
          steps: first and last step; None records nothing.

        Raises:
          SfdError: the steps are not in order.
        """
        if steps and not 1 <= steps[0] <= steps[1]:
            raise SfdError(f"profile={steps[0]}:{steps[1]}: give the first and the last step, such as 100:103")
        self._folder, self._scratch = epath.Path(workdir) / "profile", None
        self._first, self._last = steps if steps and is_host0() else (0, 0)

    def before(self, step: int, running: Any) -> None:
        """Start the trace at its first step, once the step before is done."""
        if step == self._first:
            jax.block_until_ready(running)
            self._scratch = tempfile.TemporaryDirectory(prefix="sfd_profile_")
            jax.profiler.start_trace(self._scratch.name)

    def after(self, step: int, running: Any) -> None:
        """End the trace after its last step and copy it to the folder, which may lie in a bucket."""
        if self._scratch and step == self._last:
            jax.block_until_ready(running)
            self.__exit__()
            say(f"steps {self._first} to {self._last} are recorded: tensorboard --logdir={self._folder}")

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *exception) -> None:
        if self._scratch:
            jax.profiler.stop_trace()
            copy_files(Path(self._scratch.name), self._folder)
            self._scratch.cleanup()
            self._scratch = None
