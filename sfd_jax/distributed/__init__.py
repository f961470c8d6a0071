"""Many chips and hosts: the mesh, one sharding rule, and the start of processes.

The mesh has two axes. The batch is split over both; parameters, optimizer moments and EMA are split over
`fsdp` and replicated over `data`. Nothing here knows a network: shardings depend only on shapes.
"""

from sfd_jax.distributed.hosts import barrier, is_host0, say, start
from sfd_jax.distributed.mesh import make_mesh
from sfd_jax.distributed.sharding import (
    batch_sharding,
    host_rows,
    param_shardings,
    put_batch,
    put_same,
    replicated,
    shard_rule,
    with_shardings,
)

__all__ = [
    "barrier",
    "batch_sharding",
    "host_rows",
    "is_host0",
    "make_mesh",
    "param_shardings",
    "put_batch",
    "put_same",
    "replicated",
    "say",
    "shard_rule",
    "start",
    "with_shardings",
]
