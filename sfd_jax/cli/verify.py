"""Compare this machine's arithmetic with a parity pack.

  sfd verify --pack=DIR[:DIR] [--dtype=float32|bfloat16] [--cases='dit_*,loss']

Runs every case of the pack through the converter and our networks, loss, training step, samplers and
evaluation on this machine's backend (CPU, GPU or TPU), and prints the error of each number against the
released answer beside its bound. The code is that of the other commands with the same dtype: samples come
from the sampler of `sfd sample --dtype`, whose texture VAE is always float32. In float32 every product is
float32 on every backend, and the bounds are those of the tests on CPU. In bfloat16 the bounds are a few times
the errors measured on CPU: they detect a broken backend, but do not show how close samples are to the released
ones. Exit status 1 if a bound is broken.

The largest cases (full_xl, full_1p0b) need about 6 GiB and minutes; --cases selects cases.
"""

from sfd_jax.cli.flags import command_parser, local_path, parse_command


def main(argv: list[str]) -> int:
    """Compare, print, and count the broken bounds."""
    parser = command_parser("verify", __doc__)
    parser.add_argument("--pack", type=local_path, required=True, help="folder of NAME.json and NAME.npz")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--cases", help="comma-separated patterns of case names (default: all)")
    args = parse_command(parser, argv)

    import jax

    from sfd_jax.parity import HEADER, run_pack

    device = jax.devices()[0]
    print(f"backend {device.platform} ({device.device_kind}), jax {jax.__version__}, {args.dtype}")
    if args.dtype == "bfloat16":
        print("bounds of bfloat16 are a few times the errors measured on CPU, not the accuracy of the released code")
    print(HEADER)
    checks = []
    for check in run_pack(args.pack, args.dtype, args.cases and args.cases.split(",")):
        checks.append(check)
        print(check, flush=True)
    broken = [check for check in checks if not check.ok]
    cases = len({check.case for check in checks})
    print(f"{cases} cases, {len(checks)} comparisons, {len(broken)} bounds broken")
    for check in broken:
        print(f"  {check.case}: {check.quantity} {check.note}".rstrip())
    return 1 if broken else 0
