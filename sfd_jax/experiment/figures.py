"""Figures in work folders: matplotlib where it is installed, local or in a bucket."""

import contextlib
import importlib.util
import io
from collections.abc import Iterator
from typing import TYPE_CHECKING

from etils import epath

from sfd_jax.distributed import say
from sfd_jax.files import write_anywhere

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@contextlib.contextmanager
def figure(path: epath.PathLike, width: float, height: float) -> Iterator["Figure | None"]:
    """Yield a figure that is written at the end of the block; None without matplotlib, which a note says.

    Args:
      path: PNG to write, local or gs://.
      width, height: in inches.
    """
    path = epath.Path(path)
    if importlib.util.find_spec("matplotlib") is None:
        say(f"note: {path.name} is not drawn, since matplotlib is missing: pip install 'sfd_jax[demo]'")
        yield None
        return
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(width, height), layout="constrained")
    yield drawn
    drawn.savefig(buffer := io.BytesIO(), format="png", dpi=100)
    write_anywhere(path, buffer.getvalue())
