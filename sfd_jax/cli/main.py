"""`sfd <command> ...`: run a command, and turn errors into a message and an exit status."""

import _thread
import contextlib
import importlib
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from sfd_jax import libtpu, malloc
from sfd_jax.errors import SfdError, TryAgain, nearest
from sfd_jax.files import disk_fault
from sfd_jax.registry import take_plugins

# One line per command, in the order of use in a project.
COMMANDS = {
    "demo": "from real images, the digits or your own, to new ones: on a laptop, with nothing downloaded",
    "extract": "images to latent shards with statistics",
    "train": "train the two-clock diffusion transformer on latent shards",
    "train_semvae": "train the Semantic VAE on visual-encoder features",
    "train_texture_vae": "train the texture VAE on images",
    "train_encoder": "train a small visual encoder on images in class folders",
    "sample": "make images from a checkpoint",
    "app": "a web page on which a model makes images",
    "evaluate": "FID, sFID, IS, precision and recall of samples",
    "convert": "released PyTorch checkpoints in, ours out",
    "fetch": "download released weights, check them, convert them",
    "verify": "compare this machine's arithmetic with a parity pack",
    "compile_pod": "compile the real programs for a TPU slice ahead of time, without a TPU: do they fit?",
    "plan": "memory, time and storage of a training run on a TPU slice",
    "env": "versions, devices, caches: what an issue report needs",
}

# Advice when a device is out of memory. That for training keeps the run: see `FREE_KEYS` of training/record.py.
_training = (
    "nothing saved is lost; continue with {}--config.train.accumulation=2 (or 4, 8, ...), or on more devices with "
    "--config.mesh.data=1 --config.mesh.fsdp=-1 to shard the weights (a smaller train.global_batch_size needs a new "
    "run in a new folder)"
)
SMALLER = {
    "train": _training.format("--config.model.remat=full, "),
    "train_semvae": _training.format(""),
    "train_texture_vae": _training.format(""),
    "train_encoder": _training.format(""),
    "sample": "try a smaller --batch_size, or --fsdp to shard the weights; images already made are kept",
    "evaluate": "try a smaller --eval_batch_size, with --live also --batch_size",
    "extract": "try a smaller --batch_size; shards already written are kept",
}


def usage() -> str:
    """Return the overview that `sfd --help` prints."""
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {line}" for name, line in COMMANDS.items())
    more = (
        "`sfd <command> --help` explains its flags; --plugin=MODULE goes with all. `sfd --version` tells the version."
    )
    return f"usage: sfd <command> [flags]\n\n{commands}\n\n{more}"


def main(argv: list[str]) -> int:
    """Run the command named by `argv[0]` with the remaining arguments and return its exit status."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        return run_command(lambda _: print(usage()), "help", [])
    if argv[0] == "--version":
        return run_command(lambda _: print(importlib.import_module("sfd_jax.cli.env").version()), "version", [])
    command, *arguments = argv
    if command not in COMMANDS:
        print(f"sfd: unknown command '{command}'; {nearest(command, COMMANDS)}", file=sys.stderr)
        return 2
    # Imported inside, so that Ctrl-C during the import is handled too.
    return run_command(
        lambda arguments: importlib.import_module(f"sfd_jax.cli.{command}").main(arguments), command, arguments
    )


class Terminated(KeyboardInterrupt):
    """Raised on SIGTERM; a KeyboardInterrupt, so that handlers of Exception do not catch it."""

    status = TryAgain.status


def run_command(command_main: Callable[[list[str]], object], name: str, arguments: list[str]) -> int:
    """Run one command and return its exit status.

    These become a message on stderr and a status: an SfdError (2: fix it, 75: start again), a full disk (with the
    file), a device out of memory (with advice), Ctrl-C (130) and SIGTERM (75). A closed standard output gives status
    0. Other exceptions are raised; a process of a job of several does not return then (see distributed/hosts.py).
    """
    keep_compilations()
    libtpu.hush()
    malloc.keep_freed_memory()
    with _signals_raise():
        return _leave_hosts(_status(command_main, name, arguments))


def _status(command_main, name: str, arguments: list[str]) -> int:
    report = lambda message: print(f"sfd {name}: {message}", file=sys.stderr, flush=True)
    try:
        status = command_main(take_plugins(arguments)) or 0
        sys.stdout.flush()
        return _leave_hosts(status)
    except SfdError as error:
        report(error)
        return error.status
    except KeyboardInterrupt as error:
        preempted = isinstance(error, Terminated)
        with contextlib.suppress(ValueError):  # not the main thread
            # A second signal would only disturb the exit.
            signal.signal(signal.SIGTERM if preempted else signal.SIGINT, signal.SIG_IGN)
        report(f"{'preempted by SIGTERM' if preempted else 'interrupted'}; run the same command again to continue")
        return Terminated.status if preempted else 130
    except SystemExit:  # `--help`, or a SIGTERM on which all hosts have stopped
        _leave_hosts(0)
        raise
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _output_is_closed():
            _drop_output()  # as in `sfd ... | head`
            return 0
        message = disk_fault(error)
        # By name, since JAX may not have been imported.
        if type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError") and "RESOURCE_EXHAUSTED" in str(error):
            hint = SMALLER.get(name, "use a smaller model or batch")
            message = f"a device is out of memory: {hint}\n  {str(error).strip().splitlines()[0]}"
        if message:
            report(message)
            _drop_output()
            return SfdError.status
        _leave_hosts(1, error)
        raise


def _leave_hosts(status: int, error: Exception | None = None) -> int:
    """Leave the job of several hosts, if a command has joined one; return the status."""
    if hosts := sys.modules.get("sfd_jax.distributed.hosts"):
        hosts.end(status) if error is None else hosts.broke(error)
    return status


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    """Let SIGTERM raise, as Ctrl-C does; repeat a signal whose exception was swallowed (in a finalizer)."""
    hook = sys.unraisablehook

    def again(report) -> None:
        if not issubclass(report.exc_type, KeyboardInterrupt):
            hook(report)
        else:
            number = signal.SIGTERM if issubclass(report.exc_type, Terminated) else signal.SIGINT
            threading.Timer(0.1, _thread.interrupt_main, [number]).start()

    def leave(*_) -> None:
        raise Terminated

    sys.unraisablehook, before = again, None
    if threading.current_thread() is threading.main_thread():
        before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        if sys.unraisablehook is again:
            sys.unraisablehook = hook
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _output_is_closed() -> bool:
    """Return whether standard output is a pipe or socket whose other end is closed."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    except (OSError, ValueError):  # not a file
        return False


def _drop_output() -> None:
    """Discard output that cannot be written, or Python's flush at exit would complain again."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def keep_compilations() -> None:
    """Set JAX's compilation cache, by default in the cache folder of `sfd fetch`."""
    home = Path(os.environ.get("SFD_CACHE") or Path.home() / ".cache" / "sfd_jax")
    # In the environment, since most commands import JAX later or not at all.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(home / "compilations"))
    if "jax" in sys.modules:
        sys.modules["jax"].config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])


def entry_point() -> None:
    """Serve as the console script `sfd`."""
    sys.exit(main(sys.argv[1:]))


if __name__ == "__main__":
    entry_point()
