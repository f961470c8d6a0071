"""`run.json`: the run that a work folder belongs to, so that no other run writes into it."""

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

# Settings that may differ when a run is resumed: how often it logs and saves, where it runs and how it saves memory
# (both change only the rounding), and what is done afterwards.
FREE_KEYS = (
    "log_every",
    "checkpoint_every",
    "keep_last",
    "keep_every",
    "max_bad_steps",
    "wandb",
    "workers",
    "remat",
    "scan_blocks",
    "fused_attention",
    "accumulation",
    "average_on_host",
)
# Paths of data and frozen networks, which the record identifies by hashes.
PLACES = ("path", "held_out_path", "semantic_vae", "visual_encoder", "lpips", "teacher", "weak")
# Settings that records of earlier versions lack, by group, with the values that were meant.
ADDED = {
    "model": {"repa_projector": "mlp", "time_input": "clock"},
    "network_config": {"repa_projector": "mlp", "time_input": "clock", "end_time": False},
    "loss": {"repa_spatial_norm": 0.0},
    "optimizer": {"first_moment_dtype": "float32"},
}
# Groups of the config that may differ.
FREE_GROUPS = ("mesh", "sample", "evaluate", "demo", "preview")


def claim_workdir(workdir: epath.PathLike, record: dict, may_extend: bool, *, write: bool = True) -> dict:
    """Write the run's record into its folder, or check that the folder holds the same run.

    Args:
      workdir: folder of the run; made where needed.
      record: JSON-able dict of everything that decides the run's numbers.
      may_extend: whether `steps` may differ too; for schedules that do not depend on it.
      write: False only compares.

    Returns:
      The record that the folder holds.

    Raises:
      SfdError: the folder is another run's (each differing key is named), lacks its record, or cannot be written.
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
                    f"{path.parent} holds checkpoints but no run.json with the run's settings (an incomplete copy?); "
                    "copy it here too, or give another --workdir"
                )
            if write:
                write_anywhere(path, json.dumps(record, indent=1, sort_keys=True))
        return record
    except SfdError:
        raise
    except Exception as error:  # a bucket's client has its own types, and may be missing
        raise SfdError(f"work folder {path.parent} cannot be used: {error}; choose one that can be written") from error


def _compare(path: epath.Path, old: dict, new: dict, may_extend: bool) -> None:
    free = (*FREE_KEYS, *(("steps",) if may_extend else ()), *(PLACES if "data_hash" in old else ()))
    # A resumed run needs no initial weights; old records do not contain their hash.
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
            f"work folder {path.parent} belongs to another run ({path} differs); nothing was changed. Give "
            "another --workdir, or set these back:\n  " + "\n  ".join(differing.values())
        )


def upgraded(config: dict[str, Any]) -> dict[str, Any]:
    """Return a stored config, or a dict that contains one, as it would be written now; for comparisons.

    Older configs gave every kind of clocks a `delta_t`; now each has only its own settings. In "sample", settings
    without effect are left out, and only None means "not given". Settings of `ADDED` are filled in.
    """
    result = {}
    for name, value in config.items():
        if name == "clocks" and isinstance(value, dict) and value.get("name") in CLOCKS:
            value = clocks_config(make_clocks(value))
        elif name == "sample" and isinstance(value, dict):
            value = to_dict(SampleJob.from_group(value))
        elif isinstance(value, dict) and name != "terms":  # whose fields have any names
            value = ADDED.get(name, {}) | upgraded(value)
        result[name] = value
    return result
