"""Memory limit for reading an untrusted file: a multiple of its size, unless a flag allows more.

A few bytes can ask for terabytes: a stride of zero, a compressed member of zeros, a list that holds
itself twice a hundred times over. The readers of this package count every allocation here before they make it.
"""

import os
from pathlib import Path

from sfd_jax.errors import SfdError
from sfd_jax.ranges import check

EXPANSION = 32  # bytes of memory for a byte of the file; a checkpoint with optimizer moments needs 1.1
SPARE = 16 * 2**20  # bytes added to that for a file of any size
LIMIT_GIB = 64.0  # never more than this, unless the flag --max_gib allows it

_given: int | None = None


def allow(gib: float | None) -> None:
    """Let files take up to `gib` GiB, whatever their size; None for the rule above.

    Raises:
      SfdError: not a number in its range.
    """
    global _given
    check(max_gib=gib)
    _given = None if gib is None else int(gib * 2**30)


class Budget:
    """Memory that reading one file may still take.

    Args:
      path: the file.
    """

    def __init__(self, path: Path):
        self.path, self.size = path, os.path.getsize(path)
        limit = min(EXPANSION * self.size + SPARE, int(LIMIT_GIB * 2**30))
        self.total = self.left = limit if _given is None else _given

    def take(self, count: int) -> None:
        """Count `count` bytes.

        Raises:
          SfdError: that is more than is left.
        """
        self.left -= count
        if self.left < 0:
            raise SfdError(
                f"refused: '{self.path}' has {self.size:,} bytes and asks for more than the {self.total:,} bytes of "
                "memory it may take; it is damaged or malicious (if you trust it, `sfd convert --max_gib=N` allows "
                "N GiB)"
            )
