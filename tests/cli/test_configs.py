"""Each shipped config, with each argument, gives networks and settings that fit each other."""

import jax
import numpy as np
import pytest

from sfd_jax.diffusion.paths import VPPath
from sfd_jax.diffusion.predictions import NoisePrediction
from sfd_jax.errors import SfdError
from sfd_jax.experiment.build import diffusion_settings, task_from_config, train_config
from sfd_jax.experiment.config_files import load_config
from sfd_jax.experiment.demo.pictures import semantic_colours
from sfd_jax.generation import SampleConfig
from sfd_jax.models import Network

SIZES = ("s", "b", "l", "xl", "1p0b", "1p6b")
VARIANTS = ("", ",tiny", ",lr2e4", ",weak", ",lr2e4,tiny")


@pytest.mark.parametrize("argument", [size + variant for size in SIZES for variant in VARIANTS])
def test_imagenet_recipe_resolves(argument):
    config = load_config(f"configs/sfd.py:{argument}")
    task, train = task_from_config(config), train_config(config)
    SampleConfig.from_group(config.sample)
    assert train.optimizer.learning_rate == (2e-4 if "lr2e4" in argument else 1e-4)
    if "tiny" in argument:
        params = jax.eval_shape(task.init, jax.random.key(0))
        assert sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(params)) < 1e6


@pytest.mark.parametrize("encoder, width, view", [("dinov3", 768, 256), ("dinov3_l", 1024, 256), ("clip", 768, 256)])
def test_recipes_of_other_encoders(encoder, width, view):
    config = load_config(f"configs/sfd.py:xl,{encoder}")
    assert task_from_config(config).network.config.repa_features == width
    assert config.data.repa_source == "online" and config.data.visual_encoder.endswith(encoder)
    config = load_config(f"configs/semantic_vae.py:{encoder}")
    assert (config.model.input_dim, config.data.view_size) == (width, view)
    assert Network("semantic_vae", config.model.to_dict()).config.input_dim == width
    with pytest.raises(SfdError, match="contradict each other"):
        load_config(f"configs/sfd.py:xl,{encoder},mae")


def test_default_recipe_is_the_released_one():
    config = load_config("configs/sfd.py:xl")
    task = task_from_config(config)
    assert config.clocks.delta_t == 0.3 and config.loss.semantic_weight == 2.0
    assert (config.train.global_batch_size, config.train.ema_decay) == (256, 0.9999)
    # 682.8M of the paper's table, which counts the fixed 256 x 1152 position table too.
    assert task.network.num_params() + 256 * 1152 == 682_765_424


def test_path_and_prediction_are_chosen_by_flags():
    given = ["--config.loss.path.name=vp", "--config.loss.path.beta_max=15", "--config.loss.prediction.name=noise"]
    loss = diffusion_settings(load_config("configs/sfd.py:s,tiny", given))["config"]
    assert (loss.path, loss.prediction) == (VPPath(beta_max=15.0), NoisePrediction())
    for flag, says in (("path.name=vq", "did you mean 'vp'"), ("path.beta_max=15", "has no 'beta_max'")):
        with pytest.raises(SfdError, match=says):
            diffusion_settings(load_config("configs/sfd.py:s,tiny", [f"--config.loss.{flag}"]))


@pytest.mark.parametrize("size", [32, 64])
def test_small_configs_fit_each_other(size):
    load = lambda name, *flags: load_config(f"configs/{name}.py:small", [f"--config.{flag}" for flag in flags])
    vae, encoder = (load(name, f"data.image_size={size}") for name in ("texture_vae", "visual_encoder"))
    semvae, sfd = load("semantic_vae", f"data.images.image_size={size}"), load("sfd", "model.num_classes=3")
    textures, visual = Network("texture_vae", vae.model.to_dict()), Network("dinov2", encoder.model.to_dict())
    grid = size // textures.config.downsampling
    assert visual.config.image_size == semvae.data.view_size == size and grid == size // visual.config.patch_size
    assert visual.config.feature_width == semvae.model.input_dim == sfd.model.repa_features
    assert sfd.latents.texture_channels == vae.model.z_channels
    assert sfd.latents.semantic_channels == semvae.model.bottleneck_dim
    assert encoder.loss.num_classes is sfd.model.input_size is None  # the data's
    for argument in ("small", "small,weak"):
        task_from_config(
            load_config(f"configs/sfd.py:{argument}", ["--config.model.num_classes=3", "--config.model.input_size=4"])
        )


@pytest.mark.parametrize(
    "argument",
    ["texture_vae.py:small", "semantic_vae.py:small", "visual_encoder.py:small", "sfd.py:small", "sfd.py:small,weak"],
)
def test_averages_of_small_configs_forget_the_first_weights_and_their_runs_may_go_on(argument):
    train = train_config(load_config(f"configs/{argument}"))
    assert train.ema_decay**train.steps < 0.01 and train.optimizer.may_extend


@pytest.mark.parametrize(
    "argument", ["digits.py", "digits.py:tiny", "mnist.py", "mnist.py:study", "mnist.py:study,tiny"]
)
def test_digits_resolve(argument):
    config = load_config(f"configs/{argument}")
    for stage in ("diffusion", "weak"):
        task_from_config(config[stage])
    for stage, network in (("texture_vae", "texture_vae"), ("encoder", "dinov2"), ("semantic_vae", "semantic_vae")):
        train_config(config[stage])
        assert Network(network, config[stage].model.to_dict()).num_params() < 3e6
    SampleConfig.from_group(config.sample)


def test_semantic_colours_do_not_depend_on_the_images_shown():
    random = np.random.default_rng(0)
    reference = random.standard_normal((50, 4, 4, 5)) * np.array([9, 5, 3, 0.1, 0.1])
    shown = reference[:7]
    colours = semantic_colours(shown, reference)
    assert colours.shape == (7, 4, 4, 3) and colours.min() >= 0 and colours.max() <= 1
    assert np.array_equal(semantic_colours(shown[:2], reference), colours[:2])
    # The widest axis of the reference is the first colour, up to its sign.
    assert abs(np.corrcoef(colours[..., 0].ravel(), shown[..., 0].ravel())[0, 1]) > 0.95
