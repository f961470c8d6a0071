"""The channel layout and the statistics of latents."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from sfd_jax.errors import SfdError
from sfd_jax.latents import LatentLayout, LatentStatistics

LAYOUT = LatentLayout(texture_channels=5, semantic_channels=3)


def statistics(seed=0):
    rng = np.random.default_rng(seed)
    return LatentStatistics(
        texture_mean=rng.normal(size=5),
        texture_std=rng.uniform(0.5, 2, size=5),
        semantic_mean=rng.normal(size=3),
        semantic_std=rng.uniform(0.5, 2, size=3),
        multiplier=0.7,
    )


def test_split_undoes_join_and_texture_is_first():
    rng = np.random.default_rng(0)
    texture, semantic = rng.normal(size=(2, 7, 11, 5)), rng.normal(size=(2, 7, 11, 3))
    latents = LAYOUT.join(texture, semantic)
    assert latents.shape == (2, 7, 11, 8) and LAYOUT.channels == 8
    np.testing.assert_array_equal(latents[..., :5], np.float32(texture))
    back = LAYOUT.split(latents)
    np.testing.assert_array_equal(back[0], np.float32(texture))
    np.testing.assert_array_equal(back[1], np.float32(semantic))


def test_per_channel_spreads_scalars_and_rows():
    np.testing.assert_array_equal(LAYOUT.per_channel(1, 2), [1, 1, 1, 1, 1, 2, 2, 2])
    rows = LAYOUT.per_channel(jnp.array([1.0, 3.0]), jnp.array([2.0, 4.0]))
    np.testing.assert_array_equal(rows, [[1] * 5 + [2] * 3, [3] * 5 + [4] * 3])


def test_a_layout_without_semantics():
    layout = LatentLayout(4, 0)
    texture, semantic = layout.split(jnp.ones((2, 3, 3, 4)))
    assert texture.shape[-1] == 4 and semantic.shape[-1] == 0
    np.testing.assert_array_equal(layout.per_channel(1, 2), np.ones(4))


def test_wrong_channels_are_named():
    with pytest.raises(SfdError, match="8 channels"):
        LAYOUT.split(jnp.ones((2, 3, 3, 9)))
    with pytest.raises(SfdError, match="semantic latents"):
        LAYOUT.join(jnp.ones((2, 5)), jnp.ones((2, 5)))
    with pytest.raises(SfdError, match="texture_channels=0"):
        LatentLayout(0, 3)


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
def test_normalisation_by_hand_and_back(array):
    known = LatentStatistics([1.0, -1.0], [2.0, 4.0], [3.0], [0.5], multiplier=2.0)
    raw = array(np.float32([[5.0, 3.0]]))
    np.testing.assert_array_equal(known.normalise_texture(raw), [[4.0, 2.0]])
    np.testing.assert_array_equal(known.denormalise_texture(known.normalise_texture(raw)), raw)
    np.testing.assert_array_equal(known.normalise_semantic(array(np.float32([[4.0]]))), [[4.0]])
    np.testing.assert_array_equal(known.denormalise_semantic(array(np.float32([[4.0]]))), [[4.0]])


def test_statistics_survive_json_bit_for_bit():
    before = statistics()
    after = LatentStatistics.from_dict(json.loads(json.dumps(before.to_dict())))
    for name in ("texture_mean", "texture_std", "semantic_mean", "semantic_std"):
        np.testing.assert_array_equal(getattr(before, name), getattr(after, name))
        assert getattr(after, name).dtype == np.float32
    assert before.hash() == after.hash() != statistics(1).hash()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(texture_std=[1.0, 0.0]), "positive"),
        (dict(texture_mean=[1.0, np.nan]), "finite"),
        (dict(texture_mean=[1.0]), "1 means but 2"),
    ],
)
def test_impossible_statistics_are_refused(fields, message):
    good = dict(texture_mean=[0, 0], texture_std=[1, 1], semantic_mean=[], semantic_std=[])
    LatentStatistics(**good)
    with pytest.raises(SfdError, match=message):
        LatentStatistics(**good | fields)
    with pytest.raises(SfdError, match="unknown \\['scale'\\]"):
        LatentStatistics.from_dict(statistics().to_dict() | {"scale": 1.0})
