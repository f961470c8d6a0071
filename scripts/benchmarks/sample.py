"""Images a second and network evaluations of sampling with AutoGuidance, beside PyTorch with the released solver.

  python scripts/benchmarks/sample.py --versus=torch [--size=XL] [--weak_size=B] [--batch=64] [--dtype=bfloat16]
  python scripts/benchmarks/sample.py --versus=torch --checkpoint=demo_out/diffusion --weak=demo_out/weak

Ours integrates each stage on its own, in one compiled program (`diffusion/sampling.py`). PyTorch runs the same two
networks (torch_dit.py, same weights, same noise and labels, fused attention, torch.compile where it works) in
torchdiffeq's dopri5 as the released sampler does: one interval, masked velocities, atol 1e-6, rtol 1e-3. The velocities
of both networks are compared before anything is timed, and every result with a solution of the same flow at tight
tolerance in float32: the error is the root mean square of the difference over that of the solution. The target is 3
times PyTorch's speed at an equal or smaller error.

By default the weights are random: XL and B in bfloat16 with 64 images on a GPU or TPU, two S in float32 with 2 images
on a CPU. A solver's NFE depends on the weights, so trained ones (`--checkpoint`, `--weak`) are more realistic. Latents
are timed; with `--texture_vae` also images, decoding included.
"""

import dataclasses
import functools

import numpy as np
from _common import draw_params, finish, make_parser, need, peak_memory, share_memory, spread, table, take_turns

SAME = {"float32": 1e-4, "bfloat16": 1e-1}


@dataclasses.dataclass
class Problem:
    """The problem that both sides integrate: two networks with their parameters, noise and labels."""

    networks: list
    params: list
    layout: object
    clocks: object
    statistics: object
    noise: np.ndarray
    labels: np.ndarray
    scale: float


def main() -> None:
    parser = make_parser(__doc__)
    parser.set_defaults(rounds=3)
    flag = parser.add_argument
    flag("--size", help="S on a CPU, XL elsewhere")
    flag("--weak_size", help="S on a CPU, B elsewhere")
    flag("--checkpoint", help="a trained model instead of a random one of --size")
    flag("--weak", help="its weaker model")
    flag("--texture_vae", help="also decode, with this texture VAE")
    flag("--depth", type=int, help="another number of blocks, of both networks")
    flag("--batch", type=int, help="2 on a CPU, 64 elsewhere")
    flag("--dtype", choices=["float32", "bfloat16"], help="of the matmuls; float32 on a CPU, bfloat16 elsewhere")
    flag("--scale", type=float, default=1.5, help="guidance scale")
    flag("--solver", default="dopri5", help="ours: see `sfd sample --help`")
    flag("--nfe", type=int, help="ours: network evaluations, for the solvers with fixed steps")
    flag("--checked", type=int, metavar="N", help="errors of the first N images alone: the tight solution is slow")
    flag("--no_compile", action="store_true", help="PyTorch without torch.compile")
    args = parser.parse_args()
    if bool(args.checkpoint) != bool(args.weak):
        parser.error("--checkpoint and --weak go together")
    if args.versus:
        need("torch", "torchdiffeq")
    share_memory()
    import jax

    cpu = jax.default_backend() == "cpu"
    args.size, args.weak_size = args.size or ("S" if cpu else "XL"), args.weak_size or ("S" if cpu else "B")
    args.batch = args.batch or (2 if cpu else 64)
    args.dtype = args.dtype or ("float32" if cpu else "bfloat16")
    problem = make_problem(args)
    ours = Ours(problem, args)
    contenders, notes = {"sfd_jax": ours}, []
    if args.versus:
        theirs = contenders["torch eager"] = Theirs(problem)
        notes.append(compare(problem, theirs, SAME[args.dtype]))
        if not args.no_compile:
            compiled, fault = compile_torch(problem, theirs)
            contenders |= {"torch compiled": compiled} if compiled else {}
            notes += [fault] if fault else []
    report(problem, contenders, args, notes)


def make_problem(args) -> Problem:
    """Draw or load the two networks, and draw noise and labels."""
    from sfd_jax.diffusion.clocks import FixedOffset
    from sfd_jax.experiment.checkpoints import open_checkpoint
    from sfd_jax.latents import LatentLayout, LatentStatistics
    from sfd_jax.models import Network, dit_config

    networks, params, statistics = [], [], None
    for place, size in ((args.checkpoint, args.size), (args.weak, args.weak_size)):
        if place:
            opened = open_checkpoint(place, "lightning_dit", compute_dtype=args.dtype)
            statistics = statistics or LatentStatistics.from_dict(opened.metadata["latent_statistics"])
            networks.append(opened.network)
            params.append(opened.params)
        else:
            depth = {"depth": args.depth} if args.depth else {}
            networks.append(Network("lightning_dit", dit_config(size, compute_dtype=args.dtype, **depth)))
            params.append(draw_params(networks[-1], seed=len(params)))
    if statistics is None:
        zeros, ones = (lambda n: np.zeros(n, np.float32)), (lambda n: np.ones(n, np.float32))
        statistics = LatentStatistics(zeros(32), ones(32), zeros(16), ones(16))
    layout = LatentLayout(len(statistics.texture_mean), len(statistics.semantic_mean))
    config, random = networks[0].config, np.random.default_rng(0)
    shape = (args.batch, config.input_size, config.input_size, config.in_channels)
    return Problem(
        networks,
        params,
        layout,
        FixedOffset(0.3),
        statistics,
        noise=random.standard_normal(shape, dtype=np.float32),
        labels=random.integers(0, config.num_classes, args.batch).astype(np.int32),
        scale=args.scale,
    )


class Ours:
    """Sampling with this project."""

    def __init__(self, problem: Problem, args):
        import jax

        from sfd_jax.diffusion.sampling import SolverConfig
        from sfd_jax.distributed import make_mesh
        from sfd_jax.execution import choose_execution

        self.problem = problem
        self._execution = choose_execution(make_mesh(devices=jax.devices()[:1]))  # as `Sampler` has it
        solver = SolverConfig(args.solver, nfe=args.nfe)
        self._params = jax.device_put(problem.params)
        self._inputs = jax.device_put((problem.noise, problem.labels))
        self._run = jax.jit(functools.partial(self._integrate, problem.networks, solver))
        self.nfe = None

    def __call__(self):
        import jax

        latents, stats = jax.block_until_ready(self._run(self._params, *self._inputs))
        self.nfe = int(stats.nfe)
        self.nfe_by_stage = np.asarray(stats.nfe_by_stage).tolist()
        return np.asarray(latents)

    def tight(self, number: int | None = None) -> np.ndarray:
        """Solve the flow of the first `number` images in float32, to a thousandth of the usual tolerance."""
        import jax

        from sfd_jax.diffusion.sampling import SolverConfig
        from sfd_jax.models import Network

        exact = [
            Network("lightning_dit", dataclasses.replace(network.config, compute_dtype="float32"))
            for network in self.problem.networks
        ]
        run = jax.jit(functools.partial(self._integrate, exact, SolverConfig(rtol=1e-6, atol=1e-7)))
        with jax.default_matmul_precision("highest"):
            latents, stats = run(self._params, *(x[:number] for x in self._inputs))
        if not bool(stats.converged.all()):
            raise SystemExit("the tight solve did not converge, so nothing can be compared with it")
        return np.asarray(latents)

    def _integrate(self, networks, solver, params, noise, labels):
        from sfd_jax.diffusion.guidance import autoguidance
        from sfd_jax.diffusion.sampling import sample
        from sfd_jax.models.execution import executing

        p = self.problem
        main, weak = (functools.partial(n.apply, w) for n, w in zip(networks, params, strict=True))
        velocity_fn = autoguidance(main, weak, labels, layout=p.layout, scale=p.scale)
        with executing(self._execution):
            return sample(velocity_fn, noise, layout=p.layout, clocks=p.clocks, solver=solver)


class Theirs:
    """Sampling as in the released code: torchdiffeq's dopri5 over the whole interval."""

    def __init__(self, problem: Problem, share=None):
        import torch
        from torch_dit import torch_module

        self.torch, self.problem = torch, problem
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.device == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = True
        if share is None:
            pairs = zip(problem.networks, problem.params, strict=True)
            self.modules = [torch_module(*pair).to(self.device).eval() for pair in pairs]
        else:
            self.modules = [torch.compile(module) for module in share.modules]
        self.noise = torch.from_numpy(problem.noise.transpose(0, 3, 1, 2).copy()).to(self.device)
        self.labels = torch.from_numpy(problem.labels).to(self.device)
        self.nfe, self.nfe_by_stage = None, None

    def __call__(self):
        import torchdiffeq

        torch, end, offset = self.torch, self.problem.clocks.tau_end, self.problem.clocks.delta_t
        moves_semantic = torch.zeros(self.noise.shape[1], device=self.device)
        moves_semantic[self.problem.layout.texture_channels :] = 1
        self.nfe = 0

        def derivative(tau, latents):
            self.nfe += 1
            moving = (tau >= offset) * (1 - moves_semantic) + (tau <= 1) * moves_semantic
            return moving[None, :, None, None] * self.velocity(latents, tau)

        interval = torch.tensor([0.0, end], device=self.device)
        with torch.no_grad():
            path = torchdiffeq.odeint(derivative, self.noise, interval, method="dopri5", atol=1e-6, rtol=1e-3)
        return path[-1].permute(0, 2, 3, 1).cpu().numpy()

    def velocity(self, latents, tau):
        size = len(latents)
        t_semantic = tau.clamp(max=1.0).expand(size)
        t_texture = (tau - self.problem.clocks.delta_t).clamp(min=0.0).expand(size)
        main, weak = (module(latents, t_semantic, t_texture, self.labels) for module in self.modules)
        return weak + self.problem.scale * (main - weak)


def compile_torch(problem, eager):
    """Return (PyTorch's compiled contender, None), or (None, the reason why there is none)."""
    import torch

    compiled = Theirs(problem, share=eager)
    try:
        with torch.no_grad():
            compiled.velocity(compiled.noise, torch.tensor(0.5, device=compiled.device))
        return compiled, None
    except Exception as error:  # no compiler, no Triton, or another reason
        torch._dynamo.reset()
        return None, f"torch.compile does not work here, PyTorch ran only eagerly: {str(error).strip()[:200]}"


def compare(problem: Problem, theirs, tolerance: float) -> str:
    """Compare both networks' velocities at one time; exit where they differ."""
    import jax

    torch, size, worst = theirs.torch, len(problem.labels), []
    for network, params, module in zip(problem.networks, problem.params, theirs.modules, strict=True):
        times = np.full(size, 0.7, np.float32), np.full(size, 0.4, np.float32)
        ours = np.asarray(jax.jit(network.apply)(params, problem.noise, *times, problem.labels))
        with torch.no_grad():
            t_semantic, t_texture = (torch.from_numpy(t).to(theirs.device) for t in times)
            other = module(theirs.noise, t_semantic, t_texture, theirs.labels).permute(0, 2, 3, 1).cpu().numpy()
        worst.append(float(np.abs(ours - other).max() / np.abs(other).max()))
    if not max(worst) < tolerance:
        raise SystemExit(f"the networks do not agree ({worst}; at most {tolerance:g}): nothing is timed")
    return f"largest relative difference of the velocities before timing: model {worst[0]:.1e}, weak {worst[1]:.1e}"


def report(problem, contenders, args, notes) -> None:
    exact = contenders["sfd_jax"].tight(args.checked)
    error = lambda x: float(np.sqrt(np.mean((x[: len(exact)] - exact) ** 2) / np.mean(exact**2)))  # noqa: E731
    errors, nfe = {}, {}

    def timed(name, contender):
        def run():
            errors[name] = error(contender())
            nfe[name] = contender.nfe

        return run

    runs = {name: timed(name, contender) for name, contender in contenders.items()}
    if args.texture_vae:
        runs["sfd_jax, images"] = decoded(problem, args)
    times, first = take_turns(runs, args.rounds)
    rows = [
        [
            name,
            nfe.get(name, ""),
            each["median"],
            spread(each),
            args.batch / each["median"],
            f"{errors[name]:.1e}" if name in errors else "",
            first[name],
        ]
        for name, each in times.items()
    ]
    head = ["contender", "NFE", "seconds", "spread", "images/s", "error", "first call, s"]
    sizes = "trained weights" if args.checkpoint else f"{args.size} and {args.weak_size}, random weights"
    tables = [
        f"AutoGuidance {args.scale:g}, {sizes}, batch {args.batch}, {args.dtype}, {args.rounds} rounds in turns",
        table(head, rows),
    ]
    ratios = {name: times[name]["median"] / times["sfd_jax"]["median"] for name in times if name.startswith("torch")}
    if ratios:
        tables.append(
            table(["speed of sfd_jax over", "ratio of medians"], [[n, f"{r:.2f}"] for n, r in ratios.items()])
        )
    by_stage = contenders["sfd_jax"].nfe_by_stage
    notes.append(f"our NFE by stage, of the slowest sample: {by_stage}; one evaluation runs both networks once")
    memory = peak_memory()
    notes.append("peak GiB: " + ", ".join(f"{name} {value:.2f}" for name, value in memory.items()))
    record = {
        "benchmark": "sample",
        "settings": {k: v for k, v in vars(args).items() if k != "json"},
        "seconds": times,
        "first_call": first,
        "nfe": nfe,
        "nfe_by_stage": by_stage,
        "errors": errors,
        "ratios": ratios,
        "details": {name: f"{nfe[name]} NFE, error {errors[name]:.1e}" for name in nfe},
        "peak_gib": memory,
    }
    finish(record, tables, notes, args.json)


def decoded(problem: Problem, args):
    """Return a call that makes images as `sfd sample` does, decoding included."""
    from sfd_jax.experiment.checkpoints import open_checkpoint
    from sfd_jax.generation import SampleConfig, Sampler

    config = SampleConfig(solver=args.solver, nfe=args.nfe, guidance="autoguidance", guidance_scale=args.scale)
    model, weak = zip(problem.networks, problem.params, strict=True)
    sampler = Sampler(
        model,
        open_checkpoint(args.texture_vae, "texture_vae")[:2],
        weak=weak,
        config=config,
        layout=problem.layout,
        statistics=problem.statistics,
        clocks=problem.clocks,
    )
    return lambda: sampler(np.arange(args.batch), problem.labels)


if __name__ == "__main__":
    main()
