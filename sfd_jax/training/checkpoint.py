"""Checkpoints: the full training state to resume from, and the parameters that other commands read.

A folder of checkpoints holds one folder for each step, which appears only when complete:

    <step>/params, <step>/ema_params   the network's, nested dicts of float32 arrays
    <step>/progress                    optimizer state, counters, and parameters trained beside the network
                                       (classifier heads); only in checkpoints of a run
    <step>/metadata                    JSON: network, its config, latent statistics, class names, step, source;
                                       and the checksums of itself and of every array (checksums.py)

Everything read is compared with its checksum. Older checkpoints without checksums are read with a warning line.
`save_params` writes the same layout with only `params`, so converted and trained weights are read alike.
Orbax writes to local disks and to gs:// paths, in the background where possible.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Iterator

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as keeping

from sfd_jax.distributed import say
from sfd_jax.errors import SfdError
from sfd_jax.files import user_path
from sfd_jax.training.checksums import checksums
from sfd_jax.training.state import TrainState
from sfd_jax.trees import named_leaves, shape_faults, shapes_by_name

_STATE_ITEMS = ("params", "ema_params", "progress")
_DAMAGED = "copy it here again, or remove that folder to use the checkpoint before it"
_INCOMPLETE = "an incomplete copy? Copy it here again, or remove that folder to use the checkpoint before it"

# Each of Orbax's threads logs a failed write with its traceback; the one SfdError raised here is enough.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)
logging.getLogger("asyncio").addFilter(lambda record: "never retrieved" not in record.getMessage())

_unraisable = sys.unraisablehook


def _without_echoes(report) -> None:
    # After a failed read, TensorStore's other reads call into an event loop that is already closed.
    code = getattr(report.object, "cr_code", None)
    if str(report.exc_value) != "Event loop is closed" and "orbax" not in getattr(code, "co_filename", ""):
        _unraisable(report)


sys.unraisablehook = _without_echoes


class _KeepBest(keeping.PreservationPolicy):
    def __init__(self, checkpointer: "Checkpointer"):
        self._checkpointer = checkpointer

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        return [checkpoint.step == self._checkpointer.best for checkpoint in checkpoints]


class Checkpointer:
    """Save and restore the training state in `directory`, keeping the newest, every n-th step and a chosen one.

    Attributes:
      best: step of a checkpoint that is kept however old it is; None for none.
    """

    def __init__(self, directory: epath.PathLike, keep_last: int = 2, keep_every: int = 0):
        """Open the folder; make it where needed and remove the remains of a killed save.

        Args:
          directory: folder of checkpoints, local or gs://.
          keep_last: newest checkpoints kept, at least 1.
          keep_every: checkpoints whose step is a multiple of it are kept forever; 0 for none.

        Raises:
          SfdError: the folder cannot be made or written to.
        """
        self.directory, self.best = _folder(directory), None
        kept = [keeping.LatestN(max(1, keep_last)), _KeepBest(self)]
        kept += [keeping.EveryNSteps(keep_every)] if keep_every else []
        options = ocp.CheckpointManagerOptions(
            preservation_policy=keeping.AnyPreservationPolicy(kept), cleanup_tmp_directories=True
        )
        with _writing(f"checkpoint folder {self.directory} cannot be opened"):
            self._manager = ocp.CheckpointManager(self.directory, options=options)

    def latest_step(self) -> int | None:
        """Return the newest complete checkpoint's step, None where there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, metadata: dict) -> None:
        """Save in the background; return when the state may be donated.

        Args:
          step: the state's step.
          state: a sharded TrainState; every host passes its part.
          metadata: JSON-able dict, see the module docstring; `step` is added.

        Raises:
          SfdError: this save, or the one before it, could not be written.
        """
        items = _save_args(_to_items(state), {**metadata, "step": step})
        self.wait()
        with _writing(f"checkpoint of step {step} cannot be written to {self.directory}"):
            _check_space(self.directory, state)
            self._manager.save(step, args=items, force=True)

    def restore(self, abstract_state: TrainState, step: int | None = None) -> TrainState:
        """Read a state into the shapes, dtypes and shardings of `abstract_state`.

        Args:
          abstract_state: from `state.abstract_state`; its mesh need not be the one that saved.
          step: which checkpoint; the newest by default.

        Raises:
          SfdError: there is none, it cannot be read, or arrays are damaged, missing, extra or misshapen; the
            message names all of them.
        """
        step = self.latest_step() if step is None else step
        if step is None:
            raise SfdError(f"{self.directory} holds no complete checkpoint")
        items, metadata = _read(self.directory / str(step), _to_items(abstract_state))
        if metadata["step"] != step:
            raise SfdError(
                f"{self.directory / str(step)} holds step {metadata['step']}; rename the folder to {metadata['step']}"
            )
        return _from_items(items)

    def wait(self) -> None:
        """Block until all saves are complete; raise SfdError where one failed."""
        with _writing(f"the last checkpoint could not be written to {self.directory}"):
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def close(self) -> None:
        """Finish pending saves and release the folder; `wait` reports failures."""
        with contextlib.suppress(Exception):
            self._manager.close()


def save_params(directory: epath.PathLike, params: dict, metadata: dict) -> None:
    """Save parameters so that `load_params` finds them.

    Args:
      directory: folder of checkpoints; the step is that of the metadata, or 0.
      params: nested dict with string keys of arrays.
      metadata: JSON-able dict, see the module docstring.

    Raises:
      SfdError: the folder holds that step already, or cannot be written.
    """
    step = int(metadata.get("step", 0))
    target = _folder(directory) / str(step)
    if target.exists():
        raise SfdError(f"{target} exists already; nothing was written. Remove it or choose another folder")
    items = _save_args({"params": params}, {**metadata, "step": step})
    with _writing(f"parameters cannot be written to {target}"), _composite() as checkpointer:
        checkpointer.save(target, args=items)


def load_params(
    directory: epath.PathLike, step: int | None = None, which: str = "ema", abstract: dict | None = None
) -> tuple[dict, dict]:
    """Read parameters and metadata of a trained or converted network.

    Args:
      directory: the work folder of a run, a folder of checkpoints, or one checkpoint.
      step: which checkpoint; the newest by default.
      which: "ema" or "raw"; a folder with one set of parameters returns that one for both.
      abstract: tree of ShapeDtypeStructs to read into, with shardings to split the arrays over a mesh;
        without it the arrays come as float32 numpy arrays of the stored shapes.

    Returns:
      (params, metadata).

    Raises:
      SfdError: no such checkpoint; parameters (of a run, also the average) are missing; or arrays are damaged or do
        not fit `abstract`: all are named.
    """
    if which not in ("ema", "raw"):
        raise SfdError(f"which='{which}': a checkpoint holds 'ema' and 'raw' parameters")
    path = find_checkpoint(directory, step)
    item = "ema_params" if which == "ema" and "ema_params" in _items_of(path, *_read_metadata(path)) else "params"
    items, metadata = _read(path, {item: abstract})
    return items[item], metadata


def load_metadata(directory: epath.PathLike, step: int | None = None) -> dict:
    """Read only a checkpoint's metadata.

    Raises:
      SfdError: no such checkpoint, or its metadata are missing or damaged.
    """
    return _read_metadata(find_checkpoint(directory, step))[0]


def find_checkpoint(directory: epath.PathLike, step: int | None = None) -> epath.Path:
    """Return the folder of one complete checkpoint.

    Args:
      directory: the work folder of a run, a folder of checkpoints, or one checkpoint.
      step: which one; the newest by default.

    Raises:
      SfdError: there is none; the message lists the existing steps.
    """
    root = _folder(directory)
    if not root.exists():
        raise SfdError(f"no checkpoint folder {root}")
    if root.is_file():
        raise SfdError(
            f"{root} is a file, not a checkpoint folder; `sfd convert {root} --out=DIR` makes one from a released file"
        )
    if any((root / item).exists() for item in (*_STATE_ITEMS, "metadata")):
        if step is not None and root.name != str(step):
            raise SfdError(
                f"{root} is one checkpoint, so step {step} cannot be chosen: leave it out, or give the run's folder"
            )
        return root
    if (root / "checkpoints").exists():
        root = root / "checkpoints"
    steps = sorted(ocp.utils.checkpoint_steps(root))
    if not steps:
        raise SfdError(f"{root} holds no complete checkpoint")
    if step is not None and step not in steps:
        raise SfdError(f"{root} holds no checkpoint of step {step}; it has {', '.join(map(str, steps))}")
    return root / str(steps[-1] if step is None else step)


def _folder(directory: epath.PathLike) -> epath.Path:
    """Return a folder as Orbax needs it: local paths absolute, gs:// paths unchanged."""
    text = user_path(directory)
    return epath.Path(text if "://" in text else os.path.abspath(text))


def _to_items(state: TrainState) -> dict:
    params, heads = _split_heads(state.params)
    ema_params, ema_heads = _split_heads(state.ema_params)
    progress = {"opt_state": state.opt_state, "step": state.step}
    progress |= {"bad_steps": state.bad_steps, "skipped": state.skipped, "heads": heads, "ema_heads": ema_heads}
    return {"params": params, "ema_params": ema_params, "progress": progress}


def _from_items(items: dict) -> TrainState:
    progress = dict(items["progress"])
    params = _join_heads(items["params"], progress.pop("heads"))
    ema_params = _join_heads(items["ema_params"], progress.pop("ema_heads"))
    return TrainState(params=params, ema_params=ema_params, **progress)


def _split_heads(params: dict) -> tuple[dict, dict]:
    """Split {"network", "heads"} of tasks with classifiers; other params are all network."""
    return (params["network"], params["heads"]) if params.keys() == {"network", "heads"} else (params, {})


def _join_heads(params: dict, heads: dict) -> dict:
    return {"network": params, "heads": heads} if heads else params


def _check_space(directory: epath.Path, tree) -> None:
    """Raise OSError, before anything is written, where a local disk lacks space for this host's part of the arrays."""
    if not os.path.isdir(directory):
        return  # a bucket
    shards = [shard for array in jax.tree.leaves(tree) for shard in array.addressable_shards]
    needed = sum(shard.data.nbytes for shard in shards if shard.replica_id == 0)
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise OSError(f"it needs {needed / 2**20:,.1f} MiB and the disk has {free / 2**20:,.1f} MiB free")


def _save_args(items: dict, metadata: dict) -> ocp.args.Composite:
    """Return the arguments of Orbax's save; the checksums are taken before the arrays may be donated."""
    metadata = _json(metadata)
    sums = checksums(items)
    stored = {"metadata": metadata, "checksums": sums, "sha256": _sha256(metadata, sums)}
    args = {name: ocp.args.PyTreeSave(tree) for name, tree in items.items()}
    return ocp.args.Composite(**args, metadata=ocp.args.JsonSave(stored))


def _sha256(metadata: dict, sums: dict) -> str:
    return hashlib.sha256(json.dumps([metadata, sums], sort_keys=True).encode()).hexdigest()


def _read_metadata(path: epath.Path) -> tuple[dict, dict | None]:
    """Return a checkpoint's metadata and its checksums by path, item first; None where it has none."""
    if not (path / "metadata").exists():
        raise SfdError(f"checkpoint {path} lacks its metadata: {_INCOMPLETE}")
    with _reading(path / "metadata"), ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
        stored = checkpointer.restore(path / "metadata", args=ocp.args.JsonRestore())
    if "step" in stored:  # the old form without checksums
        return stored, None
    if stored.keys() != {"metadata", "checksums", "sha256"} or stored["sha256"] != _sha256(
        stored["metadata"], stored["checksums"]
    ):
        raise SfdError(f"checkpoint {path} is damaged: its metadata fail their checksum; {_DAMAGED}")
    return stored["metadata"], stored["checksums"]


def _items_of(path: epath.Path, metadata: dict, sums: dict | None) -> set[str]:
    """Return the names of the items with arrays that a checkpoint was written with."""
    if sums is not None:
        return {name.split(".", 1)[0] for name in sums}
    return set(_STATE_ITEMS) if "task" in metadata or (path / "progress").exists() else {"params"}


def _read(path: epath.Path, targets: dict) -> tuple[dict, dict]:
    """Read items of one checkpoint, each into its abstract tree or, where that is None, as stored; and the metadata."""
    metadata, sums = _read_metadata(path)
    items = _items_of(path, metadata, sums)
    if missing := [name for name in targets if not (path / name).exists()]:
        why = _INCOMPLETE if items.issuperset(missing) else "it was not written by a run; `--init` starts one from it"
        raise SfdError(f"checkpoint {path} lacks its {' and '.join(missing)}: {why}")
    restored = _read_items(path, targets)
    if sums is None:
        say(f"{path} has no checksums: damage in it would go unnoticed")
        return restored, metadata
    found = checksums(restored)
    wanted = {name: value for name, value in sums.items() if name.split(".", 1)[0] in targets}
    if damaged := sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name)):
        raise SfdError(
            f"checkpoint {path} is damaged: {len(damaged)} arrays fail their checksum; {_DAMAGED}:\n  "
            + "\n  ".join(damaged)
        )
    return restored, metadata


def _read_items(path: epath.Path, targets: dict) -> dict:
    restored, stored = {}, {}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        for name in targets:
            with _reading(path / name):
                found = checkpointer.metadata(path / name).item_metadata
                if found is None:  # Orbax returns None for what it cannot read
                    raise ValueError("the list of its arrays is damaged or missing")
                stored[name] = found.tree
        with _reading(path / " and ".join(targets)):
            _check_arrays(path, {name: tree for name, tree in targets.items() if tree is not None}, stored)
        for name, target in targets.items():
            if target is None:
                restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), stored[name])
            else:
                restore_args = ocp.checkpoint_utils.construct_restore_args(target)
            with _reading(path / name):
                args = ocp.args.PyTreeRestore(item=target, restore_args=restore_args)
                restored[name] = checkpointer.restore(path / name, args=args)
    return restored


def _check_arrays(path: epath.Path, targets: dict, stored: dict) -> None:
    """Raise one SfdError that names every array in which the checkpoint and the target differ."""
    stored = {name: stored[name] for name in targets}
    faults = shape_faults(shapes_by_name(stored, "."), shapes_by_name(targets, "."))
    found = named_leaves(stored, ".")
    for name, wanted in named_leaves(targets, ".").items():
        if name in found and np.dtype(found[name].dtype) != np.dtype(wanted.dtype):
            faults.append(f"  other dtype: {name} is {found[name].dtype}, expected {wanted.dtype}")
    if faults:
        raise SfdError(
            f"checkpoint {path} does not fit this network; {len(faults)} arrays differ (was it trained with "
            "another config?):\n" + "\n".join(faults)
        )


def _composite() -> ocp.Checkpointer:
    """Return a reader and writer of one checkpoint, for use in a `with`."""
    handlers = {name: ocp.PyTreeCheckpointHandler() for name in _STATE_ITEMS}
    handlers["metadata"] = ocp.JsonCheckpointHandler()
    return ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers))


def _json(metadata: dict) -> dict:
    try:
        return json.loads(json.dumps(metadata))
    except TypeError as error:
        raise SfdError(f"checkpoint metadata must be JSON: {error}") from error


@contextlib.contextmanager
def _writing(fault: str) -> Iterator[None]:
    # Orbax and TensorStore raise many types for a full or read-only disk; all mean the same here.
    try:
        yield
    except SfdError:
        raise
    except Exception as error:
        if _of_other_hosts(error):
            raise
        raise SfdError(
            f"{fault}: {_reason(error)}. Complete checkpoints are untouched; make room or choose a folder that "
            "can be written, then run the same command again"
        ) from error


@contextlib.contextmanager
def _reading(path: epath.Path) -> Iterator[None]:
    """Turn any exception of Orbax or TensorStore for an unreadable file into an SfdError that names `path`."""
    try:
        yield
    except SfdError:
        raise
    except Exception as error:
        if _of_other_hosts(error):
            raise
        raise SfdError(
            f"checkpoint {path.parent} cannot be read: {path.name}: {_reason(error)}. If it is damaged: {_DAMAGED}"
        ) from error


def _of_other_hosts(error: BaseException | None) -> bool:
    """Return whether an operation over several hosts failed, which is not a fault of the folder."""
    while error is not None and not isinstance(error, jax.errors.JaxRuntimeError):
        error = error.__cause__ or error.__context__
    return error is not None and jax.process_count() > 1


def _reason(error: Exception) -> str:
    """Return the useful line of an error; TensorStore hides the system's own message in a long one."""
    text = str(error) if isinstance(error, (OSError, ValueError)) and str(error) else f"{type(error).__name__}: {error}"
    code = re.search(r"os_error_code='(\d+)'", text)
    return os.strerror(int(code[1])) if code else text.strip().splitlines()[0][:300]
