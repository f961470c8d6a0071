"""A pod before it is rented: the real programs compiled for a named TPU topology on any machine, and measured.

`chips.py` knows the chips and makes the devices of a topology; `programs.py` traces what the other packages run, from
shapes alone; `hlo.py` reads the compiled text; `report.py` compiles and puts the numbers side by side; `plan.py`
turns them into hours and bytes. Nothing here allocates an array or needs a TPU; libtpu, which compiles, it does.
"""

from sfd_jax.pod.chips import CHIPS, Topology, topology_devices
from sfd_jax.pod.plan import Plan, make_plan
from sfd_jax.pod.report import Measurement, measure, table

__all__ = ["CHIPS", "Measurement", "Plan", "Topology", "make_plan", "measure", "table", "topology_devices"]
