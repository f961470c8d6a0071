"""Published PyTorch checkpoints in, ours out; and back.

  sfd convert --inspect FILE
      say what a file holds, without converting
  sfd convert FILE --out=DIR [--statistics=latents_stats.pt --semantic_statistics=latents_sv_stats.pt]
      read .pt, .pth, .ckpt or .safetensors and write our checkpoint
  sfd convert DIR --export=FILE
      write our checkpoint as their file: .pt as the original code loads it (needs the extra
      `torch`), or .safetensors

Known networks: LightningDiT, Semantic VAE, texture VAE (latent-diffusion's and MAR's), DINOv2 with
registers (original and Hugging Face names), the FID Inception network. The architecture is read off
the shapes; what they do not tell is printed and can be stated with --set. No code of a file is run:
one that asks for it is refused by name. Nothing is overwritten.
"""

import json
from pathlib import Path

from sfd_jax.cli.flags import door_parser, local_path, parse_door, path
from sfd_jax.errors import SfdError
from sfd_jax.ranges import Only

RULES = (
    Only("statistics semantic_statistics semantic_channels", "out"),
    Only("set", "out inspect"),
    Only("step format", "export"),
)


def main(argv: list[str]) -> int:
    """Open the door: inspect, import or export, as the flags say."""
    parser = door_parser("convert", __doc__)
    parser.add_argument("path", type=path, help="a released file, or with --export a folder of our checkpoints")
    parser.add_argument("--inspect", action="store_true", help="only print what the file holds")
    parser.add_argument("--out", type=path, help="folder that gets our checkpoint")
    parser.add_argument("--export", type=local_path, help="file to write: NAME.pt or NAME.safetensors")
    parser.add_argument(
        "--weights",
        choices=("ema", "raw"),
        help="averaged or raw weights (default: the average where there is one)",
    )
    parser.add_argument("--statistics", type=local_path, help="latents_stats.pt, mean and std of texture latents")
    parser.add_argument("--semantic_statistics", type=local_path, help="latents_sv_stats.pt, of semantic latents")
    parser.add_argument(
        "--semantic_channels", type=int, help="semantic channels, where nothing else tells"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="state a field of the network's config that shapes do not tell, e.g. num_heads=16",
    )
    parser.add_argument("--step", type=int, help="with --export: which checkpoint (default: newest)")
    parser.add_argument(
        "--format", help="with --export: another format of the same network, e.g. dinov2_hf"
    )
    args = parse_door(parser, argv, rules=RULES)
    if [bool(args.inspect), bool(args.out), bool(args.export)].count(True) != 1:
        raise SfdError("say what to do with it: --inspect, --out=DIR or --export=FILE")
    if args.inspect:
        return _inspect(args)
    return _import(args) if args.out else _export(args)


def _inspect(args) -> int:
    from sfd_jax.convert.checkpoints import identify
    from sfd_jax.convert.weight_files import choose_state, describe, read_tree

    tree = read_tree(args.path)
    print("\n".join(describe(tree)))
    try:
        file = choose_state(tree, args.path, args.weights)
        name, module = identify(file.state, args.path)
        stored = file.stored()
        config, notes = module.read_config(file.state, _given(args), stored)
    except SfdError as error:
        print(f"not convertible as it is: {error}")
        return 0
    print(f"format {name}, {file.which} weights: " + ", ".join(f"{k} {v}" for k, v in config.items()))
    _print_notes(notes)
    return 0


def _import(args) -> int:
    from sfd_jax.convert.checkpoints import import_checkpoint
    from sfd_jax.training.checkpoint import save_params

    imported = import_checkpoint(
        args.path,
        which=args.weights,
        given=_given(args),
        texture_statistics=args.statistics,
        semantic_statistics=args.semantic_statistics,
        semantic_channels=args.semantic_channels,
    )
    save_params(args.out, imported.params, imported.metadata)
    _print_notes(imported.notes)
    network, step = imported.network, imported.metadata["step"]
    print(f"{network.name}, {network.num_params():,} parameters -> {Path(args.out) / str(step)}")
    return 0


def _export(args) -> int:
    from sfd_jax.convert.checkpoints import export_checkpoint
    from sfd_jax.convert.weight_files import write_file
    from sfd_jax.training.checkpoint import load_params

    params, metadata = load_params(args.path, args.step, args.weights or "ema")
    state, tree = export_checkpoint(params, metadata, args.format)
    write_file(args.export, state, tree)
    print(f"{metadata['network']}, {len(state)} arrays -> {args.export}")
    return 0


def _given(args) -> dict:
    given = {}
    for assignment in args.set:
        field, equals, value = assignment.partition("=")
        if not equals:
            raise SfdError(f"write --set {assignment}=VALUE")
        try:
            given[field] = json.loads(value.lower() if value in ("True", "False") else value)
        except json.JSONDecodeError:
            given[field] = value
    return given


def _print_notes(notes: list[str]) -> None:
    for note in notes:
        print(f"note: {note}")


if __name__ == "__main__":
    import sys

    from sfd_jax.cli.main import open_door

    sys.exit(open_door(main, "convert", sys.argv[1:]))
