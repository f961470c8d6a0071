"""From images to scores: every image counts once for all batch sizes and devices; statistics name their extractor."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sfd_jax.distributed import make_mesh
from sfd_jax.errors import SfdError
from sfd_jax.evaluation import (
    Comparison,
    Extractor,
    compare,
    encoder_extractor,
    evaluate,
    extract_features,
    gather,
    image_set_of,
    load_statistics,
    open_reference,
    save_statistics,
)
from sfd_jax.evaluation.evaluate import ADM_METRICS
from sfd_jax.evaluation.features import CPU_OPTIONS, _cpu_options
from sfd_jax.evaluation.reference import Reference
from sfd_jax.models import Network
from sfd_jax.models.encoders import dinov2_config

GENERATOR = np.random.default_rng(0)
SAMPLES = GENERATOR.integers(0, 256, (300, 5, 3, 3), dtype=np.uint8)
REFERENCE = GENERATOR.integers(0, 200, (211, 5, 3, 3), dtype=np.uint8)


def stand_in(name="inception", seed=0):
    """A small extractor with all three kinds of features, computed exactly: sums of bytes times eighths."""
    weights = np.random.default_rng(seed).integers(-8, 9, (45, 7)).astype(np.float32) / 8

    def apply(params, images):
        features = images.reshape(len(images), 45) @ params["weights"]
        return {
            "features": features,
            "spatial": features[:, :3] ** 2,
            "probabilities": jax.nn.softmax(features / 500, axis=-1),
        }

    return Extractor(name, {"weights": weights}, apply)


def reference_of(images, name="reference"):
    return Reference(name, None, image_set_of(name, images), "")


@pytest.mark.parametrize(("batch_size", "devices"), [(1, 1), (7, 1), (64, 1), (1, 8), (64, 8)])
def test_every_image_counts_once(batch_size, devices):
    # The features are exact in float32, so only counting, order and float64 sums are tested.
    mesh = make_mesh(devices=jax.devices()[:devices])
    [(statistics, score)] = gather(
        image_set_of("samples", SAMPLES),
        [stand_in()],
        keep_features=[True],
        batch_size=batch_size,
        mesh=mesh,
        split_size=70,
    )
    features = SAMPLES.reshape(300, 45).astype(np.float64) @ stand_in().params["weights"]
    np.testing.assert_array_equal(statistics.features, features)
    mean, covariance = statistics.gaussians["features"]
    np.testing.assert_allclose(mean, features.mean(axis=0), rtol=1e-9)  # the bound
    np.testing.assert_allclose(covariance, np.cov(features, rowvar=False), rtol=1e-9)
    probabilities = np.exp(features / 500) / np.exp(features / 500).sum(axis=1, keepdims=True)
    parts = [probabilities[i : i + 70] for i in range(0, 300, 70)]
    scores = [np.exp((p * np.log(p / p.mean(axis=0))).sum(axis=1).mean()) for p in parts]
    assert score == pytest.approx(np.mean(scores), rel=1e-5)  # float32 softmax
    assert statistics.count == 300


def test_pieces_of_any_size_are_kept_in_order():
    pieces = [SAMPLES[:3], SAMPLES[3:3], SAMPLES[3:150], SAMPLES[150:300]]
    rows = [answer["features"] for [answer] in extract_features([stand_in()], pieces, batch_size=16)]
    assert [len(part) for part in rows] == [16] * 18 + [12]
    np.testing.assert_array_equal(
        np.concatenate(rows), SAMPLES.reshape(300, 45).astype(np.float32) @ stand_in().params["weights"]
    )


def test_an_option_that_xla_does_not_know_is_left_out(monkeypatch):
    assert _cpu_options() == CPU_OPTIONS
    monkeypatch.setattr("sfd_jax.evaluation.features.CPU_OPTIONS", {"xla_cpu_of_another_version": "yes"})
    assert _cpu_options() is None


def test_statistics_file_gives_the_same_scores_as_the_images(tmp_path):
    samples, extractor = image_set_of("samples", SAMPLES), stand_in()
    direct = evaluate(samples, reference_of(REFERENCE), extractor, metrics=(*ADM_METRICS, "kid"))
    [(statistics, _)] = gather(image_set_of("reference", REFERENCE), [extractor], keep_features=[True])
    save_statistics(tmp_path / "reference.npz", statistics)
    stored = evaluate(samples, open_reference(tmp_path / "reference.npz"), extractor, metrics=(*ADM_METRICS, "kid"))
    assert direct == stored
    assert set(direct) == {"fid", "sfid", "is", "precision", "recall", "kid", "kid_std"}
    assert load_statistics(tmp_path / "reference.npz").source == image_set_of("", REFERENCE).hash()


def test_adm_references_keep_their_own_mean_and_covariance(tmp_path):
    zero = {"mu": np.zeros(7), "sigma": np.eye(7), "mu_s": np.zeros(3), "sigma_s": np.eye(3)}
    np.savez(tmp_path / "adm.npz", arr_0=REFERENCE, **zero)
    samples, extractor = image_set_of("samples", SAMPLES), stand_in()
    ours = evaluate(samples, open_reference(tmp_path / "adm.npz"), extractor)
    plain = evaluate(samples, reference_of(REFERENCE), extractor)
    assert ours["fid"] != plain["fid"] and ours["sfid"] != plain["sfid"]  # those of the file
    assert ours["precision"] == plain["precision"] and ours["recall"] == plain["recall"]  # those of its images


def test_equal_images_have_distance_0():
    same = evaluate(image_set_of("a", SAMPLES), reference_of(SAMPLES), stand_in())
    assert same["fid"] < 1e-6 and same["precision"] == same["recall"] == 1.0


def test_two_extractors_read_the_samples_once():
    reads = []

    def pieces(n):
        reads.append(n)
        return image_set_of("", SAMPLES).pieces(n)

    samples = dataclasses.replace(image_set_of("samples", SAMPLES), pieces=pieces)
    first, second = stand_in("inception"), stand_in("dinov2", seed=1)
    reference = reference_of(REFERENCE)
    both = compare(samples, [Comparison(reference, first), Comparison(reference, second, ("fid",))])
    assert len(reads) == 1
    assert both[0]["fid"] == evaluate(samples, reference, first)["fid"]
    assert both[1] == evaluate(samples, reference, second, metrics=("fid",))
    assert both[0]["fid"] != both[1]["fid"]


@pytest.mark.parametrize("change", ["weights", "settings", "name"])
def test_statistics_of_another_extractor_are_refused(tmp_path, change):
    [(statistics, _)] = gather(image_set_of("reference", REFERENCE), [stand_in()], keep_features=[False])
    save_statistics(tmp_path / "s.npz", statistics)
    other = {
        "weights": stand_in(seed=1),
        "settings": dataclasses.replace(stand_in(), settings="another size"),
        "name": stand_in("dinov2"),
    }[change]
    with pytest.raises(SfdError, match="make the statistics again"):
        evaluate(image_set_of("samples", SAMPLES), open_reference(tmp_path / "s.npz"), other, metrics=("fid",))


def no_pieces(n):
    raise AssertionError("samples are made before impossible metrics are refused")


@pytest.mark.parametrize("size", [(5, 3), None])
def test_widths_are_compared_before_the_first_sample(tmp_path, size):
    samples = dataclasses.replace(image_set_of("samples", SAMPLES), pieces=no_pieces, size=size)
    extractor = stand_in()
    if size is None:  # unknown before reading; this extractor accepts any size
        extractor = dataclasses.replace(extractor, apply=lambda params, x: {"features": x[:, 0, :7, 0]})
    for arrays, words in (
        (dict(mu=np.zeros(8), sigma=np.eye(8)), "of 8 features, but extractor 'inception' has 7"),
        (dict(mu=np.zeros(7), sigma=np.eye(7), mu_s=np.zeros(2), sigma_s=np.eye(2)), "has 3 .'spatial'."),
    ):
        if size is None and "mu_s" in arrays:
            continue
        np.savez(tmp_path / "r.npz", **arrays)
        with pytest.raises(SfdError, match=words):
            evaluate(samples, open_reference(tmp_path / "r.npz"), extractor, metrics=("fid",))


@pytest.mark.parametrize(
    ("metrics", "count", "words"),
    [
        (("fid", "is"), 300, "'is' needs 'probabilities', which extractor 'dinov2' does not return"),
        (("sfid",), 300, "'sfid' needs 'spatial'"),
        (("precision",), 3, "samples holds 3 images, but precision need at least 4"),
        (("fid",), 1, "samples holds 1 images, but fid need at least 2"),
    ],
)
def test_impossible_metrics_are_refused_before_the_first_sample(metrics, count, words):
    apply = lambda params, x: {"features": x[:, 0, :, 0]}  # noqa: E731
    samples = dataclasses.replace(image_set_of("samples", SAMPLES[:count]), pieces=no_pieces)
    with pytest.raises(SfdError, match=words):
        evaluate(samples, reference_of(REFERENCE), Extractor("dinov2", {"w": np.ones(1)}, apply), metrics=metrics)


def test_notes_are_returned_with_the_scores(tmp_path):
    """For images sorted by class, and for statistics without the name of a network."""
    classes = np.arange(300) % 2
    images = lambda classes: image_set_of("samples", SAMPLES // 8 + np.uint8(200) * (classes[:, None, None, None] == 1))  # noqa: E731
    bright = dataclasses.replace(
        stand_in(),
        apply=lambda params, x: (
            stand_in().apply(params, x)
            | {"probabilities": jax.nn.one_hot((x.mean(axis=(1, 2, 3)) > 128).astype(int), 2)}
        ),
    )
    measured = lambda classes, **options: evaluate(  # noqa: E731
        images(classes), reference_of(REFERENCE), bright, metrics=("is",), split_size=100, **options
    )
    shuffled, in_order = measured(classes), measured(np.sort(classes))
    assert shuffled == {"is": pytest.approx(2.0)} and in_order["is"] < 1.7
    assert len(in_order["notes"]) == 1 and "sorted by class" in in_order["notes"][0]
    assert "notes" not in measured(np.random.default_rng(0).permutation(classes))

    np.savez(tmp_path / "r.npz", mu=np.zeros(7), sigma=np.eye(7))
    notes = evaluate(images(classes), open_reference(tmp_path / "r.npz"), bright, metrics=("fid",))["notes"]
    assert len(notes) == 1 and "does not say which network" in notes[0]


def nan_extractor():
    extractor = stand_in()
    poison = lambda images: jnp.where(images[:, 0, 0, 0] == 255, jnp.nan, 0.0)  # noqa: E731
    apply = lambda params, images: {"features": extractor.apply(params, images)["features"] + poison(images)[:, None]}  # noqa: E731
    return dataclasses.replace(extractor, apply=apply)


def statistics_alone(tmp_path):
    np.savez(tmp_path / "m.npz", mu=np.zeros(7), sigma=np.eye(7))
    return open_reference(tmp_path / "m.npz")


@pytest.mark.parametrize(
    ("samples", "reference", "extractor", "metrics", "words"),
    [
        (SAMPLES, None, stand_in, ("fidd",), "did you mean 'fid'"),
        (SAMPLES, statistics_alone, stand_in, ADM_METRICS, "m.npz has mean and covariance but no images"),
        (SAMPLES, statistics_alone, stand_in, ("sfid",), "no `mu_s`"),
        (SAMPLES[:, :4], None, stand_in, ("fid",), "images of samples are 3x4, those of reference 3x5"),
        (SAMPLES, None, nan_extractor, ("fid",), "'features' of image {first} is not finite"),
    ],
)
def test_impossible_comparisons_are_refused(tmp_path, samples, reference, extractor, metrics, words):
    first = int(np.argmax(SAMPLES[:, 0, 0, 0] == 255))  # references stop below 200
    reference = reference(tmp_path) if reference else reference_of(REFERENCE)
    with pytest.raises(SfdError, match=words.format(first=first)):
        evaluate(image_set_of("samples", samples), reference, extractor(), metrics=metrics)


def test_fewer_images_than_expected_are_refused():
    short = dataclasses.replace(image_set_of("short", SAMPLES), count=301)
    with pytest.raises(SfdError, match="expected 301 images, read 300"):
        evaluate(short, reference_of(REFERENCE), stand_in(), metrics=("fid",))


def test_other_dtypes_are_refused():
    with pytest.raises(SfdError, match="float64.*expected uint8"):
        list(extract_features([stand_in()], [SAMPLES / 255.0]))


@pytest.mark.parametrize(
    ("config", "more", "name"),
    [
        (dinov2_config("L", num_registers=0), {}, "dinov2"),  # the released FD-DINOv2
        (dinov2_config("L"), {}, "dinov2_vitl14_reg4"),
        (dinov2_config("B"), {}, "dinov2_vitb14_reg4"),
        (dinov2_config("g", num_registers=0), {}, "dinov2_vitg14"),
        (dinov2_config("L", num_registers=0, image_size=32, patch_size=16), {}, "encoder_w1024_d24_p16"),
        (
            dinov2_config("L", num_registers=0),
            {"task": "visual_encoder"},
            "encoder_w1024_d24_p14",
        ),  # the same shape, but trained with this package
        (
            dict(width=8, depth=2, num_heads=2, image_size=32, patch_size=8),
            {"task": "visual_encoder"},
            "encoder_w8_d2_p8_reg4",
        ),
    ],
)
def test_names_of_encoder_extractors(config, more, name):
    network = Network("dinov2", config)
    extractor = encoder_extractor(({}, {"network": "dinov2", "network_config": network.config_dict(), **more}))
    assert extractor.name == name
    assert extractor.settings == f"size {network.config.image_size if more else 224}"  # the size of its training


def test_an_encoder_whose_patches_do_not_divide_the_image_is_refused():
    network = Network("dinov2", dict(width=8, depth=1, num_heads=2, image_size=30, patch_size=15))
    with pytest.raises(
        SfdError, match="images of 224 px do not divide by 15, the encoder's patches: use 210 or 225 px"
    ):
        encoder_extractor(({}, {"network": "dinov2", "network_config": network.config_dict()}))
