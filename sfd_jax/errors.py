"""Errors for the user, and helpers that make their messages."""

import contextlib
import difflib
from collections.abc import Callable, Iterable, Iterator


class SfdError(Exception):
    """Report a fault of the input or the machine: the message names the thing and says what to do.

    Every command prints the message without a traceback and exits with `status`; 2 means "fix it first".
    """

    status = 2


class TryAgain(SfdError):
    """Report a failure that needs no fix: another host was missing, or this one was preempted.

    Status 75 (EX_TEMPFAIL of sysexits.h); the launch scripts start the same command again.
    """

    status = 75


class Faults(list):
    """Collect the messages of independent checks, so that the user sees all faults at once.

    `with faults:` around a check collects its SfdError; `stop` raises all that were collected as one.
    """

    def __enter__(self) -> "Faults":
        return self

    def __exit__(self, kind, error, traceback) -> bool:
        if isinstance(error, SfdError) and not isinstance(error, TryAgain):
            new = getattr(error, "faults", [str(error)])
            self += [fault for fault in new if not any(known.endswith(fault) for known in self)]
            return True
        return False

    def stop(self) -> None:
        """Raise SfdError where there are faults."""
        refuse(self)


def refuse(faults: list[str]) -> None:
    """Raise one SfdError that lists all faults, each a sentence, where there are any."""
    if faults:
        lines = "".join(f"\n  {fault}" for fault in faults)
        error = SfdError(faults[0] if len(faults) == 1 else f"{len(faults)} faults:{lines}")
        error.faults = list(faults)
        raise error


@contextlib.contextmanager
def damage_explained(say: Callable[[str], str]) -> Iterator[None]:
    """Turn any exception that a damaged file causes in the block into an SfdError; pass SfdErrors on.

    Args:
      say: makes the message from the reason.
    """
    try:
        yield
    except SfdError:
        raise
    except Exception as error:  # zipfile, numpy, pickletools and parsers report damage by many types
        raise SfdError(say(f"{error!s:.200}" or type(error).__name__)) from error


@contextlib.contextmanager
def needs_extra(extra: str, what: str) -> Iterator[None]:
    """Turn a failed import in the block into an SfdError that names the extra to install.

    Args:
      extra: its name in pyproject.toml.
      what: what needs it; the message begins with this.

    Raises:
      SfdError: an import failed.
    """
    try:
        yield
    except ImportError as error:
        package = (error.name or str(error)).partition(".")[0]
        raise SfdError(f"{what} needs the package {package}: pip install 'sfd_jax[{extra}]'") from error


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return a phrase that names the valid names nearest to `name`, for the end of a message.

    Args:
      name: what the user wrote.
      valid: the valid names.

    Returns:
      "did you mean 'x'?", or the list of all valid names where none is near.
    """
    valid = sorted(valid)
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    if close:
        return f"did you mean '{close[0]}'?"
    return "valid names: " + ", ".join(valid)
