"""Images a second of the forward pass and of the training step, beside a plain PyTorch module of the same network.

  python scripts/benchmarks/train_step.py --versus=torch [--size=XL] [--batch=64] [--dtype=bfloat16] [--json=FILE]

The defaults are the project's targets: XL/1 in bfloat16 with 64 images on a GPU or TPU, B/1 in float32 with 4 images
on a CPU. Ours is the step that `sfd train` runs: draws, loss, gradient, AdamW, EMA, norms and the guard against
numbers that are not finite. PyTorch's (torch_dit.py) has the same weights through our converter and does the same
work with its fast paths: fused attention, AdamW over lists, autocast, and torch.compile where that works. Outputs,
losses and gradients of up to 8 images are compared before anything is timed. All contenders share one device's memory:
a PyTorch contender that does not fit beside the others is left out, with a note.

Model FLOPs are those of the matmuls, three times the forward pass's for a step (without recomputation by remat).
Utilisation is relative to the rate of a large matmul of this dtype, which is measured first.
"""

import dataclasses
import functools

import numpy as np
from _common import (
    draw_params,
    finish,
    make_parser,
    matrix_rate,
    need,
    peak_memory,
    seconds,
    share_memory,
    spread,
    table,
    take_turns,
)

# Relative to the largest value: rounding of the dtype, after 12 to 28 blocks.
SAME = {"float32": 1e-4, "bfloat16": 1e-1}
COMPARED = 8  # images, which take little memory beside the training state


def main() -> None:
    parser = make_parser(__doc__)
    flag = parser.add_argument
    flag("--size", help="S, B, L, XL, 1p0B or 1p6B; B on a CPU, XL elsewhere")
    flag("--batch", type=int, help="4 on a CPU, 64 elsewhere")
    flag("--dtype", choices=["float32", "bfloat16"], help="of the matmuls; float32 on a CPU, bfloat16 elsewhere")
    flag("--depth", type=int, help="another number of blocks")
    flag("--width", type=int, help="another width")
    flag("--repa", action="store_true", help="with REPA's projector and loss")
    flag("--remat", help="none, dots, full, or auto: what fits; none on a CPU, auto elsewhere; only ours")
    flag("--blocks", choices=["loop", "unrolled"], help="instead of the choice of execution.py; only ours")
    flag("--attention", choices=["plain", "cudnn"], help="instead of the choice of execution.py; only ours")
    flag("--no_compile", action="store_true", help="PyTorch without torch.compile")
    args = parser.parse_args()
    if args.versus:
        need("torch")
    share_memory()
    import jax

    from sfd_jax.distributed import make_mesh
    from sfd_jax.execution import choose_execution
    from sfd_jax.models import Network, dit_config, kernels

    cpu = jax.default_backend() == "cpu"
    args.size = args.size or ("B" if cpu else "XL")
    args.batch = args.batch or (4 if cpu else 64)
    args.dtype = args.dtype or ("float32" if cpu else "bfloat16")
    args.remat = args.remat or ("none" if cpu else "auto")
    overrides = {name: value for name in ("depth", "width") if (value := getattr(args, name))}
    config = dit_config(
        args.size,
        compute_dtype=args.dtype,
        repa_features=768 if args.repa else 0,
        **overrides,
    )
    network = Network("lightning_dit", config)
    data = draw_data(config, args.batch)
    mesh = make_mesh(devices=jax.devices()[:1])
    execution = choose_execution(
        mesh,
        scan=args.blocks and args.blocks == "loop",
        remat=args.remat,
        rows=args.batch,
        kept_by_dots=config.kept_by_dots,
    )
    if args.attention:
        attention = {"plain": kernels.tuned_attention, "cudnn": kernels.cudnn_attention}[args.attention]
        execution = dataclasses.replace(execution, attention=attention)
    ours = Ours(network, data, mesh, execution)
    contenders, notes, first = {"sfd_jax": ours}, [], {}
    if args.versus:
        theirs = Theirs(network, data)
        notes.append(compare(ours, theirs, SAME[args.dtype]))
        first |= first_calls("sfd_jax", ours)  # JAX takes its memory before PyTorch caches the rest
        # Compiled PyTorch first: it needs less memory.
        others = {} if args.no_compile else {"torch compiled": Theirs(network, data, share=theirs)}
        for name, contender in (others | {"torch eager": theirs}).items():
            calls, fault = try_out(name, contender)
            first |= calls
            contenders |= {} if fault else {name: contender}
            notes += [fault] if fault else []
    report(contenders, first, config, args, notes)
    if args.versus and len(contenders) == 1:
        raise SystemExit("nothing of PyTorch's ran, the numbers are ours alone")


def draw_data(config, batch: int) -> dict[str, np.ndarray]:
    """Draw a batch, and the noise and times for the comparison of both losses."""
    random = np.random.default_rng(0)
    shape = (batch, config.input_size, config.input_size, config.in_channels)
    data = {
        "latents": random.standard_normal(shape, dtype=np.float32),
        "labels": random.integers(0, config.num_classes, batch).astype(np.int32),
        "noise": random.standard_normal(shape, dtype=np.float32),
        "t": random.uniform(0.05, 0.95, batch).astype(np.float32),
    }
    if config.repa_features:
        tokens = (config.input_size // config.patch_size) ** 2
        data["repa_features"] = random.standard_normal((batch, tokens, config.repa_features), dtype=np.float32)
    return data


class Ours:
    """Forward pass and training step of this project, each as a blocking call."""

    def __init__(self, network, data, mesh, execution):
        import jax

        from sfd_jax.diffusion.clocks import FixedOffset
        from sfd_jax.diffusion.losses import Draws, LossConfig, velocity_loss
        from sfd_jax.latents import LatentLayout
        from sfd_jax.models.execution import executing
        from sfd_jax.training import OptimizerConfig, TrainConfig, make_optimizer, make_train_step
        from sfd_jax.training.diffusion import diffusion_task
        from sfd_jax.training.state import state_from_params
        from sfd_jax.training.step import trace_train_step

        self.network, self.data = network, data
        repa = network.config.repa_features > 0
        layout, clocks = LatentLayout(32, network.config.in_channels - 32), FixedOffset(0.3)
        loss_config = LossConfig(repa_weight=1.0 if repa else 0.0)
        self.batch = {name: data[name] for name in ("latents", "labels", "repa_features") if name in data}
        self.batch = jax.device_put(self.batch)
        config = TrainConfig(OptimizerConfig(), global_batch_size=len(data["labels"]))
        optimizer = make_optimizer(config.optimizer, config.steps)
        task = diffusion_task(network, layout, clocks, loss_config)
        # The step donates its state, so parameters are drawn again where they are needed.
        self.state = state_from_params(draw_params(network), optimizer, mesh)
        self._step = make_train_step(task, optimizer, config, mesh, execution)
        self.trace = functools.partial(trace_train_step, task, optimizer, config, mesh, self.batch)
        self._key = jax.random.key(0)

        t_semantic, t_texture = clocks.training_times(data["t"])
        self._inputs = (data["noise"], t_semantic, t_texture, data["labels"])
        self._inputs = jax.device_put(self._inputs)

        def apply(params, *inputs, **options):
            with executing(execution):
                return network.apply(params, *inputs, **options)

        self._apply = jax.jit(apply)

        few = {name: array[:COMPARED] for name, array in data.items()}

        def loss(params):
            draws = Draws(few["noise"], few["t"], few["labels"])
            terms = velocity_loss(
                lambda *inputs: apply(params, *inputs, return_repa=repa),
                few["latents"],
                draws,
                layout=layout,
                clocks=clocks,
                config=loss_config,
                repa_features=few.get("repa_features"),
            )
            return terms.total.mean()

        self._loss_and_grads = jax.jit(jax.value_and_grad(loss))

    def forward(self):
        import jax

        return jax.block_until_ready(self._apply(self.state.ema_params, *self._inputs))

    def step(self):
        import jax

        self.state, metrics = self._step(self.state, self.batch, self._key)
        jax.block_until_ready((self.state, metrics))

    def answers(self):
        """Return a few images' output, their loss, and the gradient of `final/linear/kernel` and of a qkv."""
        loss, grads = self._loss_and_grads(self.state.params)
        picked = grads["final"]["linear"]["kernel"], grads["blocks"]["attention"]["qkv"]["kernel"][0]
        velocity = self._apply(self.state.params, *(x[:COMPARED] for x in self._inputs))
        return [np.asarray(x) for x in (velocity, loss, *picked)]


def first_calls(name: str, contender) -> dict[str, float]:
    """Return the seconds of the first forward pass and step, with compilation."""
    return {f"{name}: {call}": seconds(getattr(contender, call)) for call in ("forward", "step")}


def try_out(name: str, contender) -> tuple[dict[str, float], str | None]:
    """Return the first calls of a PyTorch contender, or the reason why it does not run."""
    import torch

    try:
        return first_calls(name, contender), None
    except torch.OutOfMemoryError:
        fault = f"{name} needs more memory than is left beside the others, and is left out; try a smaller --batch"
    except Exception as error:  # no compiler, no Triton, or another reason
        fault = f"{name} does not work here: {str(error).strip()[:200]}"
    contender.adamw.zero_grad(set_to_none=True)
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    return {}, fault


class Theirs:
    """The same two calls in PyTorch; with `share`, a compiled one that trains that contender's module."""

    def __init__(self, network, data, share=None):
        import torch
        from torch_dit import torch_module

        self.torch = torch
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.device == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = True
        if share is None:
            self.module = torch_module(network, draw_params(network)).to(self.device)
            self.params = list(self.module.parameters())
            self.ema = [p.detach().clone() for p in self.params]
            # One kernel for all tensors, on CPU and CUDA.
            self.adamw = torch.optim.AdamW(self.params, lr=1e-4, weight_decay=0.0, fused=True)
            self.call = self.module
        else:
            self.__dict__ |= share.__dict__
            self.call = torch.compile(share.module)
        self.repa = network.config.repa_features > 0
        to_here = lambda array: torch.from_numpy(np.ascontiguousarray(array)).to(self.device)  # noqa: E731
        self.data = {
            name: to_here(array.transpose(0, 3, 1, 2) if array.ndim == 4 else array) for name, array in data.items()
        }
        self.null_label = network.config.num_classes

    def forward(self):
        d = self.data
        with self.torch.no_grad():
            t_semantic, t_texture = self._clocks(d["t"])
            out = self.call(d["noise"], t_semantic, t_texture, d["labels"])
        self._wait()
        return out

    def step(self):
        torch, d = self.torch, self.data
        size = len(d["labels"])
        noise = torch.randn_like(d["latents"])
        t = torch.sigmoid(torch.randn(size, device=self.device))
        dropped = torch.rand(size, device=self.device) < 0.1
        labels = torch.where(dropped, torch.full_like(d["labels"], self.null_label), d["labels"])
        loss = self._loss(d, noise, t, labels)
        self.adamw.zero_grad(set_to_none=True)
        loss.backward()
        self.adamw.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.ema, [p.detach() for p in self.params], 1e-4)
        self._wait()

    def answers(self):
        few = {name: array[:COMPARED] for name, array in self.data.items()}
        self.adamw.zero_grad(set_to_none=True)
        loss = self._loss(few, few["noise"], few["t"], few["labels"])
        loss.backward()
        picked = self.module.final_layer.linear.weight.grad, self.module.blocks[0].attn.qkv.weight.grad
        with self.torch.no_grad():
            velocity = self.call(few["noise"], *self._clocks(few["t"]), few["labels"]).permute(0, 2, 3, 1)
        return [x.detach().float().cpu().numpy() for x in (velocity, loss, *(p.T for p in picked))]

    def _clocks(self, t):
        tau = 1.3 * t
        return tau.clamp(max=1.0), (tau - 0.3).clamp(min=0.0)

    def _loss(self, d, noise, t, labels):
        torch, data = self.torch, d["latents"]
        cosine = torch.nn.functional.cosine_similarity
        t_semantic, t_texture = self._clocks(t)
        texture, semantic = 32, data.shape[1] - 32
        clock = torch.cat([t_texture[:, None].expand(-1, texture), t_semantic[:, None].expand(-1, semantic)], 1)
        clock = clock[:, :, None, None]
        target = data - noise
        velocity = self.call(clock * data + (1 - clock) * noise, t_semantic, t_texture, labels, self.repa)
        if self.repa:
            velocity, projected = velocity
        error = (velocity - target) ** 2
        loss = (error[:, :texture].sum() + 2 * error[:, texture:].sum()) / error.numel()
        loss = loss + (1 - cosine(velocity, target, dim=1)).mean()
        if self.repa:
            loss = loss + (1 - cosine(projected, d["repa_features"], dim=-1)).mean()
        return loss

    def _wait(self):
        if self.device == "cuda":
            self.torch.cuda.synchronize()


def compare(ours, theirs, tolerance: float) -> str:
    """Compare output, loss and two gradients; exit where they differ."""
    names = ("output", "loss", "gradient of the last layer", "gradient of the first qkv")
    worst = {}
    for name, a, b in zip(names, ours.answers(), theirs.answers(), strict=True):
        worst[name] = float(np.abs(a - b).max() / np.abs(b).max())
    differences = ", ".join(f"{name} {value:.1e}" for name, value in worst.items())
    if not max(worst.values()) < tolerance:
        raise SystemExit(f"the two networks do not agree ({differences}; at most {tolerance:g}): nothing is timed")
    return f"largest relative differences before timing: {differences}"


def forward_flops(config) -> float:
    """Return the FLOPs of the matmuls of one image's forward pass."""
    c = config
    d, tokens = c.width, (c.input_size // c.patch_size) ** 2
    hidden = int(2 / 3 * int(d * c.mlp_ratio))
    patch = c.patch_size**2 * c.in_channels
    weights = c.depth * (4 * d * d + 3 * d * hidden) + 2 * patch * d  # of every token
    if c.repa_features:
        weights += d * c.repa_width + c.repa_width**2 + c.repa_width * c.repa_features
    once = (6 * c.depth + 2) * d * d + 256 * d + d * d // 2  # modulation and clocks, once an image
    attention = c.depth * 2 * tokens * d  # logits and values, a token
    return 2.0 * (tokens * (weights + attention) + once)


def report(contenders, earlier, config, args, notes) -> None:
    rate = matrix_rate(args.dtype)
    calls = {f"{name}: {call}": getattr(c, call) for call in ("forward", "step") for name, c in contenders.items()}
    times, first = take_turns(calls, args.rounds, warm=1)
    first |= earlier
    flops = forward_flops(config)
    rows, ratios, details = [], {}, {}
    for name, each in times.items():
        work = flops * args.batch * (3 if name.endswith("step") else 1)
        used = f"{100 * work / each['median'] / rate:.0f} %"
        rows.append(
            [
                name,
                each["median"],
                spread(each),
                args.batch / each["median"],
                used,
                first[name],
            ]
        )
        details[name] = f"{used} of a large matmul's rate"
        contender, _, call = name.partition(": ")
        if contender != "sfd_jax":
            ratios[name] = each["median"] / times[f"sfd_jax: {call}"]["median"]
    head = ["contender", "seconds", "spread", "images/s", "FLOP utilisation", "first call, s"]
    tables = [
        f"{args.size}/{config.patch_size}, depth {config.depth}, width {config.width}, batch {args.batch}, "
        f"{args.dtype}, {args.rounds} rounds in turns; large matmul {rate / 1e12:.2f} TFLOP/s",
        table(head, rows),
    ]
    if ratios:
        tables.append(
            table(["speed of sfd_jax over", "ratio of medians"], [[n, f"{r:.2f}"] for n, r in ratios.items()])
        )
    memory = peak_memory()
    notes.append("peak GiB: " + ", ".join(f"{name} {value:.2f}" for name, value in memory.items()))
    record = {
        "benchmark": "train_step",
        "settings": {k: v for k, v in vars(args).items() if k != "json"},
        "seconds": times,
        "first_call": first,
        "matmul_flops_per_second": rate,
        "forward_flops_per_image": flops,
        "ratios": ratios,
        "details": details,
        "peak_gib": memory,
    }
    finish(record, tables, notes, args.json)


if __name__ == "__main__":
    main()
