"""The rest of the released transport library, with one clock: paths, predictions, losses, flows, SDE, likelihood.

Two settings fail in the released code, so a pack has no answer for them: form "constant" with Heun, and a VP path
without given epsilons. They work here, as ordinary cases of the same functions.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from sfd_jax.diffusion.likelihood import log_likelihood
from sfd_jax.diffusion.losses import Draws, LossConfig, velocity_loss
from sfd_jax.diffusion.paths import PATHS, Path
from sfd_jax.diffusion.predictions import PREDICTIONS, velocity_from
from sfd_jax.diffusion.sample_config import SolverConfig
from sfd_jax.diffusion.sde import FORMS, Diffusion, SDEConfig, sample_sde
from sfd_jax.diffusion.solvers import Field, integrate_grid
from sfd_jax.parity.check import Check, relative_error
from sfd_jax.parity.dit import clocks_of, layout_of, load_dit
from sfd_jax.parity.pack import Case

# bfloat16 measured on CPU: up to 1.6e-3.
BOUND = {"float32": 1e-5, "bfloat16": 1e-2}
LONG_BOUND = {"float32": 1e-4, "bfloat16": 1e-1}
_SOLVERS = {"heun2": "heun"}  # torchdiffeq's names
_THEIR_FORMS = {form: form for form in FORMS} | {
    "sbdm": "SBDM",
    "increasing_decreasing": "inccreasing-decreasing",  # spelled so in the released code
}


def check_transport(case: Case, dtype: str) -> Iterator[Check]:
    """Compare every answer of the case; its name says what it is."""
    network, params = load_dit(case, dtype)
    layout, clocks, eps = layout_of(case), clocks_of(case), case.get("eps")
    labels = case.array("in_y").astype(np.int32)
    forward = jax.jit(lambda *inputs: network.apply(params, *inputs))
    apply = lambda *inputs: forward(*inputs, labels)
    start = case.images("in_z")

    def check(quantity, ours, released, bound=BOUND[dtype]):
        released = np.moveaxis(released, 1, -1) if released.ndim == 4 else released
        return Check(case.name, quantity, relative_error(ours, released), bound)

    for name in ("Linear", "GVP", "VP"):
        answers, path = case.arrays(f"out_{name}_"), PATHS[name.lower()]()
        for quantity, ours in _formulas(case, path).items():
            if quantity in answers:
                yield check(f"{name} {quantity}", ours, answers.pop(quantity), BOUND["float32"])
        for quantity in answers:
            yield Check(case.name, f"{name} {quantity}", float("inf"), 0.0, "unknown")

    def chosen(path, prediction, weight="none"):
        weights = {} if prediction == "velocity" else {"weight": weight}
        return PATHS[path.lower()](), PREDICTIONS[prediction](eps=eps, **weights)

    draws = Draws(case.images("in_x0"), case.array("in_t"), labels)
    for name, released in case.arrays("out_loss_").items():
        path, prediction = chosen(*name.split("_"))
        config = LossConfig(cosine_weight=0.0, repa_weight=0.0, path=path, prediction=prediction)
        terms = velocity_loss(forward, case.images("in_x1"), draws, layout=layout, clocks=clocks, config=config)
        yield check(f"loss {name}", terms.velocity, released)

    for name, released in case.arrays("out_ode_").items():
        path, prediction = chosen(*name.split("_"))
        velocity_fn, ode = velocity_from(apply, prediction, path, layout), case.get("ode")
        points = np.linspace(*prediction.interval(path), ode["num_steps"]).astype(np.float32)
        field = Field(lambda y, t, segment, f=velocity_fn: f(y, t, t), lambda t, segment: jnp.ones((1,) * 4))
        method = _SOLVERS.get(ode["method"], ode["method"])
        go = jax.jit(lambda z, f=field, p=points, m=method: integrate_grid(f, z, [p], method=m).final)
        yield check(f"flow {name}", go(start), released)

    noises, sde = jnp.asarray(np.moveaxis(case.array("in_noises"), 2, -1)), case.get("sde")
    for name, released in case.arrays("out_sde_").items():
        path, prediction, method, form, last_step = name.split("_")
        path, prediction = chosen(path, prediction)
        [form] = [ours for ours, theirs in _THEIR_FORMS.items() if theirs == form]
        diffusion = Diffusion(form, sde["norm"])
        config = SDEConfig(
            method.lower(), sde["num_steps"], diffusion, diffusion, last_step.lower(), sde["last_step_size"], eps
        )
        options = dict(layout=layout, clocks=clocks, path=path, config=config, first_t=prediction.interval(path)[0])
        velocity_fn = velocity_from(apply, prediction, path, layout)
        go = jax.jit(lambda z, f=velocity_fn, o=options: sample_sde(f, z, lambda step: noises[step], **o))
        yield check(f"SDE {name}", go(start), released, LONG_BOUND[dtype])

    ode, probe = case.get("likelihood"), case.images("in_eps")
    solver = SolverConfig(solver=_SOLVERS.get(ode["method"], ode["method"]), num_steps=ode["num_steps"])
    go = jax.jit(lambda x: log_likelihood(apply, x, probe, layout=layout, clocks=clocks, solver=solver))
    logp, noise = go(case.images("in_x1"))  # the same on every path, given a velocity
    for name, released in case.arrays("out_logp_").items():
        yield check(f"likelihood {name}", noise if name.startswith("z_") else logp, released, LONG_BOUND[dtype])


def _formulas(case: Case, path: Path) -> dict[str, jax.Array]:
    """Return the coefficients and conversions of a path at the case's times, by the names of its answers."""
    t, x, v = case.array("in_t_grid"), case.images("in_x"), case.images("in_v")
    wide, norm = t.reshape(-1, 1, 1, 1), case.get("diffusion_norm")
    return {
        "alpha": path.alpha(t),
        "d_alpha": path.d_alpha(t),
        "sigma": path.sigma(t),
        "d_sigma": path.d_sigma(t),
        "drift": -path.alpha_ratio(wide) * x,  # the released code returns it with this sign
        "drift_var": path.drift_variance(wide),
        "score_from_velocity": path.score_from_velocity(v, x, wide),
        "noise_from_velocity": path.noise_from_velocity(v, x, wide),
        "velocity_from_score": path.velocity_from_score(v, x, wide),
        **{f"diffusion_{theirs}": Diffusion(ours, norm)(path, wide) for ours, theirs in _THEIR_FORMS.items()},
    }
