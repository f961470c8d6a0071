"""Compile the real programs for a TPU topology ahead of time, without a TPU, and measure them.

`chips.py` lists chips and makes the devices of a topology; `programs.py` traces the programs of the other packages from
shapes alone; `hlo.py` reads the compiled text; `report.py` compiles and measures; `plan.py` derives hours and bytes.
No array is allocated and no TPU is needed, but libtpu is, since it compiles.
"""

from sfd_jax.pod.chips import CHIPS, Topology, topology_devices
from sfd_jax.pod.plan import Plan, make_plan
from sfd_jax.pod.report import Measurement, comparison, measure, table

__all__ = [
    "CHIPS",
    "Measurement",
    "Plan",
    "Topology",
    "comparison",
    "make_plan",
    "measure",
    "table",
    "topology_devices",
]
