"""`sfd <door> ...`: find the door, open it, and turn errors meant for the user into exit status 2."""

import _thread
import contextlib
import importlib
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from sfd_jax import libtpu
from sfd_jax.errors import SfdError, nearest
from sfd_jax.files import disk_fault
from sfd_jax.registry import take_plugins

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
    "compile_pod": "compile the real programs for a TPU slice that is not here: do they fit?",
    "plan": "memory, time and storage of a training run on a TPU slice",
}

# What to do where a device's memory does not suffice; other doors are told nothing.
# What is said of training can be done on a begun run: see `FREE_KEYS` of training/record.py.
_training = (
    "nothing saved is lost; go on with {}--config.train.accumulation=2 (or 4, 8, ...), or on more devices, with "
    "--config.mesh.data=1 --config.mesh.fsdp=-1 to split the weights (a smaller train.global_batch_size makes another "
    "run, in a new folder)"
)
SMALLER = {
    "train": _training.format("--config.model.remat=full, "),
    "train_semvae": _training.format(""),
    "train_texture_vae": _training.format(""),
    "sample": "try a smaller --batch_size, or --fsdp to split the weights; images already made are kept",
    "evaluate": "try a smaller --eval_batch_size, with --live also --batch_size",
    "extract": "try a smaller --batch_size; shards already written are kept",
}

# Those that start on all hosts of a job.
HOST_DOORS = ("extract", "train", "train_semvae", "train_texture_vae", "sample", "evaluate")


def usage() -> str:
    """Return the overview that `sfd --help` prints."""
    width = max(map(len, DOORS))
    doors = "\n".join(f"  {name:<{width}}  {line}" for name, line in DOORS.items())
    return f"usage: sfd <door> [flags]\n\n{doors}\n\n`sfd <door> --help` explains its flags; --plugin=MODULE goes with all."


def main(argv: list[str]) -> int:
    """Open the door named by `argv[0]` with the remaining arguments and return its exit status."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        return open_door(lambda _: print(usage()), "help", [])
    if argv[0] == "--version":
        from sfd_jax import __version__

        return open_door(lambda _: print(__version__), "version", [])
    door, *arguments = argv
    if door not in DOORS:
        print(f"sfd: unknown door '{door}'; {nearest(door, DOORS)}", file=sys.stderr)
        return 2
    # Imported within: Ctrl-C may come at any moment.
    return open_door(lambda arguments: importlib.import_module(f"sfd_jax.cli.{door}").main(arguments), door, arguments)


def open_door(door_main, name: str, arguments: list[str]) -> int:
    """Run one door and return its exit status.

    An SfdError becomes one message on stderr and its own status (2: fix it, 75: start again), a full disk one that
    names the file, a device without enough memory one that says what to make smaller, Ctrl-C 130, a standard output that
    nobody reads any more 0; any other broken pipe is a fault. The other hosts of a job learn of each end
    that is none of theirs (see distributed/hosts.py).
    """
    keep_compilations()
    libtpu.hush()
    with _ctrl_c_is_heard():
        return _open_door(door_main, name, arguments)


def _open_door(door_main, name: str, arguments: list[str]) -> int:
    try:
        status = door_main(take_plugins(arguments)) or 0
        sys.stdout.flush()
        tell_hosts(name, status)
        return status
    except SfdError as error:
        print(f"sfd {name}: {error}", file=sys.stderr, flush=True)
        tell_hosts(name, error.status, str(error))
        return error.status
    except KeyboardInterrupt:
        with contextlib.suppress(ValueError):  # not the main thread
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would only disturb the end
        print(f"sfd {name}: interrupted; run the same command again to go on", file=sys.stderr, flush=True)
        tell_hosts(name, 130, "interrupted")
        return 130
    except SystemExit:  # `--help`, or a SIGTERM that all hosts have heeded
        tell_hosts(name, 0)
        raise
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            _drop_output()  # `sfd ... | head` has seen enough
            return 0
        message = disk_fault(error)
        # By its name: a door may have failed before JAX was imported.
        if type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError") and "RESOURCE_EXHAUSTED" in str(error):
            hint = SMALLER.get(name, "take a smaller model or batch")
            message = f"a device's memory does not suffice: {hint}\n  {str(error).strip().splitlines()[0]}"
        if message:
            print(f"sfd {name}: {message}", file=sys.stderr, flush=True)
            _drop_output()
            tell_hosts(name, SfdError.status, message)
            return SfdError.status
        if _joins_hosts(name):
            from sfd_jax.distributed import hosts

            hosts.broke(error)
        raise


@contextlib.contextmanager
def _ctrl_c_is_heard() -> Iterator[None]:
    """Send a Ctrl-C again that came in a finalizer or a callback of C code, which no exception leaves."""
    hook = sys.unraisablehook

    def again(report) -> None:
        if report.exc_type is not KeyboardInterrupt:
            hook(report)
        else:
            threading.Timer(0.1, _thread.interrupt_main).start()

    sys.unraisablehook = again
    try:
        yield
    finally:
        if sys.unraisablehook is again:
            sys.unraisablehook = hook


def _nobody_reads() -> bool:
    """Return whether standard output is a pipe or socket whose other end is closed."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    except (OSError, ValueError):  # not a file
        return False


def _drop_output() -> None:
    """Lose what standard output does not take, of which Python's own flush at exit would complain again."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def keep_compilations() -> None:
    """Let JAX keep what it compiles for the next start: in JAX_COMPILATION_CACHE_DIR, or where `sfd fetch` keeps files."""
    home = Path(os.environ.get("SFD_CACHE") or Path.home() / ".cache" / "sfd_jax")
    # By environment, since JAX reads it when a door imports it, which most do late or not at all.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(home / "compilations"))
    if "jax" in sys.modules:
        sys.modules["jax"].config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])


def tell_hosts(name: str, status: int, why: str = "") -> None:
    """Leave the job of several hosts that a door may have joined; see `distributed.hosts.end`."""
    if _joins_hosts(name):
        from sfd_jax.distributed import hosts

        hosts.end(status, why)


def _joins_hosts(name: str) -> bool:
    """Return whether the door has started hosts, or is one that would have, in a job of several."""
    if "sfd_jax.distributed.hosts" in sys.modules:
        return True
    several = os.environ.get("JAX_COORDINATOR_ADDRESS") or os.environ.get("SFD_MULTIHOST") == "1"
    return bool(several) and name in HOST_DOORS


def entry_point() -> None:
    """Serve as the console script `sfd`."""
    sys.exit(main(sys.argv[1:]))


if __name__ == "__main__":
    entry_point()
