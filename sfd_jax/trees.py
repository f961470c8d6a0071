"""Trees of arrays by the names of their leaves, and the differences between two."""

from collections.abc import Mapping
from typing import Any

import jax


def named_leaves(tree: Any, separator: str = "/") -> dict[str, Any]:
    """Return the leaves of a tree by their paths, the parts joined by `separator`, in the tree's order."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator=separator): leaf for path, leaf in leaves}


def shapes_by_name(tree: Any, separator: str = "/") -> dict[str, tuple[int, ...]]:
    """Return the shapes of a tree's arrays by their paths; see `named_leaves`."""
    return {name: tuple(leaf.shape) for name, leaf in named_leaves(tree, separator).items()}


def shape_faults(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Compare the shapes of two trees.

    Args:
      found: shape by name, as given.
      expected: shape by name, as it must be.

    Returns:
      An indented line for each array that is missing, extra or of another shape.
    """
    lines = [f"  missing   {name} {shape}" for name, shape in expected.items() if name not in found]
    lines += [f"  extra     {name} {shape}" for name, shape in found.items() if name not in expected]
    lines += [
        f"  misshapen {name} is {found[name]}, expected {shape}"
        for name, shape in expected.items()
        if found.get(name, shape) != shape
    ]
    return lines
