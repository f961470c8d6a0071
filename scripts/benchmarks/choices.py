"""Time and memory of the choices in `sfd_jax/execution.py` on this device: attention, loop, remat.

  python scripts/benchmarks/choices.py [--size=XL] [--batch=64] [--dtype=bfloat16] [--json=FILE]

First attention alone, forward and with its gradient: plain, with a hand-written gradient (`tuned`), and by cuDNN where
the device has it; errors are relative to the plain form in float32. Then the whole training step under each choice, one
at a time, since a device does not hold them all; the first is repeated at the end, to show drift. What does not fit in
memory is skipped with a note. GiB are the arguments, results and temporaries of the compiled program. The JSON is
rewritten after each measurement, so that a stopped run keeps its results.
"""

import dataclasses
import json
from pathlib import Path

from _common import finish, make_parser, share_memory, spread, table, take_turns
from train_step import Ours, draw_data

REPEATS = 10  # of attention in one dispatch, since one run takes less time than its dispatch


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--size", help="B on a CPU, XL elsewhere")
    parser.add_argument("--batch", type=int, help="4 on a CPU, 64 elsewhere")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="float32 on a CPU, bfloat16 elsewhere")
    parser.add_argument("--depth", type=int, help="another number of blocks")
    parser.add_argument("--steps", type=int, help="measure only this many of the step's choices")
    args = parser.parse_args()
    share_memory()
    import jax

    from sfd_jax.distributed import make_mesh
    from sfd_jax.execution import choose_execution
    from sfd_jax.models import Network, dit_config, kernels

    jax.config.update("jax_enable_compilation_cache", False)  # a cached program may not report its memory
    cpu = jax.default_backend() == "cpu"
    args.size, args.batch = args.size or ("B" if cpu else "XL"), args.batch or (4 if cpu else 64)
    args.dtype = args.dtype or ("float32" if cpu else "bfloat16")
    depth = {"depth": args.depth} if args.depth else {}
    config = dit_config(args.size, compute_dtype=args.dtype, repa_features=0, **depth)
    mesh = make_mesh(devices=jax.devices()[:1])
    chosen = choose_execution(mesh)
    forms = {"plain": kernels.attention, "tuned": kernels.tuned_attention}
    if chosen.attention is kernels.cudnn_attention and args.dtype == "bfloat16":
        forms["cudnn"] = kernels.cudnn_attention
    *_, best = forms
    record = {"benchmark": "choices", "settings": vars(args), "seconds": {}, "ratios": {}, "details": {}}
    notes, ours, programs = [], None, {}

    def add(name, base, times, detail):
        record["seconds"][name], record["details"][name] = times, detail
        record["ratios"][name] = times["median"] / record["seconds"].get(base, times)["median"]
        if args.json:
            Path(args.json).write_text(json.dumps(record) + "\n")

    for what, form, *measured in attention(config, args, forms):
        add(f"{what}, {form}", f"{what}, plain", *measured)
    first = (False, "none", best)
    steps = [first, (False, "dots", best), (True, "dots", best), (True, "full", best)]
    steps += [(False, "none", "tuned")] * (best == "cudnn") + [first]
    for number, (scan, remat, form) in enumerate(steps[: args.steps]):
        name = f"step {number}: {'loop' if scan else 'unrolled'}, {remat}, {form}"
        execution = dataclasses.replace(chosen, scan=scan, remat=remat, attention=forms[form])
        try:
            ours = ours or Ours(Network("lightning_dit", config), draw_data(config, args.batch), mesh, execution)
            if execution not in programs:
                programs[execution] = ours.trace(execution).lower().compile()
            add(name, f"step 0: unrolled, none, {best}", *step(ours, programs[execution], args.rounds))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            notes.append(f"{name}: does not fit in memory")
            ours = None  # its state was donated to the step
    rows = [
        [name, each["median"], spread(each), record["ratios"][name], record["details"][name]]
        for name, each in record["seconds"].items()
    ]
    title = f"{args.size}, batch {args.batch}, {args.dtype}"
    finish(record, [title, table(["what", "seconds", "spread", "relative", "more"], rows)], notes, args.json)


def attention(config, args, forms):
    """Yield what and which form was measured, its seconds, and its GiB and error."""
    import jax

    tokens, width = (config.input_size // config.patch_size) ** 2, config.width // config.num_heads
    shape = (4, args.batch, tokens, config.num_heads, width)
    *qkv, gradient = jax.random.normal(jax.random.key(0), shape).astype(args.dtype)
    both = lambda form: lambda q, k, v, gradient: jax.vjp(form, q, k, v)[1](gradient)

    def differ(ours, exact):
        return float(abs(ours.astype("float32") - exact).max() / abs(exact).max())

    for what, wrap, arrays in (("forward", lambda form: form, qkv), ("with gradient", both, [*qkv, gradient])):
        exact = jax.jit(wrap(forms["plain"]))(*(x.astype("float32") for x in arrays))
        for name, form in forms.items():
            run = jax.jit(wrap(form)).lower(*arrays).compile()
            error = max(jax.tree.leaves(jax.tree.map(differ, run(*arrays), exact)))
            repeat = lambda run=run, arrays=arrays: jax.block_until_ready([run(*arrays) for _ in range(REPEATS)])
            times = take_turns({name: repeat}, args.rounds)[0][name]
            times = {key: value / REPEATS for key, value in times.items() if key != "all"}
            yield f"attention {what}", name, times, f"{needed(run):.2f} GiB, error {error:.1e}"


def step(ours, run, rounds):
    """Return the seconds of a training step, and the GiB that its program needs."""
    import jax

    def once():
        ours.state, metrics = run(ours.state, ours.batch, jax.random.key(0), ())
        jax.block_until_ready((ours.state, metrics))

    return take_turns({"": once}, rounds)[0][""], f"{needed(run):.2f} GiB"


def needed(compiled) -> float:
    """Return the GiB of a compiled program's arguments, results and temporaries."""
    memory = compiled.memory_analysis()
    own = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return (memory.argument_size_in_bytes + own + memory.temp_size_in_bytes) / 2**30


if __name__ == "__main__":
    main()
