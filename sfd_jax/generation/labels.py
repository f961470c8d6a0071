"""The class label of each sample."""

import re

import jax
import numpy as np

from sfd_jax.errors import SfdError, nearest
from sfd_jax.randomness import keys_by_row
from sfd_jax.ranges import check

# The order of balanced labels does not depend on the seed of the noise.
ORDER_SEED = 0


def make_labels(
    spec: str,
    num: int,
    num_classes: int,
    class_names: list[str] | None = None,
    seed: int = 0,
    trained: np.ndarray | None = None,
) -> np.ndarray:
    """Return the requested labels.

    Args:
      spec: "balanced", "random", or one or more classes in turn, by number or name, separated by commas
        ("207, 360"), or by semicolons if names contain commas ("tench, Tinca tinca; otter").
      num: N, number of samples.
      num_classes: number of classes of the model.
      class_names: their names, if known.
      seed: of "random" labels.
      trained: the labels seen in training, from which "balanced" and "random" choose; all by default.

    Returns:
      (N,) int32 in [0, num_classes).

    Raises:
      SfdError: `num` or `seed` is out of range, or a class does not exist or was not trained.
    """
    check(num=num, seed=seed)
    trained = np.arange(num_classes, dtype=np.int32) if trained is None else trained
    if spec == "balanced":
        return trained[balanced_labels(num, len(trained))]
    if spec == "random":
        return trained[random_labels(num, len(trained), seed)]
    chosen = parse_classes(spec, num_classes, class_names)
    if strange := [label for label in chosen if label not in trained]:
        raise SfdError(f"class {strange[0]} was not trained; give one of {trained[0]}..{trained[-1]}")
    return np.resize(np.array(chosen, np.int32), num)


def balanced_labels(num: int, num_classes: int) -> np.ndarray:
    """Return (N,) int32 labels, N // num_classes of each class and the rest of distinct classes, shuffled.

    One permutation of all N, as released. With a permutation for each run of num_classes samples, every
    split of the inception score would be balanced exactly, and the score higher than the released code's.
    """
    generator = np.random.default_rng(ORDER_SEED)
    each, rest = divmod(num, num_classes)
    extra = generator.permutation(num_classes)[:rest]
    labels = np.concatenate([np.repeat(np.arange(num_classes), each), extra])
    return generator.permutation(labels).astype(np.int32)


def random_labels(num: int, num_classes: int, seed: int) -> np.ndarray:
    """Return (N,) int32 labels, each drawn uniformly, depending on (seed, index) alone."""
    key = jax.random.fold_in(jax.random.key(seed), _LABEL_STREAM)
    draw = jax.vmap(lambda row_key: jax.random.randint(row_key, (), 0, num_classes))
    return np.asarray(jax.jit(lambda rows: draw(keys_by_row(key, rows)))(np.arange(num, dtype=np.uint32)), np.int32)


# Noise folds the sample index into the seed's key; no sample has this index.
_LABEL_STREAM = 2**32 - 1


def parse_classes(spec: str, num_classes: int, class_names: list[str] | None = None) -> list[int]:
    """Return the class numbers of a list of numbers or names; see `make_labels`.

    Case does not matter, nor whether words are joined by spaces, underscores or hyphens. A whole name
    takes precedence, then the first synonym of a class over the same word in the list of another class: "harp" is the
    instrument, not the harmonica.

    Raises:
      SfdError: a number outside [0, num_classes), a name that no class or several classes have, or two names of one
        class.
    """
    names = _labels_by_name(class_names or [])
    comma = ";" if ";" in spec or _plain(spec) in names else ","
    parts = [part.strip() for part in spec.split(comma) if part.strip()]
    if not parts:
        raise SfdError(f"labels '{spec}' contain no class; give 'balanced', 'random', or numbers or names of classes")
    found = [_find_class(part, num_classes, names, class_names) for part in parts]
    spelt = {}
    for part, label in zip(parts, found, strict=True):
        if _plain(other := spelt.setdefault(label, part)) != _plain(part):
            raise SfdError(
                f"'{other}' and '{part}' are the same class, {label}: name it once, or repeat one name for more of it"
            )
    return found


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().lower()


def _labels_by_name(class_names: list[str]) -> dict[str, list[int]]:
    whole, first, others = {}, {}, {}
    for label, name in enumerate(class_names):
        synonyms = [_plain(synonym) for synonym in name.split(",")]
        synonyms += [_plain(re.sub(r", n\d{8}$", "", name))]  # other lists of ImageNet's classes lack the ids
        for found, texts in ((whole, {_plain(name)}), (first, {synonyms[0]}), (others, set(synonyms))):
            for text in texts:
                found.setdefault(text, []).append(label)
    return others | first | whole


def _find_class(text: str, num_classes: int, names: dict[str, list[int]], class_names: list[str] | None) -> int:
    labels = names.get(_plain(text), [])
    if len(labels) == 1:  # before numbers: the names of the digits are numbers
        return labels[0]
    if labels:
        found = " and ".join(f"{label} ({class_names[label]})" for label in labels)
        raise SfdError(f"'{text}' names {len(labels)} classes: {found}; give the number")
    if text.lstrip("-").isdecimal():
        if 0 <= int(text) < num_classes:
            return int(text)
        raise SfdError(f"there is no class {text}: classes are 0..{num_classes - 1}")
    if _plain(text) in ("balanced", "random"):
        raise SfdError(f"'{text}' is no class: give 'balanced' or 'random' alone, in lower case, or classes")
    if not names:
        raise SfdError(f"'{text}' is not a number, and this checkpoint has no class names; give 0..{num_classes - 1}")
    if having := [name for name in names if _plain(text) in name.split() and "," not in name]:
        more = ", ..." if len(having) > 8 else ""
        raise SfdError(f"no class is called '{text}', but there are: {', '.join(having[:8])}{more}")
    is_id = re.compile(r"n\d+").fullmatch
    like = [name for name in names if "," not in name and bool(is_id(name)) == bool(is_id(_plain(text)))]
    hint = nearest(_plain(text), like)
    if len(names) > 20 and not hint.startswith("did you mean"):  # a list of a thousand names is no help
        hint = "give its number"
    raise SfdError(f"no class is called '{text}'; {hint}")
