"""Batches: a function of (seed, step, rows); every element once per epoch, one flip for all arrays of an image."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from sfd_jax.data.pipeline import (
    flip_of,
    latent_transform,
    make_batches,
    make_eval_batches,
    pixel_transform,
    read_records,
)
from sfd_jax.errors import SfdError
from sfd_jax.latents import LatentLayout, LatentStatistics

COUNT = 13


@dataclasses.dataclass(frozen=True)
class Squares:
    """A source whose element i holds i and its square."""

    count: int = COUNT

    def __len__(self):
        return self.count

    def read(self, indices, flip):
        return {
            "value": (indices**2).astype(np.float32),
            "flip": flip,
            "label": (indices % 3).astype(np.int32),
            "index": indices,
        }


def batches(**settings):
    defaults = {"seed": 3, "global_batch_size": 8, "flips": True}
    return make_batches(Squares(), **{**defaults, **settings})


def test_an_epoch_holds_every_element_once_and_epochs_differ():
    stream = np.concatenate([batches().at(step)["index"] for step in range(COUNT)])
    epochs = stream.reshape(8, COUNT)  # 13 batches of 8 are 8 epochs of 13: batches cross the ends of epochs
    for epoch in epochs:
        assert sorted(epoch) == list(range(COUNT))
    assert len({tuple(epoch) for epoch in epochs}) == 8
    other = np.concatenate([batches(seed=4).at(step)["index"] for step in range(COUNT)])
    assert not (stream == other).all()


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_the_same_global_batches(hosts):
    for step in (0, 1, 5):
        whole = batches().at(step)
        for rows in np.random.default_rng(0).permutation(8).reshape(hosts, -1):
            part = batches(rows=rows).at(step)
            for name, values in whole.items():
                np.testing.assert_array_equal(part[name], values[rows])


@pytest.mark.parametrize("cache", [False, True])
def test_resuming_at_any_step_continues_the_stream(cache):
    iterator = batches(cache=cache)(0)
    stream = [next(iterator) for _ in range(9)]  # over the ends of four epochs
    for start in (1, 2, 7):
        resumed = next(batches(cache=cache)(start))
        for name, values in stream[start].items():
            np.testing.assert_array_equal(resumed[name], values)
    np.testing.assert_array_equal(stream[4]["value"], stream[4]["index"].astype(np.float32) ** 2)
    assert stream[0]["label"].dtype == np.int32 and stream[0]["index"].dtype == np.int64


@pytest.mark.slow  # two processes that import this package
def test_worker_processes_change_nothing():
    iterator = batches(workers=2)(3)
    for step in (3, 4, 5, 6):
        found, expected = next(iterator), batches().at(step)
        for name, values in expected.items():
            np.testing.assert_array_equal(found[name], values)
    iterator.close()


def test_flips_are_fair_and_differ_between_epochs():
    count = 4000
    indices = np.arange(count)
    first = flip_of(0, np.zeros(count, int), indices)
    second = flip_of(0, np.ones(count, int), indices)
    # Five standard deviations of a fair coin's mean, and of the agreement of two.
    assert abs(first.mean() - 0.5) < 5 * 0.5 / count**0.5
    assert abs((first == second).mean() - 0.5) < 5 * 0.5 / count**0.5
    assert abs((first[1:] == first[:-1]).mean() - 0.5) < 5 * 0.5 / count**0.5


def test_eval_batches_hold_every_element_once_whatever_their_size():
    for size, hosts in ((5, 1), (4, 2), (16, 1), (2, 3)):
        seen, rounds = [], set()
        for host in range(hosts):
            found = list(make_eval_batches(Squares(), batch_size=size, host_index=host, host_count=hosts))
            rounds.add(len(found))
            assert all(len(batch["index"]) == size for batch in found)
            seen += [batch["index"][batch["mask"]] for batch in found]
        assert sorted(np.concatenate(seen)) == list(range(COUNT))
        assert len(rounds) == 1  # hosts that step together must all have a batch


def test_empty_sources_are_refused():
    with pytest.raises(SfdError, match="empty"):
        make_batches(Squares(0), seed=0, global_batch_size=2)


def test_pixels_are_scaled_and_mirrored():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 5, 3), np.uint8)
    source = [{"pixels": pixels[index], "label": index + 1, "index": index} for index in range(2)]
    result = pixel_transform(read_records(source, np.arange(2), np.array([False, True])))
    # One rounding of float32 at most: the division and the subtraction are exact to half an ulp.
    np.testing.assert_allclose(result["pixels"][0], pixels[0] / 127.5 - 1, atol=1e-7)
    np.testing.assert_allclose(result["pixels"][1], pixels[1, :, ::-1] / 127.5 - 1, atol=1e-7)


def test_latents_are_normalised_and_joined():
    random = np.random.default_rng(0)
    shapes = {"texture": (2, 3, 5, 3), "semantic": (2, 3, 5, 2), "repa_features": (2, 15, 7)}
    batch = {name: random.standard_normal(shape).astype(jnp.bfloat16) for name, shape in shapes.items()}
    batch |= {"label": np.array([4, 6], np.int32), "index": np.array([10, 11])}
    statistics = LatentStatistics(
        texture_mean=np.array([1, 2, 3], np.float32),
        texture_std=np.array([2, 4, 7], np.float32),
        semantic_mean=np.array([-1, 1], np.float32),
        semantic_std=np.array([0.5, 0.3], np.float32),
        multiplier=1.5,
    )
    layout = LatentLayout(3, 2)
    result = latent_transform(layout, statistics, repa=True)(batch)
    assert isinstance(result["latents"], np.ndarray) and result["latents"].dtype == np.float32
    texture, semantic = (batch[name].astype(np.float32) for name in ("texture", "semantic"))
    expected = layout.join(statistics.normalise_texture(texture), statistics.normalise_semantic(semantic))
    np.testing.assert_array_equal(result["latents"], expected)  # the same operations, so the same bits
    by_hand = (texture[1, 2, 4, 2] - 3) / 7 * 1.5
    np.testing.assert_allclose(result["latents"][1, 2, 4, 2], by_hand, rtol=1e-6)
    np.testing.assert_array_equal(result["repa_features"], batch["repa_features"])
    del batch["semantic"]
    with pytest.raises(SfdError, match="hold no 'semantic'"):
        latent_transform(layout, statistics)(batch)
