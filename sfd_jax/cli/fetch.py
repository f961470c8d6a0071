"""Download released weights, check and convert them.

  sfd fetch NAME [--file=PART_OF_A_NAME] [--no_convert]
  sfd fetch --list

Downloads with huggingface_hub into the cache (SFD_CACHE, by default ~/.cache/sfd_jax), resumes interrupted
downloads, checks size and SHA-256 if they are known, converts, and prints the path of the result. Files in
the cache are reused. Without a connection it prints which file to put where by hand. HF_TOKEN is sent to
the hub; HF_ENDPOINT and SFD_MIRROR name other servers.
"""

from pathlib import Path

from sfd_jax.cli.flags import command_parser, parse_command
from sfd_jax.errors import SfdError
from sfd_jax.ranges import Only


def main(argv: list[str]) -> int:
    """Fetch one entry of the catalogue and convert it."""
    from sfd_jax.convert.hub import CATALOGUE, cache_dir, fetch

    parser = command_parser("fetch", __doc__)
    parser.add_argument("name", nargs="?", help="what to fetch; see --list")
    parser.add_argument("--list", action="store_true", help="print what can be fetched")
    parser.add_argument("--file", help="which file, if there are several, e.g. 0400000.pt")
    parser.add_argument("--no_convert", action="store_true", help="only download")
    rules = (Only("file no_convert", "name"), Only("name file no_convert", "list", never=True))
    args = parse_command(parser, argv, rules=rules)
    if args.list or args.name is None:
        width = max(map(len, CATALOGUE))
        for name, source in CATALOGUE.items():
            print(f"{name:<{width}}  {source.about} ({source.where})")
        return 0
    paths = fetch(args.name, args.file)
    if args.no_convert or not CATALOGUE[args.name].converts:
        for path in paths:
            print(path)
        return 0
    statistics = _statistics() if args.name.startswith("sfd_") else {}
    print(_convert(paths[0], cache_dir() / args.name, statistics))
    return 0


def _statistics() -> dict[str, Path]:
    """Return the released latent statistics, which a diffusion checkpoint needs to be sampled from."""
    from sfd_jax.convert.hub import fetch

    paths = {path.name: path for path in fetch("latent_stats")}
    wanted = {"texture_statistics": "latents_stats.pt", "semantic_statistics": "latents_sv_stats.pt"}
    if lacking := set(wanted.values()) - paths.keys():
        raise SfdError(f"latent_stats: {' and '.join(sorted(lacking))} needed, found {', '.join(paths)}")
    return {name: paths[file] for name, file in wanted.items()}


def _convert(path: Path, out: Path, statistics: dict[str, Path]) -> Path:
    from sfd_jax.convert.checkpoints import Stated, import_checkpoint
    from sfd_jax.training.checkpoint import load_metadata, save_params

    imported = import_checkpoint(path, Stated(**statistics))
    target = out / str(imported.metadata["step"])
    if target.exists():
        if load_metadata(target)["source"] != imported.metadata["source"]:
            raise SfdError(f"'{target}' holds another checkpoint; move it away, then run this again")
        return target
    save_params(out, imported.params, imported.metadata)
    for note in imported.notes:
        print(f"note: {note}")
    return target
