"""Count the FLOPs of a traced program, its loops included.

XLA's own cost analysis counts the body of a loop once, however often it runs; in the traced program a scan tells its
length. A loop that ends by its data, as an adaptive solver's does, is counted once. What nobody reads, as what
`jax.checkpoint` would compute again of what it has kept, is not counted.
"""

import math
from collections.abc import Sequence

from jax.extend import core


def program_flops(program: core.Jaxpr | core.ClosedJaxpr, read: Sequence[bool] | None = None) -> float:
    """Return the FLOPs of all matrix products and convolutions over all devices, multiply and add being two.

    Args:
      program: `jaxpr` of a `jax.stages.Traced`.
      read: which of its results are read; None for all.
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
    if name == "scan":  # the next turn reads what is carried: what comes out of all turns as it does of one, unstacked
        inner = _open(params["jaxpr"]).outvars
        carried = [one.aval.ndim == all_turns.aval.ndim for one, all_turns in zip(inner, equation.outvars, strict=True)]
        live = [is_carried or is_read for is_carried, is_read in zip(carried, live, strict=True)]
    inside = []
    for value in params.values():
        for part in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(part, (core.Jaxpr, core.ClosedJaxpr)):
                outputs = len(_open(part).outvars)
                inside.append(program_flops(part, live if outputs == len(live) and name != "while" else None))
    if name == "cond":
        return max(inside)
    times = {"scan": lambda: params["length"], "shard_map": lambda: params["mesh"].size}  # seen from one device
    return times.get(name, lambda: 1)() * sum(inside)
