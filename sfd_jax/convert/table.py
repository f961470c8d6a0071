"""One table for each network, used in both directions: their key, our path, the change of layout.

Conventions: "theirs" is a PyTorch state dict, `{key: array}` with Linear weights (out, in) and conv
weights OIHW; "ours" is the nested dict of `Network.init`, kernels (in, out) and HWIO, paths written
with slashes. `{layer}` in a key is an index; where our path lacks it, our array is stacked
along a leading axis. Every array of ours has a row, so the architecture decides which keys must
exist: import and export are strict and cannot miss one.
"""

import base64
import dataclasses
import itertools
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from flax.traverse_util import unflatten_dict

from sfd_jax.convert.file_kinds import fits
from sfd_jax.convert.lazy_array import is_float
from sfd_jax.errors import SfdError
from sfd_jax.models.network import Network
from sfd_jax.trees import named_leaves, shape_faults, shapes_by_name


@dataclasses.dataclass(frozen=True)
class Layout:
    """A change of layout; both functions return views."""

    to_ours: Callable[[np.ndarray], np.ndarray]
    to_theirs: Callable[[np.ndarray], np.ndarray]


LAYOUTS = {
    "same": Layout(lambda a: a, lambda a: a),
    "linear": Layout(lambda a: a.T, lambda a: a.T),
    "conv": Layout(lambda a: a.transpose(2, 3, 1, 0), lambda a: a.transpose(3, 2, 0, 1)),
    # Our 1x1 convolution, their Linear.
    "pointwise": Layout(lambda a: a.T[None, None], lambda a: a[0, 0].T),
    # Tokens and position tables, whose leading axes of length 1 differ.
    "batched": Layout(lambda a: a[None], lambda a: a[0]),
    "first": Layout(lambda a: a[0], lambda a: a[None]),
    "vector": Layout(lambda a: a[None, None], lambda a: a[0, 0]),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a table.

    Args:
      theirs: their key, or several whose arrays are one of ours, joined along their first axis.
      ours: our path.
      layout: a key of LAYOUTS.
    """

    theirs: str | tuple[str, ...]
    ours: str
    layout: str = "same"


def dense_rows(theirs: str, ours: str, layout: str = "linear") -> tuple[Row, Row]:
    """Return the rows of the weight and bias of a Linear, or by `layout` of a convolution."""
    return Row(f"{theirs}.weight", f"{ours}/kernel", layout), Row(f"{theirs}.bias", f"{ours}/bias")


@dataclasses.dataclass(frozen=True)
class Table:
    """The names of a network's arrays in both formats.

    Args:
      network: its name in `sfd_jax.models.NETWORKS`.
      rows: one for every array the network may have; the config decides which exist.
      fixed: returns for a config the arrays that their files store although the architecture computes
        them: checked at import, written at export.
      skipped: patterns of their keys that are not needed (`fnmatch`); never exported.
      renumber: turns the indices of our path, by name, into those of their keys, for a config.
    """

    network: str
    rows: tuple[Row, ...]
    fixed: Callable[[Any], dict[str, np.ndarray]] = lambda config: {}
    skipped: tuple[str, ...] = ()
    renumber: Callable[[Any, dict[str, str]], dict[str, Any]] = lambda config, indices: indices


@dataclasses.dataclass(frozen=True)
class _Slot:
    """One of their arrays (or several, joined) and its place in one of ours."""

    path: str
    layer: int | None
    keys: tuple[str, ...]
    layout: Layout
    their_shape: tuple[int, ...]  # of each key

    def take(self, ours: np.ndarray) -> dict[str, np.ndarray]:
        """Return their arrays by key, views of ours."""
        array = self.layout.to_theirs(ours if self.layer is None else ours[self.layer])
        parts = np.split(array, len(self.keys)) if self.keys[1:] else [array]
        return dict(zip(self.keys, parts, strict=True))

    def fill(self, ours: np.ndarray, state: Mapping[str, Any]) -> np.ndarray:
        """Write their arrays into ours; return the part of ours that they fill."""
        theirs = [np.asarray(state[key]) for key in self.keys]
        theirs = theirs[0] if len(theirs) == 1 else np.concatenate(theirs)
        target = ours if self.layer is None else ours[self.layer, ...]
        with np.errstate(over="ignore", invalid="ignore"):  # the caller counts numbers that are not finite
            target[...] = self.layout.to_ours(theirs)
        return target


def import_params(
    table: Table,
    state: Mapping[str, Any],
    network: Network,
    *,
    source: str = "this state dict",
    allow_nonfinite: bool = False,
    place: Callable[[np.ndarray], Any] = lambda array: array,
) -> dict[str, Any]:
    """Turn their state dict into our parameters.

    Args:
      table: the network's table.
      state: their arrays by key, loaded one at a time (NumPy, `LazyArray`, anything with shape,
        dtype and `__array__`).
      network: the network to fill; decides which arrays must exist.
      source: what errors call the state dict.
      allow_nonfinite: accept weights that are NaN or infinite, or too large for float32.
      place: applied to each finished array of ours, e.g. `jax.device_put`; host memory holds at most
        one finished array and one of theirs, besides what `place` returns.

    Returns:
      The nested dict of `network.init`, float32.

    Raises:
      SfdError: names every missing, extra and misshapen array with the shapes, every fixed table that
        differs from the computed one, or every array with numbers that are not finite.
    """
    _check_strictly(table, state, network, source)
    shapes = shapes_by_name(network.abstract_params())
    params: dict[str, Any] = {}
    faults: list[str] = []
    for path, slots in itertools.groupby(_slots(table, network), key=lambda slot: slot.path):
        ours = np.empty(shapes[path], np.float32)
        for slot in slots:
            faults += _nonfinite(" and ".join(slot.keys), slot.fill(ours, state))
        params[path] = place(ours)
    _refuse_nonfinite(faults, source, allow_nonfinite)
    return unflatten_dict(params, sep="/")


def export_state(
    table: Table,
    params: Mapping[str, Any],
    network: Network,
    kept: Mapping[str, Any] | None = None,
    *,
    allow_nonfinite: bool = False,
) -> dict[str, np.ndarray]:
    """Turn our parameters into their state dict, fixed tables included.

    Args:
      params: the nested dict of `network.init`.
      kept: what `kept_as_stored` returned at the import, for a bit-identical export.
      allow_nonfinite: accept numbers that are NaN or infinite, or too large for the written dtype.

    Returns:
      Arrays in row-major order by their key.

    Raises:
      SfdError: `params` are not this network's; names every missing, extra and misshapen array, or
        every one that is not finite.
    """
    network.check(params)
    kept = kept or {}
    dtypes, tables = kept.get("dtypes", {}), kept.get("fixed", {})
    state = {}
    faults: list[str] = []
    for key, array in to_their_keys(table, params, network):
        with np.errstate(over="ignore", invalid="ignore"):  # counted below
            state[key] = np.array(array, _dtype(dtypes.get(key, "float32")), order="C")
        faults += [] if allow_nonfinite else _nonfinite(key, state[key])
    _refuse_nonfinite(faults, "this checkpoint", allow_nonfinite)
    for key, array in table.fixed(network.config).items():
        state[key] = _unpack(tables[key]) if key in tables else array
    return state


def kept_as_stored(table: Table, state: Mapping[str, Any], network: Network) -> dict[str, Any]:
    """Return what our checkpoint must record to write the same bytes again, JSON-able.

    Dtypes other than float32 are recorded by key. Fixed tables of released files come from another
    mathematical library and differ from ours in the last bit, so those that differ are kept as they
    are, compressed (rotary tables are so repetitive that they become small).
    """
    dtypes = {key: np.dtype(state[key].dtype).name for key in key_shapes(table, network)}
    fixed = {}
    for key, ours in table.fixed(network.config).items():
        if key in state:
            theirs = np.asarray(state[key])
            if theirs.dtype != ours.dtype or theirs.tobytes() != ours.tobytes():
                fixed[key] = _pack(theirs)
    return {"dtypes": {k: d for k, d in dtypes.items() if d != "float32"}, "fixed": fixed}


def skipped_keys(table: Table, state: Mapping[str, Any]) -> str:
    """Return the patterns of the table that leave keys out, as "PATTERN (COUNT)"; "" for none."""
    counts = [(pattern, sum(fits(key, (pattern,)) for key in state)) for pattern in table.skipped]
    return ", ".join(f"{pattern} ({count})" for pattern, count in counts if count)


def key_shapes(table: Table, network: Network) -> dict[str, tuple[int, ...]]:
    """Return the keys and shapes that a state dict of this network must have, without the fixed ones."""
    return {key: slot.their_shape for slot in _slots(table, network) for key in slot.keys}


def to_their_keys(table: Table, tree: Mapping[str, Any], network: Network) -> Iterator[tuple[str, np.ndarray]]:
    """Yield their keys and arrays (views in their layout) for a tree like the parameters (gradients, moments)."""
    leaves = named_leaves(tree)
    for path, slots in itertools.groupby(_slots(table, network), key=lambda slot: slot.path):
        ours = np.asarray(leaves[path])
        for slot in slots:
            yield from slot.take(ours).items()


def shape_of(state: Mapping[str, Any], key: str, rank: int | None = None) -> tuple[int, ...]:
    """Return the shape of an array that the architecture is read from.

    Raises:
      SfdError: it is missing, or does not have `rank` axes.
    """
    if key not in state:
        raise SfdError(f"missing {key}: the architecture cannot be read without it")
    shape = tuple(state[key].shape)
    if rank is not None and len(shape) != rank:
        raise SfdError(f"misshapen {key} is {shape}, expected {rank} axes")
    return shape


def _check_strictly(table: Table, state: Mapping[str, Any], network: Network, source: str) -> None:
    expected = key_shapes(table, network)
    fixed = {key: array for key, array in table.fixed(network.config).items() if key in state}
    skipped = [key for key in state if key not in expected and fits(key, table.skipped)]
    faults = shape_faults(
        {key: tuple(array.shape) for key, array in state.items() if key not in skipped},
        expected | {key: array.shape for key, array in fixed.items()},
    )
    for key in (key for key in expected if key in state and not is_float(state[key].dtype)):
        faults.append(f"  not float {key} is {np.dtype(state[key].dtype).name}")
    for key, array in fixed.items():
        if tuple(state[key].shape) == array.shape and not _agree(np.asarray(state[key]), array):
            faults.append(f"  changed   {key} is a fixed table, but differs from the one this network computes")
    if faults:
        raise SfdError(f"{source} does not fit {table.network} ({network.described()}):\n" + "\n".join(faults))


def _nonfinite(name: str, array: np.ndarray) -> list[str]:
    """Return a line that names an array and counts its numbers that are not finite; [] where all are finite."""
    finite = np.isfinite(array)
    if finite.all():
        return []
    nan = int(np.isnan(array).sum())
    return [f"  {name}: {nan} NaN and {finite.size - int(finite.sum()) - nan} infinite of {finite.size}"]


def _refuse_nonfinite(faults: list[str], source: str, allowed: bool) -> None:
    if faults and not allowed:
        raise SfdError(
            f"{source}: weights that are not finite, as after a run that diverged, in {len(faults)} arrays; take an "
            "earlier checkpoint, or give --allow_nonfinite:\n" + "\n".join(faults)
        )


def _agree(stored: np.ndarray, computed: np.ndarray) -> bool:
    # Angles up to 100 have an error of 4e-6 in float32; half precision rounds to 4e-3.
    tolerance = 2e-5 if stored.dtype.itemsize >= 4 else 1e-2
    return bool(np.max(np.abs(stored.astype(np.float32) - computed), initial=0) <= tolerance)


def _dtype(name: str) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def _slots(table: Table, network: Network) -> Iterator[_Slot]:
    """Expand the rows over the arrays that this network has, in our order."""
    for path, shape in shapes_by_name(network.abstract_params()).items():
        row, indices = _find_row(table, path)
        layout = LAYOUTS[row.layout]
        theirs = (row.theirs,) if isinstance(row.theirs, str) else row.theirs
        stacked = "{layer}" in theirs[0] and "layer" not in indices
        inner = shape[1:] if stacked else shape
        # A broadcast zero has the shape but takes no memory.
        joined = layout.to_theirs(np.broadcast_to(np.float32(0), inner)).shape
        their_shape = (joined[0] // len(theirs), *joined[1:]) if joined else ()
        for layer in range(shape[0]) if stacked else [None]:
            names = table.renumber(network.config, indices) | ({"layer": layer} if stacked else {})
            keys = tuple(key.format_map(names) for key in theirs)
            yield _Slot(path, layer, keys, layout, their_shape)


def _find_row(table: Table, path: str) -> tuple[Row, dict[str, str]]:
    for row in table.rows:
        pattern = re.sub(r"\\{(\w+)\\}", r"(?P<\1>\\d+)", re.escape(row.ours))
        if match := re.fullmatch(pattern, path):
            return row, match.groupdict()
    raise AssertionError(f"the table of {table.network} has no row for {path}")


def _pack(array: np.ndarray) -> dict[str, Any]:
    data = base64.b64encode(zlib.compress(array.tobytes(), 9)).decode()
    return {"shape": list(array.shape), "dtype": array.dtype.name, "zlib": data}


def _unpack(packed: Mapping[str, Any]) -> np.ndarray:
    data = zlib.decompress(base64.b64decode(packed["zlib"]))
    return np.frombuffer(data, _dtype(packed["dtype"])).reshape(packed["shape"])
