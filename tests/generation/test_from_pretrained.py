"""`sfd_jax.Pipeline`: from a folder or a released name to images, the same as `sfd sample` makes."""

import re
import subprocess
import sys
import types

import numpy as np
import pytest
from PIL import Image
from test_commands import DIT, VAE, save_random

import sfd_jax
from sfd_jax import Pipeline
from sfd_jax.class_names import imagenet_classes
from sfd_jax.cli import sample as sample_command
from sfd_jax.cli.main import run_command
from sfd_jax.convert import hub
from sfd_jax.errors import SfdError
from sfd_jax.experiment import released
from sfd_jax.latents import LatentStatistics

STATISTICS = LatentStatistics(np.zeros(3), np.ones(3), np.zeros(2), np.ones(2)).to_dict()
FAST = {"solver": "euler", "num_steps": 4}
OF_IMAGENET = {**DIT, "num_classes": 1000}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The folder of a demo with drawn weights, whose model was trained on two of ImageNet's class folders."""
    folder = tmp_path_factory.mktemp("demo")
    about = {"latent_statistics": STATISTICS, "class_names": ["n02444819", "n02099601", "a", "b", "c"]}
    sample = {"guidance": "autoguidance", "guidance_scale": 1.5, **FAST}
    save_random(folder / "diffusion", "lightning_dit", DIT, 0, **about, config={"sample": sample})
    save_random(folder / "weak", "lightning_dit", DIT, 2, **about)
    save_random(folder / "texture_vae", "texture_vae", VAE, 1)
    return folder


@pytest.mark.slow
def test_the_lines_of_the_readme_and_the_command_make_the_same_images(demo, tmp_path, monkeypatch, root):
    (tmp_path / "demo_out").symlink_to(demo)
    monkeypatch.chdir(tmp_path)
    exec(re.search(r"```python\n(.*?)```", (root / "README.md").read_text(), re.S)[1], names := {})
    assert Image.open("three.png").size == (8, 8)
    sampler = names["pipeline"].sampler
    images = names["pipeline"].generate(["golden_retriever", 0, "B"], 5, seed=3)
    assert names["pipeline"].sampler is sampler and sampler.recipe["seed"] == 3  # a seed compiles nothing
    names["pipeline"].generate(["golden_retriever", 0, "B"], 5)
    assert sampler._run_sample._cache_size() == 1  # one and five images are both eight rows
    flags = ["--checkpoint=demo_out/diffusion", "--texture_vae=demo_out/texture_vae", "--weak=demo_out/weak"]
    flags += ["--labels=n02099601,0,b", "--num=5", "--batch_size=1", "--seed=3", "--out=out"]
    assert run_command(sample_command.main, "sample", flags) == 0
    with np.load(tmp_path / "out" / "samples.npz") as file:
        assert file["arr_1"].tolist() == [1, 0, 3, 1, 0]
        np.testing.assert_array_equal(np.stack(images), file["arr_0"])


@pytest.fixture
def built(monkeypatch):
    """What `make_sampler` was given, which makes none: compiling takes seconds."""
    given = {}

    def make_sampler(**parts):
        given.update(parts)
        raise SfdError("enough")

    monkeypatch.setattr("sfd_jax.experiment.pipeline.make_sampler", make_sampler)
    return given


def test_guidance_can_be_left_out_and_faults_are_named(demo, built):
    pipeline = Pipeline.from_pretrained(demo / "diffusion", texture_vae=demo / "texture_vae")
    with pytest.raises(SfdError, match="enough"):
        pipeline.generate("balanced", **FAST)
    assert built["weak"] is None and built["config"].guidance == "none" and built["config"].num_steps == 4
    assert pipeline._job is None  # what failed is built again, not taken for built
    with pytest.raises(SfdError, match="needs a weaker model"):
        pipeline.generate(0, guidance="autoguidance", guidance_scale=2)
    with pytest.raises(SfdError, match="did you mean 'guidance_scale'"):
        pipeline.generate(0, guidance_scal=2)
    with pytest.raises(SfdError, match="did you mean 'otter'"):
        pipeline.generate("oter")
    with pytest.raises(SfdError, match="give texture_vae=FOLDER"):
        Pipeline.from_pretrained(demo / "diffusion")
    with pytest.raises(SfdError, match="no folder 'sfd_x'.*did you mean 'sfd_xl'"):
        Pipeline.from_pretrained("sfd_x")
    with pytest.raises(SfdError, match="name of a released model or a folder, not None"):
        Pipeline.from_pretrained(None)
    for part, name, near in (
        ("texture_vae", "texture_va", "texture_vae"),
        ("weak", "sfd_autoguidance", "sfd_autoguidance_b"),
    ):
        with pytest.raises(SfdError, match=f"no folder '{name}'.*did you mean '{near}'"):
            Pipeline.from_pretrained(demo / "diffusion", **{"texture_vae": demo / "texture_vae", part: name})


def test_messages_of_code_that_commands_share_name_keyword_arguments(demo, built, monkeypatch, capsys):
    pipeline = Pipeline.from_pretrained(demo / "diffusion", texture_vae=demo / "texture_vae")
    with pytest.raises(SfdError, match=r"^nfe=9 has no effect beside solver=dopri5 \("):
        pipeline.generate(0, nfe=9, solver="dopri5")
    with pytest.raises(SfdError, match=r"^texture_vae=\S*weak holds 'lightning_dit'"):
        Pipeline.from_pretrained(demo / "diffusion", texture_vae=demo / "weak")
    nothing = types.SimpleNamespace(recipe={"notes": []}, labels=None)  # it notes, then fails for want of devices
    monkeypatch.setattr("sfd_jax.experiment.pipeline.make_sampler", lambda **parts: nothing)
    with pytest.raises(AttributeError, match="mesh"):
        pipeline.generate(0, **FAST)
    assert "no weaker model was given (weak=CKPT)" in capsys.readouterr().out


def test_a_released_name_takes_what_belongs_to_it(tmp_path, monkeypatch, built):
    """From the cache, where `sfd fetch` left it; what is not there is fetched."""
    monkeypatch.setenv("SFD_CACHE", str(tmp_path))
    save_random(tmp_path / "sfd_xl", "lightning_dit", OF_IMAGENET, 0, step=9, latent_statistics=STATISTICS)
    save_random(tmp_path / "texture_vae", "texture_vae", VAE, 1)
    asked = []

    def fetch_checkpoint(name, file=None):
        asked.append((name, file))
        return save_random(tmp_path / "b", "lightning_dit", OF_IMAGENET, 2, latent_statistics=STATISTICS)

    monkeypatch.setattr(released, "fetch_checkpoint", fetch_checkpoint)
    pipeline = Pipeline.from_pretrained("sfd_xl")
    assert asked == [("sfd_autoguidance_b", "0070000.pt")] and pipeline.class_names == list(imagenet_classes())
    with pytest.raises(SfdError, match="enough"):
        pipeline.generate("otter")
    assert built["weak"] and (built["config"].guidance, built["config"].guidance_scale) == ("autoguidance", 1.5)


def test_without_a_connection_it_says_what_to_put_where(tmp_path, monkeypatch):
    monkeypatch.setenv("SFD_CACHE", str(tmp_path))

    def nothing(source):
        raise hub._Unreachable("no connection")

    monkeypatch.setattr(hub, "_listing", nothing)
    with pytest.raises(
        SfdError, match=r"resolve/main/model_weights/sfd_xl/4000000.pt .*put 4000000\.pt into \S*sfd_xl and repeat"
    ):
        Pipeline.from_pretrained("sfd_xl")


def test_the_package_alone_imports_nothing():
    code = "import sys, sfd_jax; print('jax' in sys.modules); sfd_jax.Pipeline; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


def test_libtpu_is_hushed_where_the_pipeline_is_imported(monkeypatch):
    hushed = []
    monkeypatch.setattr("sfd_jax.libtpu.hush", lambda: hushed.append(True))
    assert sfd_jax.Pipeline and hushed
