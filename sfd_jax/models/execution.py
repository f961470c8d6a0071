"""How networks are computed, apart from what they compute.

A step or a sampler chooses it for the devices it runs on (`sfd_jax.execution`) and traces inside `with executing(...)`.
Only `Network.apply` reads it and passes it to the modules, so a loss with several networks, trained and frozen, need
not handle it. Without it networks use the plain forms, on every backend.
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
    """Choose how a network is computed; the defaults are plain.

    Attributes:
      attention: (query, key, value), each (B, N, K, E), to (B, N, K, E): one of kernels.py, or like them.
      product: ((..., I), (I, O)) to (..., O), of Linear layers.
      scan: run equal blocks as one compiled loop; otherwise unrolled, which is slower to compile.
      remat: what a block keeps for the backward pass, a key of `stack.REMAT`.
      gather: a block's parameters, split over the devices, to whole ones.
      split: the output of a block, (B, ...), to the same split over the devices.
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
    """Apply `execution` to the networks that are called (under jit: traced) inside the block."""
    token = _current.set(execution)
    try:
        yield
    finally:
        _current.reset(token)


def current() -> Execution:
    """Return the execution of the innermost `executing`, or PLAIN."""
    return _current.get()
