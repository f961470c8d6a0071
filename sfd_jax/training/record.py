"""`run.json`: which run a work folder belongs to, so that no other one writes into it."""

import json
from typing import Any

from etils import epath

from sfd_jax.diffusion.clocks import CLOCKS, clocks_config, make_clocks
from sfd_jax.diffusion.sample_config import SampleJob
from sfd_jax.distributed import is_host0
from sfd_jax.errors import SfdError
from sfd_jax.files import differences, write_anywhere
from sfd_jax.ranges import of_a_part
from sfd_jax.settings import to_dict

# What may differ when a run goes on: how often it speaks and saves, where it runs and how it saves memory (both change
# the rounding and nothing else), what is done afterwards.
FREE_KEYS = (
    "log_every",
    "checkpoint_every",
    "keep_last",
    "keep_every",
    "max_bad_steps",
    "workers",
    "remat",
    "scan_blocks",
    "accumulation",
)
# Where data and frozen networks lie, where the record tells by hashes which they are.
PLACES = ("path", "held_out_path", "semantic_vae", "visual_encoder", "lpips")
# Groups of the config.
FREE_GROUPS = ("mesh", "sample", "evaluate", "demo")


def claim_workdir(workdir: epath.PathLike, record: dict, may_extend: bool, *, write: bool = True) -> dict:
    """Write the run's record into its folder, or check that the folder holds this very run.

    Args:
      workdir: folder of the run; made where needed.
      record: JSON-able dict of everything that decides the run's numbers.
      may_extend: whether `steps` may differ too, as it may under a schedule that does not depend on it.
      write: False only compares.

    Returns:
      The record that the folder holds.

    Raises:
      SfdError: the folder is another run's (each differing key is named), lost its record, or cannot be written.
    """
    path = epath.Path(workdir) / "run.json"
    try:
        if path.exists():
            old = json.loads(path.read_text())
            _compare(path, old, record, may_extend)
            return old
        checkpoints = path.parent / "checkpoints"
        if is_host0():
            if checkpoints.exists() and any(folder.name.isdigit() for folder in checkpoints.iterdir()):
                raise SfdError(
                    f"{path.parent} holds checkpoints but no run.json, which tells what run they are of (an incomplete "
                    "copy?); copy it here too, or take another --workdir"
                )
            if write:
                write_anywhere(path, json.dumps(record, indent=1, sort_keys=True))
        return record
    except SfdError:
        raise
    except Exception as error:  # a bucket's client has types of its own, and may be missing
        raise SfdError(f"work folder {path.parent} cannot be used: {error}; choose one that can be written") from error


def _compare(path: epath.Path, old: dict, new: dict, may_extend: bool) -> None:
    free = (*FREE_KEYS, *(("steps",) if may_extend else ()), *(PLACES if "data_hash" in old else ()))
    # A begun run needs no weights to start from any more; one begun before they were recorded cannot tell.
    if new.get("init") is None or "init" not in old:
        free += ("init",)
    if "data_hash" not in old:
        free += ("data_hash", "held_out_hash")
    differing = {
        key: line
        for key, line in differences(upgraded(old), upgraded(new)).items()
        if of_a_part(".".join(key)) or (key[-1] not in free and not set(key[:2]) & set(FREE_GROUPS))
    }
    if differing and all(key[-1] == "steps" for key in differing):
        raise SfdError(
            f"the run in {path.parent} cannot be made longer or shorter: its optimizer.schedule depends on train.steps "
            "('constant' does not). Nothing was changed. Set train.steps back, or train these weights further as a new "
            f"run: --init={path.parent} with another --workdir"
        )
    if differing:
        raise SfdError(
            f"work folder {path.parent} belongs to another run ({path} differs); nothing was changed. Take "
            "another --workdir, or set these back:\n  " + "\n  ".join(differing.values())
        )


def upgraded(config: dict[str, Any]) -> dict[str, Any]:
    """Return a stored config, or what holds one, as it would be written now; for comparisons.

    Clocks have their own settings alone: once all of them had a `delta_t`. Of how to sample what has no effect is not
    told, and nothing but None means "not given".
    """
    told = {}
    for name, value in config.items():
        if name == "clocks" and isinstance(value, dict) and value.get("name") in CLOCKS:
            value = clocks_config(make_clocks(value))
        elif name == "sample" and isinstance(value, dict):
            value = to_dict(SampleJob.from_group(value))
        elif isinstance(value, dict) and name != "terms":  # which have names of their own
            value = upgraded(value)
        told[name] = value
    return told
