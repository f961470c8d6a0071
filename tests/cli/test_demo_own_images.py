"""`sfd demo --images`: the split, the sizes chosen, the judges, what newcomers get wrong, and a tiny run to its end."""

import json
import runpy
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from sfd_jax.cli.main import main
from sfd_jax.experiment.build import task_from_config
from sfd_jax.experiment.config_files import load_config
from sfd_jax.experiment.demo import judge, own_images, results, stages
from sfd_jax.experiment.demo.own_images import find_images, split_images
from sfd_jax.models import Network

CONFIG = "configs/own_images.py"
STAGES = ("texture_vae", "encoder", "semantic_vae", "diffusion", "weak")


def draw(folder, **counts):
    """Write JPEGs of several sizes, whose colour tells the class."""
    for label, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            random = np.random.default_rng((label, number))
            pixels = random.integers(0, 100, (40 + number, 60 - number, 3), dtype=np.uint8)
            pixels[..., label % 3] += 150
            Image.fromarray(pixels).save(folder / name / f"{number}.jpg")
    return folder


@pytest.fixture(scope="module")
def choose_sizes(root):
    return runpy.run_path(str(root / CONFIG))["choose_sizes"]


def test_a_fifth_of_each_class_is_held_out_and_the_same_each_time():
    labels = np.repeat([0, 1, 3], [12, 4, 60])
    train, held_out = split_images(labels)
    assert sorted([*train, *held_out]) == list(range(76))
    assert np.bincount(labels[held_out]).tolist() == [2, 0, 0, 12]
    again, _ = split_images(labels)
    assert np.array_equal(train, again)


def test_of_too_many_images_each_class_gives_as_many(monkeypatch):
    monkeypatch.setattr(own_images, "MOST_IMAGES", 100)
    labels = np.repeat([0, 1, 2], [1000, 7, 1000])
    train, held_out = split_images(labels)
    counts = np.bincount(labels[np.concatenate([train, held_out])])
    assert counts.sum() == 100 and counts[1] == 7 and abs(counts[0] - counts[2]) <= 1


def test_more_images_and_more_cores_are_more_work(choose_sizes):
    def work(images, classes=5, image_size=32, cores=2):
        sizes = choose_sizes(images, classes, image_size, cores)
        return sizes["diffusion"] * sizes["batch"] * sizes["width"] ** 2

    by_images = [work(images) for images in (1, 8, 100, 300, 1000, 3000, 10_000, 10**6)]
    by_cores = [work(300, cores=cores) for cores in (1, 2, 4, 8, 16, 32, 10_000)]
    assert by_images == sorted(by_images) and by_images[0] < by_images[-1]
    assert by_cores == sorted(by_cores) and by_cores[0] < by_cores[-1]
    assert choose_sizes(10**6, 10, 64, 10**4)["diffusion"] < 50_000
    for classes in (1, 3, 20, 1000, 5000):
        samples = choose_sizes(1000, classes, 32, 2)["samples"]
        assert min(classes, 1000) <= samples <= 1000
    assert choose_sizes(1, 1, 32, 1) == choose_sizes(1, 1, 32, 1)


@pytest.mark.parametrize(
    "argument",
    ["", "tiny", "images=30,classes=1,cores=1", "images=99999,classes=300,image_size=64,cores=64", "cores=3"],
)
def test_chosen_sizes_make_networks_that_fit_together(argument):
    config = load_config(f"{CONFIG}:{argument}")
    networks = {}
    for stage, network in (("texture_vae", "texture_vae"), ("encoder", "dinov2"), ("semantic_vae", "semantic_vae")):
        networks[stage] = Network(network, config[stage].model.to_dict()).config
    grid, size = config.diffusion.model.input_size, config.data.image_size
    assert size // networks["texture_vae"].downsampling == size // networks["encoder"].patch_size == grid
    assert networks["encoder"].feature_width == networks["semantic_vae"].input_dim
    for stage in ("diffusion", "weak"):
        task_from_config(config[stage])
        assert config[stage].model.repa_features == networks["encoder"].feature_width
    assert config.encoder.loss.num_classes >= 2
    for stage in STAGES:
        assert config[stage].train.ema_decay ** config[stage].train.steps < 0.01 or "tiny" in argument


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--images=none"], "no folder 'none'"),
        (["--images=loose"], "hold 9 images that have no class".replace("hold", "holds")),
        (["--images=few"], "few holds 5 images; the demo needs at least 8"),
        (["--images=good", "--workdir=good/run"], "one is inside the other"),
        (["--images=good/a", "--workdir=good"], "that have no class"),
        (["--images=good", "--image_size=48"], "invalid choice: 48 (choose from 32, 64)"),
        (["--image_size=64"], "--image_size=64 has no effect without --images"),
        (["--no-flips"], "--flips=False has no effect without --images"),
        (["--images=good", "--config=configs/digits.py:tiny"], "is for handwritten digits; omit it with --images"),
        ([f"--config={CONFIG}"], "is for your own images: give --images=FOLDER"),
        (["--images=good", f"--config={CONFIG}:huge"], "unknown 'huge'"),
        (["--images=good", "--config.diffusion.train.stesp=3"], "did you mean 'steps'?"),
        (["--images=broken", "--workdir=out"], "2 images cannot be decoded"),
        (["--images=good", "--workdir=old"], "begun by another version of sfd_jax"),
        (["--images=good", "--workdir=digits"], "holds the demo of other images; nothing was changed. There: digits."),
    ],
)
def test_what_newcomers_get_wrong_is_a_sentence(flags, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    draw(tmp_path / "good", a=6, b=6)
    draw(tmp_path / "few", a=3, b=2)
    shutil.copytree(draw(tmp_path / "more", a=9) / "a", tmp_path / "loose")
    for name in "34":
        (draw(tmp_path / "broken", a=6, b=6) if name == "3" else tmp_path / "broken").joinpath(
            "b", f"{name}.jpg"
        ).write_bytes(b"no image")
    for folder, content in (("old", {"config": {}}), ("digits", {"format": 2, "images": "digits", "config": {}})):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "demo.json").write_text(json.dumps({"stages": {}, **content}))
    assert main(["demo", *flags]) == 2
    printed = capsys.readouterr().err
    assert says in printed
    if "broken" in flags[0]:
        assert "3.jpg: not an image of a known format" in printed and "4.jpg" in printed


def test_classes_that_are_numbers_with_gaps_are_names(tmp_path):
    found = find_images(str(draw(tmp_path / "images", **{"3": 6, "7": 6})), tmp_path / "run", 32)
    assert list(found.classes.values()) == ["class_3", "class_7"]


def test_identity_follows_the_images_and_not_their_place(tmp_path):
    here = draw(tmp_path / "here", a=6, b=6)
    identity = lambda folder: find_images(str(folder), tmp_path / "run", 32).identity()
    there = shutil.copytree(here, tmp_path / "elsewhere" / "there")
    assert identity(here) == identity(there)
    file = there / "b" / "2.jpg"
    file.write_bytes(file.read_bytes()[:-2] + b"\0\0")
    assert identity(here) != identity(there)


def test_one_class_is_told_apart_by_how_its_images_are_turned():
    class One:
        def __len__(self):
            return 1

        def __getitem__(self, index):
            return {"pixels": np.arange(48, dtype=np.uint8).reshape(4, 4, 3), "label": 0, "index": index}

    turned = stages.Rotated(One())
    assert [turned[index]["label"] for index in range(len(turned))] == [0, 1, 2, 3]
    upright = One()[0]["pixels"]
    assert np.array_equal(turned[2]["pixels"], upright[::-1, ::-1])
    assert np.array_equal(np.rot90(turned[1]["pixels"], 3), upright)


class ByColour:
    """Stands in for a demo of three classes, each of one colour; red ones are labelled 0, and so on."""

    class_names = ["red", "green", "blue"]

    def images(self, split):
        labels = np.arange(30) % 3
        pixels = np.random.default_rng(0).integers(0, 60, (30, 8, 8, 3), dtype=np.uint8)
        pixels[np.arange(30), ..., labels] += 150
        return pixels, labels


def test_labels_are_read_by_the_nearest_class_mean(monkeypatch):
    monkeypatch.setattr(stages, "visual_features", lambda demo, pixels: pixels.reshape(len(pixels), 64, 3) / 255)
    pixels, labels = ByColour().images("train")
    assert np.array_equal(stages.label_reader(ByColour())(pixels[::-1]), labels[::-1])


def test_a_copy_is_near_and_its_original_is_found():
    images = np.random.default_rng(0).integers(0, 256, (50, 32, 32, 3), dtype=np.uint8)
    copies = np.clip(images[[7, 3]].astype(int) + 5, 0, 255).astype(np.uint8)
    which, distances = judge.nearest_images(copies, images)
    assert which.tolist() == [7, 3] and np.all(distances < 0.02)
    assert judge.nearest_images(images[:1], 255 - images[:1])[1] > 0.1


def test_numbers_that_few_images_do_not_give_are_left_out():
    assert results._metrics(129, 128, "images") == (("fid", "precision", "recall"), "")
    wanted, note = results._metrics(60, 128, "images")
    assert wanted == ("precision", "recall") and "needs more than 128 images" in note
    wanted, note = results._metrics(6, 128, "images")
    assert wanted == () and "Precision and recall are left out" in note and "has 6." in note


@pytest.mark.parametrize("ours, says", [(0.1, "near-copies"), (0.15, "some copy"), (0.25, "no sign of copying")])
def test_copies_are_told_by_what_unseen_images_give(ours, says):
    near = lambda distance: {"nearest_training_image": distance}
    found = results._of_copies({**near(ours), "nearer_than_held_out": 0.6}, near(0.25), 5000)
    assert says in found and "60% of the samples are nearer than that" in found
    assert "No image was held out" in results._of_copies(near(ours), {}, 5000)


@pytest.mark.slow
def test_a_tiny_run_ends_with_what_it_promises_and_goes_on(root, quick, tmp_path):
    images = draw(tmp_path / "images", **{"a cat": 6, "dog": 6, "one": 1})
    run = [sys.executable, "-m", "sfd_jax", "demo", f"--images={images}", f"--config={CONFIG}:cores=2,tiny"]
    start = lambda *flags: subprocess.run(
        [*run, f"--workdir={tmp_path / 'run'}", *flags], cwd=root, env=quick, text=True, capture_output=True
    )
    done = start()
    assert done.returncode == 0, done.stderr[-3000:]
    assert "no image is held out in classes with fewer than 5 images: one" in done.stdout
    promised = ("samples.npz", "samples.png", "neighbours.png", "stages.png", "losses.png", "metrics.json")
    promised += ("report.md", "report.html")
    assert not [name for name in promised if not (tmp_path / "run" / name).exists()]
    report = (tmp_path / "run" / "report.md").read_text()
    for text in ("of 3 classes: a cat, dog, one", "no independent judge", "Frechet distance is left out", "mirrored"):
        assert text in report
    with np.load(tmp_path / "run" / "samples.npz") as file:
        assert file["arr_0"].shape == (40, 32, 32, 3) and set(file["arr_1"]) == {0, 1, 2}
    manifest = json.loads((tmp_path / "run" / "latents" / "manifest.json").read_text())
    assert "texture_flip" in manifest["fields"] and manifest["count"] == 11

    images.rename(tmp_path / "moved")
    run[4], run[5] = f"--images={tmp_path / 'moved'}", f"--config={CONFIG}:tiny"
    done = start()
    assert done.returncode == 0 and done.stdout.count("already done") == 10, done.stderr[-3000:]
    shutil.copy(tmp_path / "moved" / "dog" / "0.jpg", tmp_path / "moved" / "dog" / "new.jpg")
    done = start()
    assert done.returncode == 2 and "holds the demo of other images" in done.stderr and "Traceback" not in done.stderr
