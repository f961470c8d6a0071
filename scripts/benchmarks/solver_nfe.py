"""Network evaluations (NFE) and error of dopri5: `released` beside `staged` mode, by stage.

  python scripts/benchmarks/solver_nfe.py --pack=DIR [--networks=3] [--seeds=0,1,2] [--out=FILE]
  python scripts/benchmarks/solver_nfe.py --demo=demo_out [--guidance=autoguidance] [--batch_size=64]
      [--grids=25,50,100]    # also the solvers with fixed steps, in staged mode, at these NFE budgets

The systems are the parity pack's small network and further ones of its kind (other seeds of its weights), and a
demo's trained digits model with its weaker model; each without guidance, with classifier-free guidance and with
AutoGuidance, scale 1.5. Both modes start from the same noise. `released` mode has atol 1e-6 and rtol 1e-3 and one
step size for the batch. The NFE is that of the whole batch, so that of a staged batch is its slowest sample's;
`mean` is the average over its samples.

The last table combines the batches of a kind, since the released controller's result on a single batch is chance.
Errors are against a much finer solution (rk4, `--reference` evaluations per unit of time; a tight dopri5 shows how
accurate it is): root mean square of the difference over that of the solution, and largest over largest.
"""

import argparse
import functools
import itertools
import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

GUIDANCE = ("none", "cfg", "autoguidance")
SCALE = 1.5
GRIDS = ("euler", "midpoint", "heun", "rk4", "ab2")


class System(NamedTuple):
    """A problem to integrate: networks with parameters, clocks and layout."""

    name: str
    network: object
    params: dict
    weak: object
    weak_params: dict
    layout: object
    clocks: object

    @property
    def shape(self) -> tuple[int, int, int]:
        c = self.network.config
        return c.input_size, c.input_size, c.in_channels

    def velocity_fn(self, kind: str, params: dict, weak_params: dict, labels):
        """Return the velocity function of a kind of guidance."""
        from sfd_jax.diffusion import guidance

        apply = functools.partial(self.network.apply, params)
        if kind == "cfg":
            null = self.network.config.num_classes
            return guidance.classifier_free(apply, labels, null_label=null, scale=SCALE, layout=self.layout)
        if kind == "autoguidance":
            weak = functools.partial(self.weak.apply, weak_params)
            return guidance.autoguidance(apply, weak, labels, layout=self.layout, scale=SCALE)
        return guidance.conditional(apply, labels)


def pack_systems(pack: str, networks: int) -> list[System]:
    """Return the pack's system, and `networks` more with weights from other seeds."""
    from sfd_jax.parity.dit import clocks_of, layout_of, load_dit
    from sfd_jax.parity.pack import Case

    systems = []
    for i in range(1 + networks):
        case = Case(pack, "ode")
        if i:
            case.spec["seed"], case.spec["weak_seed"] = 1000 + 2 * i, 1001 + 2 * i
        network, params = load_dit(case, "float32")
        weak, weak_params = load_dit(case, "float32", "weak_config", "weak_params", "weak_seed")
        name = "pack" if i == 0 else f"pack's kind {i}"
        systems.append(System(name, network, params, weak, weak_params, layout_of(case), clocks_of(case)))
    return systems


def demo_system(folder: str) -> System:
    """Return a finished demo's trained models."""
    from sfd_jax.experiment.checkpoints import open_checkpoint
    from sfd_jax.generation.parts import clocks_of
    from sfd_jax.latents import LatentLayout

    model, weak = (open_checkpoint(Path(folder) / name, "lightning_dit") for name in ("diffusion", "weak"))
    layout = LatentLayout(**model.metadata["config"]["latents"])
    return System("digits", *model[:2], *weak[:2], layout, clocks_of(model.metadata))


def compile_solver(system: System, kind: str, **settings):
    """Return (params, weak_params, noise, labels) -> (latents, stats), compiled."""
    import jax

    from sfd_jax.diffusion.sampling import SolverConfig, sample

    solver = SolverConfig(**settings)

    @jax.jit
    def run(params, weak_params, noise, labels):
        velocity_fn = system.velocity_fn(kind, params, weak_params, labels)
        return sample(velocity_fn, noise, layout=system.layout, clocks=system.clocks, solver=solver)

    return run


def errors(latents: np.ndarray, answer: np.ndarray) -> dict[str, float]:
    difference, answer = np.asarray(latents, np.float64) - answer, np.asarray(answer, np.float64)
    rms = np.sqrt(np.mean(difference**2) / np.mean(answer**2))
    return {"rms": float(rms), "max": float(np.abs(difference).max() / np.abs(answer).max())}


def measure(systems: list[System], kind: str, args) -> list[dict]:
    """Measure systems that differ only in their weights, so that each solver is compiled once."""
    tolerances = dict(atol=args.atol, rtol=args.rtol)
    steps = round(args.reference * systems[0].clocks.tau_end / 4)
    solvers = {
        "reference": dict(solver="rk4", num_steps=steps + 1),
        "tight": dict(atol=1e-8, rtol=1e-5),
        "released": dict(mode="released"),
        "staged": tolerances,
    }
    grids = {f"{name} {nfe}": dict(solver=name, nfe=nfe) for name in GRIDS for nfe in args.grids}
    solvers |= grids
    runs = {name: compile_solver(systems[0], kind, **settings) for name, settings in solvers.items()}
    rows = []
    for system, seed in itertools.product(systems, args.seeds):
        random = np.random.default_rng([seed, 7])
        noise = random.standard_normal((args.batch_size, *system.shape)).astype(np.float32)
        labels = random.integers(0, system.network.config.num_classes, args.batch_size).astype(np.int32)
        answers = {name: run(system.params, system.weak_params, noise, labels) for name, run in runs.items()}
        exact = np.asarray(answers["reference"][0])
        row = {"system": system.name, "guidance": kind, "seed": seed, "batch_size": args.batch_size}
        row["reference_error"] = errors(answers["tight"][0], exact)
        for name in ("released", "staged"):
            latents, stats = answers[name]
            own = np.asarray(stats.sample_nfe).sum(axis=1)
            row[name] = {
                "error": errors(latents, exact),
                "nfe": int(stats.nfe),
                "by_stage": [int(n) for n in stats.nfe_by_stage],
                "mean": float(own.mean()),
                "mean_by_stage": [float(n) for n in np.asarray(stats.sample_nfe).mean(axis=0)],
            }
        row["share_of_nfe"] = row["staged"]["nfe"] / row["released"]["nfe"]
        row["share_of_error"] = {k: row["staged"]["error"][k] / row["released"]["error"][k] for k in ("rms", "max")}
        row["grids"] = {
            name: {"nfe": int(answers[name][1].nfe), "error": errors(answers[name][0], exact)} for name in grids
        }
        rows.append(row)
        print(describe(row), flush=True)
        for name, grid in row["grids"].items():
            print(f"  {name:<14}NFE {grid['nfe']:>4}, error {grid['error']['rms']:.1e}")
    return rows


def summarise(rows: list[dict]) -> dict[str, dict]:
    """Return, by system and guidance, mean NFE and root mean square errors over the seeds.

    One batch says little: how far the released controller steps over a breakpoint of the clocks is chance, so that
    from one seed to the next its NFE differs by a factor of two and its error by ten. The range is that of the
    single batches' shares.
    """
    groups: dict[str, list[dict]] = {}
    for row in rows:
        kind = "digits" if row["system"] == "digits" else "pack's kind"
        groups.setdefault(f"{kind}, {row['guidance']}", []).append(row)
    summary = {}
    for name, group in groups.items():
        nfe = {mode: float(np.mean([row[mode]["nfe"] for row in group])) for mode in ("released", "staged")}
        error = {
            mode: float(np.sqrt(np.mean([row[mode]["error"]["rms"] ** 2 for row in group])))
            for mode in ("released", "staged")
        }
        nfe_shares = [row["share_of_nfe"] for row in group]
        error_shares = [row["share_of_error"]["rms"] for row in group]
        summary[name] = {
            "batches": len(group),
            "nfe": nfe
            | {
                "share": nfe["staged"] / nfe["released"],
                "range": f"{min(nfe_shares):.0%}..{max(nfe_shares):.0%}",
            },
            "error_rms": error
            | {
                "share": error["staged"] / error["released"],
                "range": f"{min(error_shares):.3f}..{max(error_shares):.3f}",
            },
        }
    return summary


HEADER = (
    f"{'system':<15}{'guidance':<13}{'seed':>4}  {'released: NFE':<22}{'error':>8}  {'staged: NFE':<20}{'mean':>6}"
    f"{'error':>9}  {'NFE':>6}{'error rms':>10}{'max':>6}"
)


def describe(row: dict) -> str:
    nfe = [f"{row[mode]['nfe']} = {'+'.join(map(str, row[mode]['by_stage']))}" for mode in ("released", "staged")]
    share = row["share_of_error"]
    return (
        f"{row['system']:<15}{row['guidance']:<13}{row['seed']:>4}  "
        f"{nfe[0]:<22}{row['released']['error']['rms']:>8.1e}"
        f"  {nfe[1]:<20}{row['staged']['mean']:>6.1f}{row['staged']['error']['rms']:>9.1e}  "
        f"{row['share_of_nfe']:>6.0%}{share['rms']:>10.2f}{share['max']:>6.2f}"
    )


def main() -> int:
    """Print the table, and write it as JSON if --out is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--pack", help="folder of the parity pack")
    flag("--networks", type=int, default=3, help="further networks of the pack's kind (default: %(default)s)")
    flag("--demo", help="work folder of a finished demo")
    flag("--guidance", choices=GUIDANCE, action="append", help="only this kind; repeatable")
    flag("--seeds", type=lambda s: [int(x) for x in s.split(",")], default=[0, 1, 2], help="of noise and labels")
    flag("--batch_size", type=int, default=64)
    flag("--atol", type=float, default=1e-6, help="of staged mode (default: %(default)s)")
    flag("--rtol", type=float, default=1e-3, help="of staged mode (default: %(default)s)")
    flag("--reference", type=int, default=800, help="NFE per unit of time of the reference (default: %(default)s)")
    flag("--grids", type=lambda s: [int(x) for x in s.split(",")], default=[], help="NFE budgets of fixed steps")
    flag("--out", type=Path, help="JSON file")
    args = parser.parse_args()
    if not (args.pack or args.demo):
        parser.error("give --pack=DIR, --demo=DIR, or both")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

    groups = [pack_systems(args.pack, args.networks)] if args.pack else []
    groups += [[demo_system(args.demo)]] if args.demo else []
    print(HEADER)
    rows = [row for systems in groups for kind in args.guidance or GUIDANCE for row in measure(systems, kind, args)]
    summary = summarise(rows)
    print(
        f"\n{'all batches':<28}{'NFE: released':>16}{'staged':>8}{'share':>7}{'(range)':>15}{'error: released':>17}"
        f"{'staged':>9}{'share':>7}{'(range)':>15}"
    )
    for kind, row in summary.items():
        nfe, error = row["nfe"], row["error_rms"]
        print(
            f"{kind:<28}{nfe['released']:>16.1f}{nfe['staged']:>8.1f}{nfe['share']:>7.0%}{nfe['range']:>15}"
            f"{error['released']:>17.1e}{error['staged']:>9.1e}{error['share']:>7.3f}{error['range']:>15}"
        )
    if args.out:
        args.out.write_text(json.dumps({"summary": summary, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
