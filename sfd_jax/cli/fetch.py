"""Download released weights, check and convert them.

  sfd fetch NAME [--file=PART_OF_A_NAME] [--no_convert]
  sfd fetch --list

Downloads with huggingface_hub into the cache (SFD_CACHE, by default ~/.cache/sfd_jax), resumes interrupted
downloads, checks size and SHA-256 if they are known, converts, and prints the path of the result. Files in
the cache are reused. Without a connection it prints which file to put where by hand. HF_TOKEN is sent to
the hub; HF_ENDPOINT and SFD_MIRROR name other servers.
"""

from sfd_jax.cli.flags import command_parser, parse_command
from sfd_jax.ranges import Only


def main(argv: list[str]) -> int:
    """Fetch one entry of the catalogue and convert it."""
    from sfd_jax.convert.hub import CATALOGUE, fetch
    from sfd_jax.experiment.released import fetch_checkpoint

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
    if args.no_convert or args.name not in CATALOGUE or not CATALOGUE[args.name].converts:
        for path in fetch(args.name, args.file):
            print(path)
        return 0
    print(fetch_checkpoint(args.name, args.file))
    return 0
