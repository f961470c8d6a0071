"""The section of docs/extend.md on visual encoders: one from a package outside of sfd_jax, with the real commands."""

import re
import sys

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from sfd_jax.cli.main import main
from sfd_jax.data.latent_store import LatentStore
from sfd_jax.models import ENCODERS, NETWORKS, Network
from sfd_jax.models.fingerprint import params_hash
from sfd_jax.registry import FORMATS
from sfd_jax.training import load_metadata, load_params, save_params

WIDTH, PATCH, IMAGES = 24, 2, 8
BESIDE = {
    "texture_vae": dict(ch=4, ch_mult=(1, 2), num_res_blocks=1, attention_levels=(), z_channels=8, norm_groups=2),
    "semantic_vae": dict(arch="linear", input_dim=WIDTH, bottleneck_dim=4),
}


def forget():
    """Undo the import of the package, so that the next command starts without it."""
    for registry in (NETWORKS, ENCODERS, FORMATS):
        registry.pop("patches", None)
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_encoder"]:
        del sys.modules[name]


@pytest.fixture
def work(tmp_path, monkeypatch, root):
    """A working folder with the package, weights in its own format, images, and the other two networks."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_encoder").mkdir()
    for code in re.findall(r"```python\n(.*?)```", (root / "docs" / "extend.md").read_text(), re.DOTALL):
        if name := re.match(r"# (my_encoder/\w+\.py)\n", code):
            (tmp_path / name[1]).write_text(code)
    rng = np.random.default_rng(0)
    shapes = {"embed.weight": (WIDTH, 3, PATCH, PATCH), "embed.bias": (WIDTH,)}
    shapes |= {"out.weight": (WIDTH, WIDTH), "out.bias": (WIDTH,)}
    save_file({k: rng.normal(0, 0.3, s).astype(np.float32) for k, s in shapes.items()}, "released.safetensors")
    for index in range(IMAGES):
        folder = tmp_path / "images" / "train" / str(index % 2)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(folder / f"{index}.png")
    for name, config in BESIDE.items():
        network = Network(name, config)
        params = jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), network.abstract_params())
        save_params(tmp_path / name, params, {**network.metadata(), "step": 1, "source": "test"})
    yield tmp_path
    forget()


def run(*arguments):
    forget()
    return main(list(arguments))


def features_by_hand(pixels):
    """Compute the features of images (B,8,8,3) from the original arrays: patches of 2 x 2, linear, ReLU, linear."""
    state = load_file("released.safetensors")
    patches = (pixels / 127.5 - 1).reshape(len(pixels), 4, PATCH, 4, PATCH, 3)
    hidden = np.einsum("byixjc,ocij->byxo", patches, state["embed.weight"]) + state["embed.bias"]
    return (np.maximum(hidden, 0) @ state["out.weight"].T + state["out.bias"]).reshape(len(pixels), 16, WIDTH)


@pytest.mark.slow
def test_an_encoder_from_outside_is_converted_extracted_with_and_trained_on(work, capsys, root):
    assert run("convert", "released.safetensors", "--out=patches", "--plugin=my_encoder") == 0
    assert load_metadata(work / "patches")["registered_in"] == "my_encoder.network"
    assert run("convert", "patches", "--export=back.safetensors", "--plugin=my_encoder") == 0
    jax.tree.map(np.testing.assert_array_equal, load_file("back.safetensors"), load_file("released.safetensors"))

    extract = ["extract", "--images=folder", "--path=images", "--image_size=8", "--repa", "--out=latents"]
    extract += ["--texture_vae=texture_vae", "--semantic_vae=semantic_vae", "--visual=patches", "--batch_size=8"]
    capsys.readouterr()
    np.savez("any.npz", np.zeros((4, 8, 8, 3), np.uint8))
    judge = ["evaluate", "--reference=any.npz", "--samples=any.npz", "--dinov2=patches", "--plugin=my_encoder"]
    assert run(*judge) == 2
    assert "holds 'patches', which has no class token for metrics" in capsys.readouterr().err
    assert run(*extract, "--plugin=elsewhere") == 2
    assert "plugin 'elsewhere': no such module" in capsys.readouterr().err
    assert run(*extract) == 2
    assert "'patches' is a part of the module my_encoder.network, which is not imported: add --plugin=" in (
        capsys.readouterr().err
    )
    assert run(*extract, "--plugin=my_encoder") == 0
    store = LatentStore(work / "latents")
    paths = sorted((work / "images").rglob("*.png"))
    pixels = np.stack([np.asarray(Image.open(path)) for path in paths])
    for flipped in (False, True):
        found = store.read(np.arange(IMAGES), np.full(IMAGES, flipped))["repa_features"]
        # float16 keeps 11 bits of values of order 1.
        np.testing.assert_allclose(found, features_by_hand(pixels[:, :, ::-1] if flipped else pixels), atol=4e-3)

    # A config file that imports the package registers it too.
    (work / "recipe.py").write_text(
        "import runpy\n\nimport my_encoder\n\n"
        f"get_config = lambda: runpy.run_path({str(root / 'configs' / 'sfd.py')!r})['get_config']('s,tiny')\n"
    )
    train = ["train", "--config=recipe.py", "--workdir=run", "--config.data.path=latents"]
    train += ["--config.data.repa_source=online", "--config.data.visual_encoder=patches"]
    train += ["--config.data.images.path=images", "--config.data.images.image_size=8"]
    train += ["--config.train.steps=1", "--config.model.depth=1", "--config.model.repa_depth=1"]
    assert run(*train) == 0
    assert load_metadata(work / "run")["frozen"] == params_hash(load_params(work / "patches")[0])
