"""Quality against network evaluations on a demo's trained digits model, for every solver.

  python scripts/benchmarks/nfe_curve.py --demo=demo_out --out=nfe_curve.json [--plot=docs/nfe_curve.png]
      [--seeds=0,1,2] [--images=250] [--guidance=autoguidance] [--solvers=euler,ab2]

A point is a solver with an NFE budget (dopri5: with a tolerance) and a seed. It makes `--images` digits with the
demo's own networks and guidance 1.5 and measures them as the demo does: the fraction classified as their label by the
support vector classifier, and the Frechet distance to the held-out digits in the demo's encoder. All points of a
seed start from the same noise and labels, so they differ only by the solver. Seed s uses the samples from index
s * images on, with noise seed 0. Few images raise every Frechet distance; the row of equally many real training
digits shows by how much.

Finished points are kept in --out, and the same command continues; other settings are refused. Prints the table:
mean over the seeds, and half the range between the least and the greatest.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import numpy as np

# Beyond 32 network evaluations only Euler still changes. Methods with several evaluations a step start where each of
# the three stages has one step.
BUDGETS = {
    "ab2": (6, 8, 16, 32),
    "midpoint": (6, 8, 16, 32),
    "heun": (6, 8, 16, 32),
    "rk4": (12, 16, 32),
    "euler": (4, 8, 16, 32, 100),
}
RTOLS = (1e-2, 1e-3, 1e-4)  # of staged dopri5, atol 1e-6
RELEASED = (4, 8, 16, 32, 100)  # NFE of the released Euler


def settings() -> list[dict]:
    """Return the points of all curves, as fields of SampleConfig."""
    points = [dict(solver="dopri5", mode="staged", rtol=rtol) for rtol in RTOLS]
    points += [dict(solver="dopri5", mode="released", rtol=1e-3)]
    points += [dict(solver=s, mode="staged", nfe=n) for s, budgets in BUDGETS.items() for n in budgets]
    return points + [dict(solver="euler", mode="released", nfe=n) for n in RELEASED]


def key(point: dict) -> tuple:
    return tuple(point.get(field) for field in ("solver", "mode", "nfe", "rtol", "seed"))


class Judge:
    """The demo's metrics, and its networks to sample from."""

    def __init__(self, folder: Path, guidance: str, images: int):
        from sfd_jax.data.digits import digits_8x8
        from sfd_jax.evaluation.evaluate import gather
        from sfd_jax.evaluation.features import Extractor, class_token
        from sfd_jax.evaluation.image_sets import image_set_of
        from sfd_jax.experiment.config_files import load_config
        from sfd_jax.experiment.demo import judge
        from sfd_jax.experiment.demo.stages import Demo

        self.demo = Demo(load_config("configs/digits.py"), folder)
        self.guidance, self.images = guidance, images
        self.reader = judge.train_judge(*digits_8x8("train"))
        network, params, _ = self.demo.open("encoder")
        self.extractor = Extractor("digits encoder", params, class_token(network, self.demo.config.data.image_size))
        self._gather = lambda images: gather(
            image_set_of("digits", images), [self.extractor], keep_features=[False], batch_size=250
        )[0][0]
        self.reference = self._gather(self.demo.images("held_out")[0])
        self.checkpoints = {name: self.demo.open(name).weights for name in ("diffusion", "texture_vae", "weak")}

    def sampler(self, point: dict):
        from sfd_jax.generation import SampleConfig, make_sampler

        guided = {} if self.guidance == "none" else {"guidance_scale": 1.5}
        config = SampleConfig(guidance=self.guidance, **guided, **point)
        weak = self.checkpoints["weak"] if self.guidance == "autoguidance" else None
        return make_sampler(self.checkpoints["diffusion"], self.checkpoints["texture_vae"], config, weak=weak)

    def sample(self, sampler, seed: int) -> dict:
        """Return a point's numbers for a seed."""
        indices = np.arange(seed * self.images, (seed + 1) * self.images)
        labels = indices % sampler.num_classes
        start = time.perf_counter()
        images, nfe = sampler(indices, labels)
        return {
            "nfe": int(nfe.max()),
            "mean_nfe": float(nfe.mean()),
            **self.values(images, labels),
            "seconds": round(time.perf_counter() - start, 2),
        }

    def values(self, images: np.ndarray, labels: np.ndarray) -> dict:
        from sfd_jax.evaluation.evaluate import measure
        from sfd_jax.experiment.demo import judge

        distance = measure(self._gather(images), self.reference, None, ("fid",))["fid"]
        return {"read_as_label": judge.accuracy(self.reader, images, labels), "frechet_distance": float(distance)}

    def real(self, seed: int) -> dict:
        """Measure as many real training digits."""
        images, labels = self.demo.images("train")
        chosen = np.random.default_rng(seed).permutation(len(images))[: self.images]
        return self.values(images[chosen], labels[chosen])


def run(args, wanted: list[dict]) -> dict:
    """Measure the points that are not in the file yet; write the file after each."""
    from sfd_jax.files import write_json

    about = {"demo": demo_hash(args.demo), "guidance": args.guidance, "scale": 1.5, "images": args.images}
    record = json.loads(args.out.read_text()) if args.out.exists() else {"about": about, "points": []}
    if record["about"] != about:
        sys.exit(f"{args.out} holds points of {record['about']}, this is {about}: give another --out")
    done = {key(point) for point in record["points"]}
    judges = None
    for point in [dict(solver="real", mode="digits"), *wanted]:
        missing = [seed for seed in args.seeds if key(point | {"seed": seed}) not in done]
        if not missing:
            continue
        judges = judges or Judge(args.demo, args.guidance, args.images)
        sampler = None if point["solver"] == "real" else judges.sampler(point)
        for seed in missing:
            values = judges.real(seed) if sampler is None else judges.sample(sampler, seed)
            record["points"].append({**point, "seed": seed, **values})
            write_json(args.out, record)
            print(json.dumps(record["points"][-1]), flush=True)
    return record


def demo_hash(folder: Path) -> str:
    """Return the digest of the diffusion model's parameters."""
    from sfd_jax.experiment.checkpoints import open_checkpoint
    from sfd_jax.models.fingerprint import params_hash

    return params_hash(open_checkpoint(folder / "diffusion").params)


def summarise(record: dict, seeds: list[int]) -> list[dict]:
    """Return a row for each setting: means over the seeds and half ranges."""
    groups: dict[tuple, list[dict]] = {}
    for point in record["points"]:
        if point["seed"] in seeds:
            groups.setdefault(key(point | {"seed": None}), []).append(point)
    rows = []
    for (solver, mode, budget, rtol, _), points in groups.items():
        row = {"solver": solver, "mode": mode, "budget": budget, "rtol": rtol, "seeds": len(points)}
        for name in ("nfe", "mean_nfe", "read_as_label", "frechet_distance"):
            values = [point[name] for point in points if name in point]
            if values:
                row[name], row[name + "_spread"] = float(np.mean(values)), float(np.ptp(values) / 2)
        rows.append(row)
    return rows


def print_table(rows: list[dict]) -> None:
    print(f"\n{'solver':<10}{'mode':<11}{'setting':>8}{'NFE':>7}{'right label':>18}{'Frechet distance':>20}")
    for row in rows:
        setting = row["budget"] or (f"{row['rtol']:.0e}" if row["rtol"] else "")
        nfe = f"{row['nfe']:.0f}" if "nfe" in row else ""
        label = f"{row['read_as_label']:.1%} +- {row['read_as_label_spread']:.1%}"
        distance = f"{row['frechet_distance']:.2f} +- {row['frechet_distance_spread']:.2f}"
        print(f"{row['solver']:<10}{row['mode']:<11}{setting:>8}{nfe:>7}{label:>18}{distance:>20}")


def plot(rows: list[dict], path: Path) -> None:
    """Plot Frechet distance and accuracy against network evaluations, one curve for each solver."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2))
    panels = (
        ("frechet_distance", "Frechet distance to held-out digits", 1),
        ("read_as_label", "classified as their label, %", 100),
    )
    curves = {(row["solver"], row["mode"]) for row in rows if row["solver"] != "real"}
    colours = dict(zip(("euler", "heun", "midpoint", "rk4", "ab2", "dopri5"), plt.cm.tab10.colors, strict=False))
    for axis, (name, title, factor) in zip(axes, panels, strict=True):
        for solver, mode in sorted(curves, key=lambda c: (c[1] != "staged", c[0])):
            own = sorted((r for r in rows if (r["solver"], r["mode"]) == (solver, mode)), key=lambda r: r["nfe"])
            x, y, spread = (np.array([r[k] for r in own]) for k in ("nfe", name, name + "_spread"))
            style = dict(fmt="o-", ms=4) if mode == "staged" else dict(fmt="s--", ms=5, mfc="none")
            label = solver + ("" if mode == "staged" else ", as released")
            axis.errorbar(
                x, factor * y, factor * spread, color=colours[solver], label=label, lw=1.3, capsize=2, **style
            )
        for row in (r for r in rows if r["solver"] == "real"):
            axis.axhline(factor * row[name], color="grey", lw=1, ls=":", label="real training digits")
        axis.set(xscale="log", xlabel="network evaluations", title=title)
        axis.set_xticks([4, 8, 16, 32, 64, 100], ["4", "8", "16", "32", "64", "100"])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")
    axes[0].yaxis.set_major_formatter("{x:.3g}")
    axes[0].yaxis.set_minor_formatter("{x:.3g}")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> int:
    """Measure, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--demo", type=Path, required=True, help="work folder of a finished demo")
    flag("--out", type=Path, required=True, help="JSON file of the points; points in it are not measured again")
    flag("--plot", type=Path, help="PNG file (needs matplotlib)")
    flag("--seeds", type=lambda s: [int(x) for x in s.split(",")], default=[0, 1, 2])
    flag("--images", type=int, default=250, help="images of each point, one batch (default: %(default)s)")
    flag("--guidance", choices=("none", "cfg", "autoguidance"), default="autoguidance")
    flag("--solvers", type=lambda s: s.split(","), help="only these")
    args = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    args.demo, args.out = args.demo.absolute(), args.out.absolute()
    rows = summarise(run(args, [p for p in settings() if not args.solvers or p["solver"] in args.solvers]), args.seeds)
    print_table(rows)
    if args.plot:
        plot(rows, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
