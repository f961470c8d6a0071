"""What classes are called: ImageNet's 1,000 in label order, and names as people read them.

A name may list synonyms, split by commas, the first of which is shown: "tabby, tabby cat, n02123045". ImageNet's end
with the class's WordNet id, which is what its image folders are called; so all sources mean one class by one label.

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
    """Return class names with words beside those that are WordNet ids of ImageNet; None stays None."""
    words = {name.rpartition(", ")[2]: name for name in imagenet_classes()}
    return names and [words.get(name, name) for name in names]


def class_names_of(metadata: Mapping[str, Any], num_classes: int) -> tuple[list[str] | None, list[str]]:
    """Return the class names of a diffusion model, and a sentence where they are assumed.

    Args:
      metadata: of its checkpoint; where "class_names" is missing, 1,000 classes are taken for ImageNet's.
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
