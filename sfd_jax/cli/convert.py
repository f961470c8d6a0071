"""Convert released PyTorch checkpoints to ours, and back.

  sfd convert --inspect FILE
      print what a file holds, without converting
  sfd convert FILE --out=DIR [--statistics=latents_stats.pt --semantic_statistics=latents_sv_stats.pt]
      read weights and write our checkpoint
  sfd convert FILE --out=DIR --statistics=SD_VAE --prediction=velocity
      the same for SiT: SD_VAE is a folder of `sfd fetch sd_vae_ft_ema`, whose scaling factor is taken
  sfd convert FILE --out=DIR --statistics=SD_VAE --prediction=noise --path_type=ddpm
      the same for DiT
  sfd convert DIR --export=FILE
      write our checkpoint as a .pt file for the original code (needs the extra `torch`), or as
      .safetensors

FILE is a PyTorch file (.pt, .pth, .ckpt, .bin), a safetensors file, an index of shards (*.index.json), or a
folder that holds one of them, recognised by its content, not its name. Averaged (EMA) weights are taken if
there are any, under any name; raw ones only if there is no average or with --weights=raw.
Known networks: LightningDiT, SiT, DiT, Semantic VAE, texture VAE (latent-diffusion's, MAR's and diffusers'
AutoencoderKL, with its config.json beside the weights), DINOv2 with
registers (original and Hugging Face names), DINOv3 ViT, SigLIP 2, CLIP and MAE (Hugging Face names, with
their config.json beside the weights), the FID Inception network, LPIPS. The architecture is derived
from shapes; assumptions are printed and can be changed with --set; keys that were renamed or left out are
printed too. No code of a file is run: a file that needs it is refused. Nothing is overwritten.
"""

import json
from pathlib import Path

from sfd_jax.cli.flags import command_parser, local_path, parse_command, path
from sfd_jax.errors import SfdError
from sfd_jax.ranges import Only

RULES = (
    Only("statistics semantic_statistics semantic_channels", "out"),
    Only("set prediction", "out inspect"),
    Only("path_type", "prediction"),
    Only("step format", "export"),
)


def main(argv: list[str]) -> int:
    """Inspect, import or export."""
    from sfd_jax.budget import allow

    parser = command_parser("convert", __doc__)
    parser.add_argument("path", type=path, help="a released file, or with --export a folder of our checkpoints")
    parser.add_argument("--inspect", action="store_true", help="only print what the file holds")
    parser.add_argument("--out", type=path, help="folder for our checkpoint")
    parser.add_argument("--export", type=local_path, help="file to write: NAME.pt or NAME.safetensors")
    parser.add_argument(
        "--weights",
        metavar="ema|raw|NAME",
        help="EMA or raw weights, or the name of a set, see --inspect (default: EMA, if any)",
    )
    parser.add_argument("--allow_nonfinite", action="store_true", help="also convert weights that are NaN or infinite")
    parser.add_argument(
        "--statistics",
        type=local_path,
        help="mean and std of texture latents: latents_stats.pt, or a converted texture VAE with a scaling factor",
    )
    parser.add_argument("--semantic_statistics", type=local_path, help="latents_sv_stats.pt, of semantic latents")
    parser.add_argument(
        "--semantic_channels", type=int, help="number of semantic channels, if nothing else determines it"
    )
    parser.add_argument(
        "--prediction", choices=("velocity", "noise", "score"), help="what a diffusion network predicts, if unknown"
    )
    parser.add_argument(
        "--path_type",
        choices=("linear", "gvp", "vp", "ddpm"),
        help="with --prediction: the path that the network was trained on; ddpm is that of DiT (default: linear)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="set a field of the network's config that shapes do not determine, e.g. num_heads=16",
    )
    parser.add_argument("--step", type=int, help="with --export: which checkpoint (default: newest)")
    parser.add_argument("--format", help="with --export: another format of the same network, e.g. dinov2_hf")
    parser.add_argument(
        "--max_gib", type=float, help="memory that reading may take, for files that expand to much more than their size"
    )
    args = parse_command(parser, argv, rules=RULES)
    allow(args.max_gib)
    if [bool(args.inspect), bool(args.out), bool(args.export)].count(True) != 1:
        raise SfdError("give one of --inspect, --out=DIR and --export=FILE")
    if args.inspect:
        return _inspect(args)
    return _import(args) if args.out else _export(args)


def _inspect(args) -> int:
    from sfd_jax.convert.checkpoints import read_architecture
    from sfd_jax.convert.file_kinds import find_weights
    from sfd_jax.convert.weight_files import choose_state, describe, find_sets, read_tree

    path, kind = find_weights(args.path)
    tree = read_tree(args.path)
    print(f"{path}: {kind.what}")
    print("\n".join(describe(tree)))
    for found in find_sets(tree):
        role = {"ema": "averaged", "raw": "raw"}.get(found.which, "averaged or raw is unknown")
        print(f"weights '{found.name}': {role}, {len(found.arrays)} arrays")
    try:
        file = choose_state(tree, args.path, args.weights)
        found = read_architecture(file, args.path, _stated(args))
    except SfdError as error:
        print(f"cannot be converted as it is: {error}")
        return 0
    print(f"would convert '{file.name}': format {found.format}, {file.which} weights: {found.network.described()}")
    _print_notes(found.notes)
    return 0


def _import(args) -> int:
    from sfd_jax.convert.checkpoints import import_checkpoint
    from sfd_jax.training.checkpoint import save_params

    imported = import_checkpoint(args.path, _stated(args), allow_nonfinite=args.allow_nonfinite)
    save_params(args.out, imported.params, imported.metadata)
    _print_notes(imported.notes)
    network, step = imported.network, imported.metadata["step"]
    print(f"{network.name}, {network.num_params():,} parameters -> {Path(args.out) / str(step)}")
    return 0


def _export(args) -> int:
    from sfd_jax.convert.checkpoints import export_checkpoint
    from sfd_jax.convert.weight_files import write_file
    from sfd_jax.training.checkpoint import load_params

    if args.weights not in (None, "ema", "raw"):
        raise SfdError(f"--weights={args.weights}: our checkpoints hold 'ema' and 'raw'")
    params, metadata = load_params(args.path, args.step, args.weights or "ema")
    state, tree = export_checkpoint(params, metadata, args.format, allow_nonfinite=args.allow_nonfinite)
    write_file(args.export, state, tree)
    print(f"{metadata['network']}, {len(state)} arrays -> {args.export}")
    return 0


def _stated(args):
    from sfd_jax.convert.checkpoints import Stated

    given = {}
    for assignment in args.set:
        field, equals, value = assignment.partition("=")
        if not equals:
            raise SfdError(f"--set {assignment}: write --set {assignment}=VALUE")
        try:
            given[field] = json.loads(value.lower() if value in ("True", "False") else value)
        except json.JSONDecodeError:
            given[field] = value
    texture = _scaling_of(args.statistics) if args.statistics and Path(args.statistics).is_dir() else args.statistics
    stated = {"prediction": args.prediction, "path_type": args.path_type}
    transport = {name: value for name, value in stated.items() if value}
    return Stated(args.weights, given, texture, args.semantic_statistics, args.semantic_channels, transport)


def _scaling_of(texture_vae: str):
    """Return the statistics that a converted texture VAE's scaling factor stands for."""
    from sfd_jax.latents import LatentStatistics
    from sfd_jax.models.network import network_of
    from sfd_jax.training.checkpoint import load_metadata

    metadata = load_metadata(texture_vae) | {"given_as": f"--statistics={texture_vae}"}
    network_of(metadata, "texture_vae")
    if not metadata.get("latent_statistics"):
        raise SfdError(f"--statistics={texture_vae}: this texture VAE has no scaling factor; give latents_stats.pt")
    return LatentStatistics.from_dict(metadata["latent_statistics"])


def _print_notes(notes: list[str]) -> None:
    for note in notes:
        print(f"note: {note}")
