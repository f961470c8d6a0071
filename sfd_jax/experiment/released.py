"""Released checkpoints by name: fetched, converted, and kept in the cache."""

from pathlib import Path

from sfd_jax.convert.checkpoints import Stated, import_checkpoint
from sfd_jax.convert.hub import cache_dir, fetch
from sfd_jax.errors import SfdError
from sfd_jax.training.checkpoint import load_metadata, save_params


def fetch_checkpoint(name: str, file: str | None = None) -> Path:
    """Fetch a released checkpoint, convert it unless that was done, and return its folder.

    Args:
      name: a key of `convert.hub.CATALOGUE` whose files can be converted.
      file: part of the file's name, if there are several files.

    Raises:
      SfdError: as `fetch`, or the folder holds another checkpoint.
    """
    downloaded = fetch(name, file)[0]
    imported = import_checkpoint(downloaded, Stated(**_statistics() if name.startswith("sfd_") else {}))
    target = cache_dir() / name / str(imported.metadata["step"])
    if target.exists():
        if load_metadata(target)["source"] != imported.metadata["source"]:
            raise SfdError(f"'{target}' holds another checkpoint; move it away, then run this again")
        return target
    save_params(target.parent, imported.params, imported.metadata)
    for note in imported.notes:
        print(f"note: {note}")
    return target


def cached_checkpoint(name: str, step: int | None = None) -> Path:
    """Return the folder of a released checkpoint in the cache, by default the newest, or fetch it.

    Args:
      name: a key of `convert.hub.CATALOGUE`.
      step: training step, if several were released.
    """
    steps = [int(path.name) for path in (cache_dir() / name).glob("*") if path.name.isdecimal()]
    if here := [each for each in steps if step in (None, each)]:
        return cache_dir() / name / str(max(here))
    return fetch_checkpoint(name, step and f"{step:07d}.pt")


def _statistics() -> dict[str, Path]:
    """Return the released latent statistics, which sampling needs."""
    paths = {path.name: path for path in fetch("latent_stats")}
    wanted = {"texture_statistics": "latents_stats.pt", "semantic_statistics": "latents_sv_stats.pt"}
    if lacking := set(wanted.values()) - paths.keys():
        raise SfdError(f"latent_stats: {' and '.join(sorted(lacking))} needed, found {', '.join(paths)}")
    return {name: paths[file] for name, file in wanted.items()}
