"""`sfd <door> ...`: find the door, open it, and turn errors meant for the user into exit status 2."""

import importlib
import os
import sys

from sfd_jax.errors import SfdError, nearest

# One line a door, in the order in which a project uses them.
DOORS = {
    "demo": "from real handwritten digits to new ones, on a laptop, with nothing downloaded",
    "extract": "images to latent shards with statistics",
    "train": "train the two-clock diffusion transformer on latent shards",
    "train_semvae": "train the Semantic VAE on visual-encoder features",
    "train_texture_vae": "train the texture VAE on images",
    "sample": "make images from a checkpoint",
    "evaluate": "FID, sFID, IS, precision and recall of samples",
    "convert": "published PyTorch checkpoints in, ours out",
    "fetch": "download published weights, check them, convert them",
    "verify": "compare this machine's arithmetic with a parity pack",
}


def usage() -> str:
    """Return the overview that `sfd --help` prints."""
    width = max(map(len, DOORS))
    doors = "\n".join(f"  {name:<{width}}  {line}" for name, line in DOORS.items())
    return f"usage: sfd <door> [flags]\n\n{doors}\n\n`sfd <door> --help` explains a door's flags."


def main(argv: list[str]) -> int:
    """Open the door named by `argv[0]` with the remaining arguments and return its exit status."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if argv[0] == "--version":
        from sfd_jax import __version__

        print(__version__)
        return 0
    door, *arguments = argv
    if door not in DOORS:
        print(f"sfd: unknown door '{door}'; {nearest(door, DOORS)}", file=sys.stderr)
        return 2
    return open_door(importlib.import_module(f"sfd_jax.cli.{door}").main, door, arguments)


def open_door(door_main, name: str, arguments: list[str]) -> int:
    """Run one door; an SfdError becomes one message on stderr and status 2, Ctrl-C status 130, a closed pipe 0."""
    try:
        status = door_main(arguments) or 0
        sys.stdout.flush()
        return status
    except SfdError as error:
        print(f"sfd {name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"sfd {name}: interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # `sfd ... | head` has seen enough; Python's own flush at exit must not complain of it either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def entry_point() -> None:
    """Serve as the console script `sfd`."""
    sys.exit(main(sys.argv[1:]))


if __name__ == "__main__":
    entry_point()
