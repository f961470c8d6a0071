"""Labels: balance, order, and what a user may write."""

import re

import numpy as np
import pytest

from sfd_jax.class_names import class_names_of, imagenet_classes, short_names
from sfd_jax.errors import SfdError
from sfd_jax.generation.labels import balanced_labels, make_labels, parse_classes, random_labels

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
        ("TINCA_tinca", [0, 0, 0, 0, 0]),
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
        ("balanced, 3", NAMES, "'balanced' is no class: give 'balanced' or 'random' alone"),
        ("crane", NAMES, r"names 2 classes: 2 \(crane\) and 4 \(crane\); give the number"),
    ],
)
def test_unknown_classes_are_refused(spec, names, words):
    with pytest.raises(SfdError, match=words):
        make_labels(spec, 5, 5, names)


def test_no_sample_is_refused():
    with pytest.raises(SfdError, match="num=0: give an integer from 1"):
        make_labels("balanced", 0, 5)


@pytest.mark.parametrize(
    ("spec", "label"),
    [
        ("tench", 0),
        ("goldfish", 1),
        ("Golden_Retriever", 207),
        ("tabby", 281),
        ("otter", 360),
        ("n02444819", 360),
        ("harp", 594),  # and not the harmonica, which has it as a synonym
        ("volcano", 980),
        ("toilet tissue", 999),
        ("toilet tissue, toilet paper, bathroom tissue, n15075141", 999),
        ("toilet tissue, toilet paper, bathroom tissue", 999),  # as lists of the classes without ids have it
    ],
)
def test_classes_of_imagenet(spec, label):
    assert make_labels(spec, 1, 1000, list(imagenet_classes())).tolist() == [label]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("crane", r"134 \(crane, n02012849\) and 517 \(crane, n03126707\); give the number"),
        ("maillot", "638 .* and 639"),
        ("cat", "there are: .*tabby cat"),
        ("oter", "did you mean 'otter'"),
        ("qqqq", "'qqqq'; give its number"),
        ("207-210", "'207-210'; give its number"),
        ("n0209960", "did you mean 'n02099601'"),
    ],
)
def test_names_that_several_classes_of_imagenet_have_or_none(spec, words):
    with pytest.raises(SfdError, match=words):
        make_labels(spec, 1, 1000, list(imagenet_classes()))


def test_one_class_by_two_names_is_refused():
    names = list(imagenet_classes())
    assert parse_classes("tabby, tabby cat;207", 1000, names) == [281, 207]
    assert parse_classes("tabby, Tabby, 207", 1000, names) == [281, 281, 207]  # more of one class
    for spec in ("tabby,tabby cat", "tabby;tabby cat;207"):
        with pytest.raises(SfdError, match="'tabby' and 'tabby cat' are the same class, 281: name it once"):
            parse_classes(spec, 1000, names)


def test_a_whole_name_goes_before_a_synonym():
    names = ["salt, pepper", "salt"]
    assert [parse_classes(spec, 2, names) for spec in ("salt", "pepper", "salt, pepper")] == [[1], [0], [0]]


def test_the_classes_of_imagenet_are_a_thousand_and_sorted_by_id():
    ids = [name.rpartition(", ")[2] for name in imagenet_classes()]
    assert len(set(ids)) == 1000 and ids == sorted(ids) and all(re.fullmatch(r"n\d{8}", each) for each in ids)
    assert len(set(short_names(imagenet_classes()))) == 1000 and short_names(imagenet_classes())[517] == "crane (517)"


def test_folders_called_by_ids_get_words_and_a_thousand_classes_without_names_are_imagenet():
    names, notes = class_names_of({"class_names": ["n02444819", "mine"]}, 2)
    assert names == ["otter, n02444819", "mine"] and not notes
    assert parse_classes("otter, n02444819", 2, names) == [0]
    names, notes = class_names_of({"class_names": None}, 1000)
    assert names[360].startswith("otter") and "ImageNet" in notes[0]
    assert class_names_of({}, 10) == (None, [])
