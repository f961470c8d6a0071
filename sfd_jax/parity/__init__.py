"""Parity with the released systems: the comparisons that tests and `sfd verify` both make.

A package of its own because it looks at all the others: networks and their weights through the
converter, the loss, the training step, the samplers, the evaluation. A case of a pack (`pack.py`)
is compared by the function that `run.py` lists for its name, which yields a `Check` for each number.
"""

from sfd_jax.parity.check import HEADER, Check
from sfd_jax.parity.pack import Case, case_names
from sfd_jax.parity.run import COMPARISONS, run_case, run_pack

__all__ = ["COMPARISONS", "HEADER", "Case", "Check", "case_names", "run_case", "run_pack"]
