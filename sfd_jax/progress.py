"""The progress bar of every long job."""

import sys
from typing import Any

from tqdm import tqdm


class ProgressBar(tqdm):
    """Show progress on stderr; rate and time left exclude the time before the first update, mostly compilation.

    In a log file the bar is written rarely.

    Args:
      before: text until the first update.
      **options: of tqdm.
    """

    def __init__(self, *, before: str = "compiling", **options: Any):
        seconds = 0.5 if sys.stderr.isatty() else 15.0
        super().__init__(**{"mininterval": seconds, "maxinterval": 2 * seconds, "dynamic_ncols": True} | options)
        self._waits = not self.disable and self.n != self.total  # a finished job does not compile
        if self._waits:
            self.set_postfix_str(before)

    def update(self, n: float = 1) -> bool | None:
        """Add `n` units of finished work."""
        if not self._waits:
            return super().update(n)
        self._waits = False
        self.n += n
        self.initial = self.last_print_n = self.n  # the rate counts from here
        self.unpause()
        self.set_postfix_str("")
        return True
