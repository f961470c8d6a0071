"""Count the FLOPs of a traced program, including loops.

XLA's cost analysis counts the body of a loop once; in the traced program the length of a scan is known. Loops that end
on a condition on the data, such as an adaptive solver's, are counted once. Unused results are not counted, such as
those that `jax.checkpoint` would recompute although they are saved.
"""

import math
from collections.abc import Sequence

from jax.extend import core


def program_flops(program: core.Jaxpr | core.ClosedJaxpr, read: Sequence[bool] | None = None) -> float:
    """Return the FLOPs of all matrix products and convolutions over all devices; multiply and add count as two.

    Args:
      program: `jaxpr` of a `jax.stages.Traced`.
      read: which of its results are used; None for all.
    """
    program = _open(program)
    read = [True] * len(program.outvars) if read is None else read
    needed = {var for var, is_read in zip(program.outvars, read, strict=True) if is_read and isinstance(var, core.Var)}
    total = 0.0
    for equation in reversed(program.eqns):
        live = [var in needed for var in equation.outvars]
        if any(live) or equation.effects:
            needed |= {var for var in equation.invars if isinstance(var, core.Var)}
            total += _equation_flops(equation, live)
    return total


def _open(program: core.Jaxpr | core.ClosedJaxpr) -> core.Jaxpr:
    return program.jaxpr if isinstance(program, core.ClosedJaxpr) else program


def _equation_flops(equation: core.JaxprEqn, live: list[bool]) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2.0 * equation.outvars[0].aval.size * math.prod(left[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel, features_out = equation.invars[1].aval, params["dimension_numbers"].rhs_spec[0]
        return 2.0 * equation.outvars[0].aval.size * kernel.size / kernel.shape[features_out]
    if name == "scan":  # the next iteration uses the carry: the results without an axis of iterations
        inner = _open(params["jaxpr"]).outvars
        carried = [one.aval.ndim == stacked.aval.ndim for one, stacked in zip(inner, equation.outvars, strict=True)]
        live = [is_carried or is_read for is_carried, is_read in zip(carried, live, strict=True)]
    inside = []
    for value in params.values():
        for part in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(part, (core.Jaxpr, core.ClosedJaxpr)):
                outputs = len(_open(part).outvars)
                inside.append(program_flops(part, live if outputs == len(live) and name != "while" else None))
    if name == "cond":
        return max(inside)
    times = {
        "scan": lambda: params["length"],
        "shard_map": lambda: params["mesh"].size,  # seen from one device
        "pallas_call": lambda: math.prod(params["grid_mapping"].grid),
    }
    return times.get(name, lambda: 1)() * sum(inside)
