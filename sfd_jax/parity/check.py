"""Results of comparisons: case, quantity, error and bound."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Check:
    """One comparison with the released answers.

    Args:
      case: name of the case.
      quantity: what was compared.
      error: see `relative_error`; NaN and infinity break every bound.
      bound: largest allowed error.
      note: remark for readers of the table.
    """

    case: str
    quantity: str
    error: float
    bound: float
    note: str = ""

    @property
    def ok(self) -> bool:
        return bool(self.error <= self.bound)

    def __str__(self) -> str:
        verdict = "ok" if self.ok else "BROKEN"
        line = f"{self.case:<18} {self.quantity:<34} {self.error:9.2e} {self.bound:9.2e} {verdict:<6}"
        return f"{line} {self.note}".rstrip()


HEADER = f"{'case':<18} {'quantity':<34} {'error':>9} {'at most':>9}"


def relative_error(ours: jax.typing.ArrayLike, released: jax.typing.ArrayLike) -> float:
    """Return max|ours - released| / max|released|; infinity if shapes differ."""
    ours, released = np.asarray(ours, np.float64), np.asarray(released, np.float64)
    if ours.shape != released.shape:
        return float("inf")
    scale = np.abs(released).max(initial=0.0)
    return float(np.abs(ours - released).max(initial=0.0) / (scale if scale > 0 else 1.0))


def worst_of(ours: Mapping[str, Any], released: Mapping[str, Any]) -> tuple[float, str]:
    """Return the largest relative error over arrays by name, and its name; both must have the same names."""
    if differing := set(ours) ^ set(released):
        return float("inf"), f"{len(differing)} names differ: {', '.join(sorted(differing)[:3])}"
    errors = {name: relative_error(ours[name], released[name]) for name in ours}
    # NaN compares false with everything, so it needs a check.
    name = max(errors, key=lambda name: np.inf if np.isnan(errors[name]) else errors[name])
    return errors[name], name


def rounding_neighbours(tree: Any, count: int) -> Iterator[Any]:
    """Yield a tree of float32 arrays, then copies in which every number is a float32 neighbour of the original.

    For results that amplify rounding: the result from such a copy is as valid as that from the original.
    """
    yield tree
    random = np.random.default_rng(0)
    directions = np.array([-np.inf, np.inf], np.float32)
    for _ in range(count - 1):
        yield jax.tree.map(lambda x: np.nextafter(np.asarray(x), random.choice(directions, np.shape(x))), tree)
