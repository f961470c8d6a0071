"""Checkpoints whose metadata do not belong together are refused; what cannot be compared is noted."""

import dataclasses
import functools

import numpy as np
import pytest
from test_sampler import CLASSES, EULER, dit, statistics, vae

from sfd_jax.diffusion.clocks import CLOCKS, FixedOffset, Synchronous, join_params
from sfd_jax.errors import SfdError
from sfd_jax.generation import SampleConfig, make_labels, make_sampler, sampler
from sfd_jax.generation.parts import clocks_of
from sfd_jax.latents import LatentStatistics
from sfd_jax.models.fingerprint import params_hash

OURS = {
    "weights": {"texture_vae": params_hash(vae()[0]), "semantic_vae": "5" * 64},
    "image_size": 8,
    "labels": [0, 1, 2, 3, 4],
}
GUIDED = SampleConfig(solver="euler", num_steps=5, guidance="autoguidance", guidance_scale=2.0)


def model(seed=0, width=16, **metadata):
    params, own = dit(seed, width)
    return params, {**own, "latents": OURS, **metadata}


def made_by(**weights):
    return {**OURS, "weights": {**OURS["weights"], **weights}}


def notes(*args, **kwargs):
    return make_sampler(*args, **kwargs).recipe["notes"]


def test_the_texture_vae_is_the_one_that_made_the_latents():
    assert notes(model(), vae(), EULER) == []
    stored_in_half = {"a": np.float16([1, 2])}, {"a": np.float32([1, 2])}
    assert params_hash(stored_in_half[0]) == params_hash(stored_in_half[1]) != params_hash({"a": np.float32([1, 3])})
    other = model(latents=made_by(texture_vae="7" * 64))
    given = vae()[0], {**vae()[1], "given_as": "--texture_vae=theirs"}
    with pytest.raises(
        SfdError,
        match=r"--texture_vae=theirs \(.{12}\) is not the texture VAE .* \(777777777777\).*--other_texture_vae",
    ):
        make_sampler(other, given, EULER)
    [note] = notes(other, given, EULER, other_texture_vae=True)
    assert "is not the texture VAE that made" in note and "as --other_texture_vae allows" in note
    with pytest.raises(SfdError, match="--other_texture_vae has no effect"):
        make_sampler(model(), vae(), EULER, other_texture_vae=True)
    bigger = notes(model(latents={**OURS, "image_size": 16}), vae(), EULER)
    assert bigger == ["the samples have 8 px; the model's latents were made from images of 16 px"]
    [note] = notes(model(latents=None), vae(), EULER)  # a converted or old checkpoint
    assert "does not say which texture VAE" in note


@pytest.mark.parametrize(
    ("weak", "words"),
    [
        (lambda: model(), "are the same network"),
        (lambda: model(5, 8, latents=made_by(semantic_vae="6" * 64)), "semantic_vae 666666666666, not 555555555555"),
        (
            lambda: model(5, 8, latents={**OURS, "weights": {"texture_vae": OURS["weights"]["texture_vae"]}}),
            "semantic_vae none",
        ),
        (
            lambda: model(5, 8, latent_statistics=statistics() | {"texture_std": [2.0, 2.0, 2.1]}),
            "different latent statistics",
        ),
        (lambda: model(5, 8, class_names=[f"name {i}" for i in reversed(range(CLASSES))]), "different class names"),
        (lambda: model(5, 8, latents={**OURS, "labels": [0, 1, 4]}), "the weak model lacks 2, the first is 2"),
        (lambda: model(5, 8, config={"clocks": {"name": "fixed_offset", "delta_t": 0.5}}), "different clocks"),
        (lambda: model(5, 8, config={"loss": {"path": {"name": "gvp"}}}), "different paths"),
    ],
)
def test_a_weak_model_of_another_system_is_refused(weak, words):
    strong = model(config={"clocks": {"name": "fixed_offset", "delta_t": 0.3}})
    with pytest.raises(SfdError, match=words):
        make_sampler(strong, vae(), GUIDED, weak=weak())


def test_a_weak_model_of_the_same_system_is_taken():
    rounded = statistics() | {"texture_mean": [0.001, 0.1, 0.2]}  # measured again: a two-thousandth of the deviation
    assert notes(model(), vae(), GUIDED, weak=model(5, 8, latent_statistics=rounded)) == []
    [note] = notes(model(5, 8), vae(), GUIDED, weak=model())
    assert "the weak model is the stronger one" in note
    [note] = notes(model(), vae(), GUIDED, weak=model(5, step=4))
    assert "3 steps" in note


@dataclasses.dataclass(frozen=True)
class Warp(Synchronous):
    """A custom single clock with trained parameters."""

    power: float = 2.0

    def init(self, key):
        return {"bend": np.float32(0)}

    def times(self, tau):
        return tau**self.power, tau**self.power


def test_clocks_are_those_of_the_checkpoint(monkeypatch):
    monkeypatch.setitem(CLOCKS, "warp", Warp)
    for two_clocks, silent in ((True, FixedOffset()), (False, Synchronous())):
        network = {"network_config": {"two_clocks": two_clocks}}
        assert clocks_of(network) == silent
        assert clocks_of({**network, "config": {"clocks": {"name": "warp", "power": 3.0}}}) == Warp(3.0)


def test_scan_blocks_is_as_in_training(monkeypatch):
    seen = []
    monkeypatch.setattr(sampler, "Sampler", lambda *args, **kwargs: seen.append(kwargs["scan_blocks"]))
    make_sampler(model(config={"model": {"scan_blocks": False}}), vae(), EULER)
    assert seen == [False]


def test_a_weak_model_with_other_learned_clocks_is_noted(monkeypatch):
    monkeypatch.setitem(CLOCKS, "warp", Warp)

    def trained(bend, *args):
        params, metadata = model(*args, config={"clocks": {"name": "warp"}})
        return join_params(params, {"bend": np.float32(bend)}), metadata

    assert notes(trained(1), vae(), GUIDED, weak=trained(1, 5, 8)) == []
    [note] = notes(trained(1), vae(), GUIDED, weak=trained(2, 5, 8))
    assert "learned different clocks" in note


def test_classifier_free_guidance_needs_label_dropout():
    guided = SampleConfig(solver="euler", num_steps=5, guidance="cfg", guidance_scale=2.0)
    assert notes(model(config={"loss": {"label_dropout": 0.1}}), vae(), guided) == []
    with pytest.raises(SfdError, match="needs label dropout in training"):
        make_sampler(model(config={"loss": {"label_dropout": 0.0}}), vae(), guided)


def test_given_statistics_must_match_the_checkpoint():
    own = LatentStatistics.from_dict(statistics())
    assert make_sampler(model(), vae(), EULER, statistics=own).recipe["latent_statistics"] == own.hash()
    other = LatentStatistics.from_dict(statistics() | {"texture_std": [1.0, 1.0, 1.0]})
    with pytest.raises(SfdError, match="has other latent statistics"):
        make_sampler(model(), vae(), EULER, statistics=other)
    assert (
        make_sampler(model(latent_statistics=None), vae(), EULER, statistics=other).recipe["latent_statistics"]
        == other.hash()
    )


@pytest.mark.parametrize(
    ("metadata", "trained"),
    [
        ({"latents": {**OURS, "labels": [1, 3]}}, [1, 3]),
        ({"latents": None, "class_names": ["a", "b", "c"]}, [0, 1, 2]),  # an older checkpoint has names alone
    ],
)
def test_only_classes_that_were_trained_are_sampled(metadata, trained):
    sampler = make_sampler(model(**metadata), vae(), EULER)
    assert any(f"has 5 classes, of which {len(trained)} were trained" in note for note in sampler.recipe["notes"])
    draw = functools.partial(make_labels, num_classes=5, class_names=sampler.class_names, trained=sampler.labels)
    assert np.unique(draw("random", 40)).tolist() == trained
    assert np.bincount(draw("balanced", 6))[trained].tolist() == [6 // len(trained)] * len(trained)
    for use in (
        lambda: draw("4", 2),
        lambda: sampler(np.arange(2), np.array([1, 4])),
        lambda: sampler.latents(np.arange(1), np.array([4])),
    ):
        with pytest.raises(SfdError, match="class 4 was not trained"):
            use()


@pytest.mark.parametrize(
    ("metadata", "share"),
    [
        ({"average": {"decay": 0.9, "from": "drawn weights"}}, "72.9%"),
        ({"config": {"train": {"ema_decay": 0.9}}}, "72.9%"),  # an older run without `average`
        ({"average": {"decay": 0.9, "from": "drawn weights"}, "which": "raw"}, None),
        ({"average": {"decay": 0.9, "from": "given weights"}}, None),
        ({"average": {"decay": 0.3, "from": "drawn weights"}}, None),  # 2.7 % after three steps
    ],
)
def test_an_ema_dominated_by_initial_weights_is_noted(metadata, share):
    early_vae = (
        vae()[0],
        {**vae()[1], "average": {"decay": 0.9, "from": "drawn weights"}},
    )  # no note: it made the latents
    found = notes(model(**metadata), early_vae, EULER)
    assert len(found) == (share is not None) and all(f"still hold {share} of the initial" in note for note in found)


def test_path_and_prediction_are_those_of_the_checkpoint():
    loss = {"path": {"name": "gvp"}, "prediction": {"name": "noise", "eps": 0.01, "weight": "velocity"}}
    plain, other = make_sampler(model(), vae(), EULER), make_sampler(model(config={"loss": loss}), vae(), EULER)
    assert {key: other.recipe[key] for key in loss} == loss
    assert not loss.keys() & plain.recipe.keys()  # recipes of the usual ones are as before
    # The same network, whose output is read as noise: at t = 0.5, GVP has alpha = sigma = sqrt(1/2).
    latents = np.random.default_rng(0).standard_normal((2, *plain._latent_shape)).astype(np.float32)
    at, labels = np.full(2, 0.5, np.float32), np.zeros(2, np.int32)
    output, velocity = (made._velocity_fn(made._params, labels)(latents, at, at) for made in (plain, other))
    np.testing.assert_allclose(velocity, np.pi / 2 * (latents - np.sqrt(2) * output), atol=1e-4)
