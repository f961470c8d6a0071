"""Labels: balance, order, and what a user may write."""

import numpy as np
import pytest

from sfd_jax.errors import SfdError
from sfd_jax.generation.labels import balanced_labels, make_labels, random_labels

NAMES = ["tench, Tinca tinca", "goldfish", "crane", "drake", "crane"]


@pytest.mark.parametrize(("num", "classes"), [(50, 10), (53, 10), (7, 10), (1000, 7)])
def test_balanced_labels_are_balanced_and_shuffled(num, classes):
    labels = balanced_labels(num, classes)
    counts = np.bincount(labels, minlength=classes)
    assert labels.shape == (num,) and labels.dtype == np.int32
    assert set(counts) <= {num // classes, -(-num // classes)}
    assert (np.diff(labels) < 0).any()  # not in order of classes
    np.testing.assert_array_equal(labels, balanced_labels(num, classes))


def test_balanced_labels_are_not_balanced_in_every_split():
    # Otherwise each split of the inception score would be exactly balanced, unlike the released code's.
    first = np.bincount(balanced_labels(1000, 10)[:100], minlength=10)
    assert len(set(first)) > 1


def test_random_labels_are_a_function_of_seed_and_index():
    labels = random_labels(500, 10, seed=3)
    np.testing.assert_array_equal(labels[:77], random_labels(77, 10, seed=3))
    assert (labels != random_labels(500, 10, seed=4)).mean() > 0.8
    assert np.bincount(labels, minlength=10).min() > 25  # 50 each expected, standard deviation below 7


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("3", [3, 3, 3, 3, 3]),
        ("3, 0", [3, 0, 3, 0, 3]),
        ("goldfish", [1, 1, 1, 1, 1]),
        ("Tinca tinca", [0, 0, 0, 0, 0]),
        ("tench, Tinca tinca; DRAKE", [0, 3, 0, 3, 0]),
        ("tench, Tinca tinca", [0, 0, 0, 0, 0]),
        ("goldfish,3", [1, 3, 1, 3, 1]),
    ],
)
def test_classes_by_number_and_name(spec, expected):
    np.testing.assert_array_equal(make_labels(spec, 5, 5, NAMES), expected)


@pytest.mark.parametrize(
    ("spec", "names", "words"),
    [
        ("goldfisch", NAMES, "did you mean 'goldfish'"),
        ("5", NAMES, r"no class 5: classes are 0\.\.4"),
        ("-1", NAMES, "no class -1"),
        ("goldfish", None, "has no class names"),
        (" , ", NAMES, "contain no class"),
        ("balance", NAMES, "no class is called"),
    ],
)
def test_unknown_classes_are_refused(spec, names, words):
    with pytest.raises(SfdError, match=words):
        make_labels(spec, 5, 5, names)


def test_no_sample_is_refused():
    with pytest.raises(SfdError, match="num=0: give an integer from 1"):
        make_labels("balanced", 0, 5)
