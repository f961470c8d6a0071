"""Run the comparisons of a pack."""

import fnmatch
import os
from collections.abc import Iterator

from sfd_jax.errors import SfdError
from sfd_jax.parity.check import Check
from sfd_jax.parity.dit import check_full, check_small
from sfd_jax.parity.losses import check_loss, check_train
from sfd_jax.parity.metrics import check_metrics
from sfd_jax.parity.networks import (
    check_dinov2,
    check_encoders,
    check_inception,
    check_keys,
    check_semantic_vae,
    check_texture_vae,
)
from sfd_jax.parity.pack import Case, case_names, pack_folders
from sfd_jax.parity.sampling import check_ode
from sfd_jax.parity.transport import check_transport

# Pattern of a case's name -> its comparison; the first match is used.
COMPARISONS = {
    "*_state_dict": check_keys,
    "dit_*": check_small,
    "full_*": check_full,
    "loss*": check_loss,
    "train*": check_train,
    "ode*": check_ode,
    "semvae_*": check_semantic_vae,
    "vae*": check_texture_vae,
    "dinov2*": check_dinov2,
    "encoders*": check_encoders,
    "inception*": check_inception,
    "metrics*": check_metrics,
    "transport*": check_transport,
}


def run_case(directory: str | os.PathLike, name: str, dtype: str = "float32") -> Iterator[Check]:
    """Compare one case of a pack.

    Args:
      directory: the pack.
      name: the case.
      dtype: "float32", or "bfloat16" for networks that compute their matmuls in it.

    Yields:
      A Check for each number, as soon as it is computed. Faults of the case itself (unreadable files,
      weights that do not fit, answers that were not compared) are Checks with a broken bound.
    """

    def broken(quantity: str, note: str) -> Check:
        return Check(name, quantity, float("inf"), 0.0, note)

    compare = next((c for pattern, c in COMPARISONS.items() if fnmatch.fnmatch(name, pattern)), None)
    if compare is None:
        yield broken("case", "no comparison is known for a case of this name")
        return
    try:
        case = Case(directory, name)
        yield from compare(case, dtype)
        for answer in case.unread():
            yield broken(answer, "this answer was not compared")
    except SfdError as error:
        yield broken("case", str(error))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        # A tampered case may be wrong in any way; it must fail without stopping the others.
        yield broken("case", f"cannot be compared: {type(error).__name__}: {error}")


def run_pack(directories: str | os.PathLike, dtype: str = "float32", only: list[str] | None = None) -> Iterator[Check]:
    """Compare all cases of a pack, or those whose names fit one of the patterns `only`.

    Args:
      directories: the pack, or several with colons between.
      dtype: as `run_case` takes it.
      only: patterns of case names.

    Raises:
      SfdError: there is no pack, or no case fits.
    """
    cases = [(folder, name) for folder in pack_folders(directories) for name in case_names(folder)]
    if only:
        cases = [(folder, name) for folder, name in cases if any(fnmatch.fnmatch(name, pattern) for pattern in only)]
    if not cases:
        raise SfdError(f"no case of '{directories}' fits {', '.join(only or ['*'])}")
    for folder, name in cases:
        yield from run_case(folder, name, dtype)
