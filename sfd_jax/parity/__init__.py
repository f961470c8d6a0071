"""Parity with the released systems: the comparisons of the tests and `sfd verify`.

A separate package because it uses all the others: networks with weights from the converter, the loss,
the training step, the samplers, the evaluation. `run.py` lists the function that compares a case of a
pack (`pack.py`) by its name; it yields a `Check` for each number.
"""

from sfd_jax.parity.check import HEADER, Check
from sfd_jax.parity.pack import Case, case_names
from sfd_jax.parity.run import COMPARISONS, run_case, run_pack

__all__ = ["COMPARISONS", "HEADER", "Case", "Check", "case_names", "run_case", "run_pack"]
