"""Five metrics with random Inception weights against an independent computation; the lines of docs/evaluation.md."""

import functools

import jax
import numpy as np
import pytest
from PIL import Image

from sfd_jax.convert import FORMATS
from sfd_jax.convert.table import import_params, key_shapes
from sfd_jax.evaluation import evaluate, inception_extractor, open_image_set, open_reference
from sfd_jax.evaluation.metrics import _half_norms
from sfd_jax.latents import LatentStatistics
from sfd_jax.models import Network
from sfd_jax.training import load_params, save_params

pytestmark = pytest.mark.slow  # Inception on two cores: a minute, most of it compiling

SAMPLES, REFERENCES = 9, 8
# One image on each device; of the samples one is left over. Both tests run the program that one of them compiles.
BATCH = 8

# Also in the README, which a test checks.
LIBRARY = """\
import numpy as np
from sfd_jax.evaluation import evaluate, image_set_of, inception_extractor, open_reference
from sfd_jax.generation import balanced_labels, make_sampler
from sfd_jax.training import load_params

sampler = make_sampler(load_params("sfd_xl"), load_params("texture_vae"))
images, nfe = sampler(np.arange(1000), balanced_labels(1000, 1000), batch_size=64)
reference, inception = open_reference("VIRTUAL_imagenet256_labeled.npz"), load_params("inception")
print(evaluate(image_set_of("ours", images), reference, inception_extractor(inception)))
"""


def draw_inception():
    """Return a state dict in the released form whose features differ well between images."""
    table, network = FORMATS["inception"].TABLE, Network("inception", {})
    generator = np.random.default_rng(0)
    state = {}
    for key, shape in key_shapes(table, network).items():
        n = generator.standard_normal(shape)
        if key.endswith("running_var"):
            n = 1 + 0.2 * np.abs(n)
        elif len(shape) == 1:
            n = 0.1 * n + key.endswith("bn.weight")
        else:
            n = 1.4 * n / np.sqrt(np.prod(shape[1:]))
        state[key] = n.astype(np.float32)
    return import_params(table, state, network), network


def made_images(number, side, seed):
    """Return smooth coloured noise, uint8 (N, 32, 32, 3)."""
    small = np.random.default_rng(seed).integers(0, 256, (number, side, side, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(image).resize((32, 32), Image.BICUBIC)) for image in small])


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Checkpoints, samples as npz and references as PNGs in one folder."""
    folder = tmp_path_factory.mktemp("work")
    params, network = draw_inception()
    metadata = {"network": "inception", "network_config": network.config_dict()}
    save_params(folder / "inception", params, metadata)
    np.savez(folder / "samples.npz", arr_0=made_images(SAMPLES, 4, 1))
    (folder / "references").mkdir()
    for i, image in enumerate(made_images(REFERENCES, 7, 2)):
        Image.fromarray(image).save(folder / "references" / f"{i}.png")
    return folder


def independent_features(params, images):
    """Features straight from the network, all at once."""
    network = Network("inception", {})
    answers = jax.jit(lambda params, images: network.apply(params, images))(params, images.astype(np.float32))
    return {name: np.asarray(rows, np.float64) for name, rows in answers.items()}


def frechet_by_data(a, b):
    """The distance from the rows: the trace of the root is the nuclear norm of their cross products."""
    a0, b0 = a - a.mean(axis=0), b - b.mean(axis=0)
    cross = np.linalg.svd(a0 @ b0.T, compute_uv=False).sum() / np.sqrt((len(a) - 1) * (len(b) - 1))
    spread = (a0**2).sum() / (len(a) - 1) + (b0**2).sum() / (len(b) - 1)
    return ((a.mean(axis=0) - b.mean(axis=0)) ** 2).sum() + spread - 2 * cross


def test_five_metrics_against_an_independent_computation(work):
    checkpoint = load_params(work / "inception")
    samples, references = made_images(SAMPLES, 4, 1), made_images(REFERENCES, 7, 2)
    ours = evaluate(
        open_image_set(work / "samples.npz"),
        open_reference(work / "references"),
        inception_extractor(checkpoint),
        batch_size=BATCH,
        split_size=5,
    )
    both = independent_features(checkpoint[0], np.concatenate([samples, references]))
    a, b = ({name: rows[part] for name, rows in both.items()} for part in (slice(SAMPLES), slice(SAMPLES, None)))
    # 1e-3 is the bound; float32 features in other batches agree far better.
    assert ours["fid"] == pytest.approx(frechet_by_data(a["pool"], b["pool"]), rel=1e-4)
    assert ours["sfid"] == pytest.approx(frechet_by_data(a["spatial"], b["spatial"]), rel=1e-4)

    probabilities = np.exp(a["logits_unbiased"] - a["logits_unbiased"].max(axis=1, keepdims=True))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    parts = [probabilities[i : i + 5] for i in range(0, SAMPLES, 5)]
    score = np.mean([np.exp((p * np.log(p / p.mean(axis=0))).sum(axis=1).mean()) for p in parts])
    assert ours["is"] == pytest.approx(score, rel=1e-4)

    def distances(u, v):  # float16 as in the suite; test_metrics.py tests the order of its sums
        half = [x.astype(np.float16).astype(np.float64) for x in (u, v)]
        products = (half[0] @ half[1].T).astype(np.float16)
        norms = [_half_norms(x.astype(np.float32)).astype(np.float16) for x in (u, v)]
        return np.maximum(norms[0][:, None] - np.float16(2) * products + norms[1][None], np.float16(0))

    inside = distances(a["pool"], b["pool"]) <= np.sort(distances(b["pool"], b["pool"]))[:, 3][None]
    found = distances(b["pool"], a["pool"]) <= np.sort(distances(a["pool"], a["pool"]))[:, 3][None]
    assert ours["precision"] == pytest.approx(inside.any(axis=1).mean(), abs=1.5 / SAMPLES)
    assert ours["recall"] == pytest.approx(found.any(axis=1).mean(), abs=1.5 / REFERENCES)


def test_the_librarys_ten_lines(work, monkeypatch, capsys, root):
    assert len([line for line in LIBRARY.splitlines() if line]) <= 10
    assert LIBRARY in (root / "docs" / "evaluation.md").read_text()
    statistics = LatentStatistics(np.zeros(3), np.ones(3), np.zeros(2), np.ones(2)).to_dict()
    networks = {
        "sfd_xl": ("lightning_dit", dict(width=8, depth=1, num_heads=2, input_size=16, in_channels=5, num_classes=5)),
        "texture_vae": ("texture_vae", dict(ch=4, ch_mult=(1, 2), num_res_blocks=1, z_channels=3, norm_groups=2)),
    }
    draw = np.random.default_rng(3).standard_normal
    for folder, (name, config) in networks.items():
        network = Network(name, config)
        metadata = {"network": name, "network_config": network.config_dict(), "latent_statistics": statistics}
        params = jax.tree.map(lambda leaf: (draw(leaf.shape) / 4).astype(np.float32), network.abstract_params())
        save_params(work / folder, params, metadata)
    np.savez(work / "VIRTUAL_imagenet256_labeled.npz", arr_0=made_images(5, 7, 2))
    monkeypatch.chdir(work)
    monkeypatch.setattr("sfd_jax.evaluation.evaluate", functools.partial(evaluate, batch_size=BATCH))
    exec(LIBRARY.replace("1000", "5").replace("64", "5"), {})
    printed = eval(capsys.readouterr().out)
    assert set(printed) == {"fid", "sfid", "is", "precision", "recall"} and np.isfinite(list(printed.values())).all()
