"""The demo's record in its work folder: configuration, images, finished stages and their times."""

import contextlib
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from sfd_jax.errors import SfdError
from sfd_jax.files import differences, write_json
from sfd_jax.training.record import FREE_KEYS, upgraded

FORMAT = 2  # of the work folder; changes when stages would misread what an earlier version wrote


class DemoRecord:
    """The record of one demo run, `demo.json` in its work folder.

    The file is replaced atomically at the end of each stage. After a kill, the interrupted stage continues
    from its own checkpoints, shards or chunks.
    """

    def __init__(self, workdir: Path, config: dict, images: str = "digits", chosen_for: str = ""):
        """Claim the folder for this configuration.

        Args:
          workdir: made where needed.
          config: JSON-able; everything that decides the run's numbers.
          images: description of the images.
          chosen_for: argument of the config file, needed to continue.

        Raises:
          SfdError: the folder cannot be written, or holds a run of another configuration, other images or another
            version.
        """
        self.workdir = workdir
        self._path = workdir / "demo.json"
        about = {"format": FORMAT, "images": images, "chosen_for": chosen_for}
        self._content = {**about, "config": config, "stages": {}}
        found = read_record(workdir)
        if found is None:
            with writing(workdir):
                workdir.mkdir(parents=True, exist_ok=True)
                self._write()
        else:
            if found["images"] != images:
                raise SfdError(
                    f"{workdir} holds the demo of other images; nothing was changed. There: {found['images']}. Here: "
                    f"{images}. Choose another --workdir"
                )
            lines = differences(upgraded(found["config"]), upgraded(config))
            # Previews change nothing of a run, and earlier versions had none.
            differing = [line for key, line in lines.items() if key[-1] not in FREE_KEYS and "preview" not in key]
            if differing:
                raise SfdError(
                    f"{workdir} holds the demo of another configuration; nothing was changed. Choose another "
                    "--workdir, or restore these values:\n  " + "\n  ".join(differing)
                )
            self._content = found

    @property
    def stages(self) -> dict[str, dict]:
        """Stage -> {"seconds": ..., "peak_gib": ..., and what the stage returned}."""
        return self._content["stages"]

    def run(self, name: str, title: str, stage: Callable[[], dict | None]) -> None:
        """Run a stage unless it is done; `stage()` returns a JSON-able dict for the report."""
        if name in self.stages:
            print(f"[{name}] already done", flush=True)
            return
        print(f"[{name}] {title}", flush=True)
        start = time.monotonic()
        with writing(self.workdir):
            result = stage() or {}
        seconds = time.monotonic() - start
        self.stages[name] = {"seconds": round(seconds, 1), "peak_gib": round(peak_memory_gib(), 2), **result}
        with writing(self.workdir):
            self._write()
        facts = ", ".join(f"{key} {value}" for key, value in result.items() if not isinstance(value, (dict, list)))
        print(f"[{name}] {seconds:.0f} s{', ' + facts if facts else ''}", flush=True)

    def _write(self) -> None:
        write_json(self._path, self._content)


def read_record(workdir: Path) -> dict | None:
    """Return the content of `demo.json`, or None if there is none.

    Raises:
      SfdError: it is damaged, or of another version.
    """
    path = workdir / "demo.json"
    with writing(workdir):
        found = json.loads(path.read_text()) if path.exists() else None
    if found is not None and (not isinstance(found, dict) or found.get("format") != FORMAT):
        raise SfdError(
            f"{workdir} holds a demo begun by another version of sfd_jax, which this one cannot continue; nothing was "
            "changed. Choose another --workdir"
        )
    return found


@contextlib.contextmanager
def writing(workdir: Path) -> Iterator[None]:
    """Turn an OSError or a damaged record under `workdir` into an SfdError."""
    try:
        yield
    except OSError as error:
        raise SfdError(
            f"the work folder {workdir} cannot be used: {error}. Finished work is kept: free some space and run the "
            "same command again, or choose another --workdir"
        ) from error
    except json.JSONDecodeError as error:
        raise SfdError(
            f"{workdir / 'demo.json'} is damaged ({error}); remove it and run again to repeat the stages"
        ) from error


def peak_memory_gib() -> float:
    """Return the largest resident size of this process so far, in GiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
