"""How networks are computed, as against what they compute.

A step or a sampler decides it once, for the devices it runs on (`sfd_jax.execution`), and says `with executing(...)`
around what it traces; `Network.apply` hands it to the modules, and nothing else reads it. So a loss may hold any number
of networks, its own and frozen ones, and need not know. Without it networks take plain forms, on every backend.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax

from sfd_jax.models import kernels


@dataclasses.dataclass(frozen=True)
class Execution:
    """Say how a network is computed; the defaults are plain.

    Attributes:
      attention: (query, key, value), each (B, N, K, E), to (B, N, K, E): one of kernels.py, or like them.
      product: ((..., I), (I, O)) to (..., O), of Linear layers.
      scan: run equal blocks as one compiled loop; otherwise unrolled, which is slower to compile.
      remat: what a block keeps for the backward pass, a key of `stack.REMAT`.
      gather: a block's parameters, as they lie on the devices, to whole ones.
      split: what blocks pass on, (B, ...), to the same split over the devices.
    """

    attention: Callable[[jax.Array, jax.Array, jax.Array], jax.Array] = kernels.attention
    product: Callable[[jax.Array, jax.Array], jax.Array] = kernels.product
    scan: bool = True
    remat: str = "none"
    gather: Callable[[Any], Any] = lambda params: params
    split: Callable[[jax.Array], jax.Array] = lambda x: x


PLAIN = Execution()
_current = contextvars.ContextVar("execution", default=PLAIN)


@contextlib.contextmanager
def executing(execution: Execution) -> Iterator[None]:
    """Have networks computed so that are called (under jit: traced) inside."""
    token = _current.set(execution)
    try:
        yield
    finally:
        _current.reset(token)


def current() -> Execution:
    """Return what the innermost `executing` says, or PLAIN."""
    return _current.get()
