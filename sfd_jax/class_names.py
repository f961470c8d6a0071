"""Names of classes: ImageNet's 1,000 in label order, and readable forms of names.

A name may list synonyms separated by commas: "tabby, tabby cat, n02123045"; the first is shown. ImageNet's names end
with the class's WordNet id, the name of its image folder; sorted by id, a class has the same label in all sources.

Source: `imagenet_classes.txt` has the words of WordNet 3.0 (copyright 2006 Princeton University), sorted by id.
"""

import collections
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


@functools.cache
def imagenet_classes() -> tuple[str, ...]:
    """Return the names of ImageNet's 1,000 classes in label order."""
    return tuple(Path(__file__).with_name("imagenet_classes.txt").read_text(encoding="utf-8").splitlines())


def readable(names: Sequence[str] | None) -> list[str] | None:
    """Return class names with WordNet ids of ImageNet replaced by its full names; None stays None."""
    words = {name.rpartition(", ")[2]: name for name in imagenet_classes()}
    return names and [words.get(name, name) for name in names]


def class_names_of(metadata: Mapping[str, Any], num_classes: int) -> tuple[list[str] | None, list[str]]:
    """Return the class names of a diffusion model, and a note if they are assumed.

    Args:
      metadata: of its checkpoint; without "class_names", 1,000 classes are assumed to be ImageNet's.
      num_classes: of the network.

    Returns:
      Names by label or None, and notes.
    """
    if names := readable(metadata.get("class_names")):
        return names, []
    if num_classes != 1000:
        return None, []
    return list(imagenet_classes()), ["class names: ImageNet's, in label order, since there are 1,000 classes"]


def short_names(names: Sequence[str]) -> list[str]:
    """Return the first synonym of each class, with the label where several classes share it: "crane (517)"."""
    short = [name.split(",")[0] for name in names]
    count = collections.Counter(short)
    return [name if count[name] == 1 else f"{name} ({label})" for label, name in enumerate(short)]
