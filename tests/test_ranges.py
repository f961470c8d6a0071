"""Every number of every config, config dataclass and flag is checked against the table of ranges."""

import argparse
import copy
import dataclasses

import pytest

from sfd_jax.cli import flags as cli_flags
from sfd_jax.cli.main import COMMANDS, main
from sfd_jax.diffusion.clocks import FixedOffset
from sfd_jax.diffusion.losses import LossConfig
from sfd_jax.diffusion.sample_config import SampleConfig, SampleJob, SolverConfig
from sfd_jax.errors import SfdError
from sfd_jax.experiment.config_files import load_config
from sfd_jax.latents import LatentLayout
from sfd_jax.models.encoders import DINOV2_SIZES, DinoV2Config, DinoV3Config
from sfd_jax.models.lightning_dit import SIZES, DiTConfig
from sfd_jax.models.lpips import LpipsConfig
from sfd_jax.models.semantic_vae import SemanticVAEConfig
from sfd_jax.models.texture_vae import TextureVAEConfig
from sfd_jax.ranges import Only, Range, check, faults, useless
from sfd_jax.settings import ranges_of
from sfd_jax.training import OptimizerConfig, TrainConfig
from sfd_jax.training.semantic_vae import SemanticVAELoss
from sfd_jax.training.texture_vae import TextureVAELoss
from sfd_jax.training.visual_encoder import VisualEncoderLoss

WRONG = (float("nan"), float("inf"), float("-inf"), -1, 1e30, True)
CONFIGS = [
    "configs/sfd.py:xl",
    "configs/sfd.py:b,weak,tiny",
    "configs/sfd.py:xl,lr2e4",
    "configs/semantic_vae.py",
    "configs/semantic_vae.py:tiny",
    "configs/texture_vae.py",
    "configs/texture_vae.py:tiny",
    "configs/digits.py",
    "configs/digits.py:tiny",
]
# Valid values among WRONG, and why.
TAKEN = {
    ("data", -1): "mesh.data=-1 is whatever the other axis leaves",
    ("fsdp", -1): "the same of mesh.fsdp",
    ("attention_levels", -1): "counts from the coarsest level",
}
CLASSES = {
    OptimizerConfig: {},
    TrainConfig: {},
    LossConfig: {},
    SolverConfig: {"solver": "euler"},
    SampleConfig: {"solver": "euler", "guidance": "autoguidance", "guidance_scale": 2.0},
    SampleJob: {},
    FixedOffset: {},
    LatentLayout: {"texture_channels": 3, "semantic_channels": 2},
    DiTConfig: SIZES["S"],
    DinoV2Config: DINOV2_SIZES["S"],
    DinoV3Config: DINOV2_SIZES["S"],
    SemanticVAEConfig: {},
    TextureVAEConfig: {},
    LpipsConfig: {},
    SemanticVAELoss: {},
    TextureVAELoss: {},
    VisualEncoderLoss: {"num_classes": 10},
}


def numbers(tree, path=()):
    """Yield the path of each number in a nested dict."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from numbers(value, (*path, name))
        elif (
            isinstance(value, (int, float))
            and not isinstance(value, bool)
            or isinstance(value, (tuple, list))
            and value
            and isinstance(value[0], (int, float))
        ):
            yield (*path, name)


def wrong_of(name):
    return [value for value in WRONG if isinstance(value, bool) or (name, value) not in TAKEN]


@pytest.mark.parametrize("name", CONFIGS)
def test_each_number_of_each_config_is_checked(name):
    config = load_config(name).to_dict()
    paths = list(numbers(config))
    own = {f"sample.{name}": row for name, row in ranges_of(SampleJob).items()}
    own |= {f"{group}clocks.delta_t": ranges_of(FixedOffset)["delta_t"] for group in ("", "diffusion.", "weak.")}
    assert len(paths) > 20
    for path in paths:
        for value in wrong_of(path[-1]):
            changed = copy.deepcopy(config)
            node = changed
            for part in path[:-1]:
                node = node[part]
            node[path[-1]] = (value,) if isinstance(node[path[-1]], (tuple, list)) else value
            said = faults(changed, own=own)
            assert len(said) == 1 and said[0].startswith(".".join(path) + "="), (path, value, said)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_each_number_of_each_dataclass_is_checked(cls):
    values = CLASSES[cls]
    cls(**values)
    checked = 0
    for field in dataclasses.fields(cls):
        kind = str(field.type)
        if not any(word in kind for word in ("int", "float")):
            continue
        checked += 1
        for value in wrong_of(field.name):
            given = (value,) if "tuple" in kind else value
            with pytest.raises(SfdError, match=rf"\b{field.name}="):
                cls(**{**values, field.name: given})
        if kind in ("<class 'int'>", "<class 'float'>"):
            for value in (None, "3"):
                with pytest.raises(SfdError, match=rf"\b{field.name}="):
                    cls(**{**values, field.name: value})
    assert checked
    for field in dataclasses.fields(cls):
        if field.type is bool:
            with pytest.raises(SfdError, match=f"{field.name}=2: give True or False"):
                cls(**{**values, field.name: 2})


class Parsed(Exception):
    pass


def parser_of(command, monkeypatch):
    """Return the parser of a command, stopped just before it reads anything."""

    def stop(parser, *_):
        raise Parsed(parser)

    with monkeypatch.context() as patch:
        patch.setattr(cli_flags._Parser, "parse_known_args", stop)
        with pytest.raises(Parsed) as stopped:
            main([command])
    return stopped.value.args[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_each_number_of_each_flag_is_checked(command, monkeypatch):
    parser = parser_of(command, monkeypatch)
    for action in parser._actions:
        if action.type not in (int, float):
            continue
        alone = argparse.Namespace()
        assert not faults({action.dest: action.default}, "--", command), "a default outside its range"
        for value in wrong_of(""):
            if action.type is int and isinstance(value, float) and (value != value or abs(value) == float("inf")):
                with pytest.raises(ValueError):
                    int(str(value))  # argparse refuses it
                continue
            setattr(alone, action.dest, action.type(value) if not isinstance(value, bool) else value)
            said = faults(vars(alone), "--", command, {action.dest: getattr(action, "range", None)})
            assert said and said[0].startswith(f"--{action.dest}="), (action.dest, value)


def test_integers_are_integers_and_bools_are_not_numbers():
    whole, share = Range(int, 1, 10), Range(float, 0, 1, below=True)
    assert 3 in whole and 3.0 not in whole and True not in whole and "3" not in whole
    assert 0 in share and 0.5 in share and 1.0 not in share and False not in share
    assert str(whole) == "an integer from 1 to 10" and str(share) == "a number from 0 to below 1"


@pytest.mark.parametrize("seed", [-1, 2**32, 1.0, True])
def test_seeds_have_32_bits_everywhere(seed):
    import numpy as np

    from sfd_jax.data.pipeline import make_batches
    from sfd_jax.distributed import make_mesh
    from sfd_jax.generation import make_labels
    from sfd_jax.training.randomness import stream_key

    for use in (
        lambda: check(seed=seed),
        lambda: stream_key(seed, "loss", make_mesh()),
        lambda: make_labels("random", 4, 2, seed=seed),
        lambda: make_batches([{"x": np.zeros(1)}], seed=seed, global_batch_size=1),
    ):
        with pytest.raises(SfdError, match="seed=.*from 0 to 4,294,967,295"):
            use()


def test_the_largest_seed_is_used():
    import jax

    from sfd_jax.distributed import make_mesh
    from sfd_jax.generation.sampler import sample_noise
    from sfd_jax.training.randomness import stream_key

    mesh, seeds = make_mesh(), (0, 1, 2**31, 2**32 - 1)
    keys = {tuple(jax.random.key_data(stream_key(seed, "loss", mesh)).tolist()) for seed in seeds}
    noises = {float(sample_noise(seed, jax.numpy.arange(1), (1,))[0, 0]) for seed in seeds}
    assert len(keys) == len(noises) == len(seeds)


def test_settings_without_effect_are_named():
    rules = (
        Only("b c", "a"),
        Only("d", "a", ("x", "y"), hint="or so"),
        Only("e", "a", ("x",), never=True),
        Only("f", "missing"),
    )
    values = {"a": None, "b": 1, "c": 2, "d": 3, "e": 4, "f": 5}
    assert useless(rules, values, {"b", "d", "e", "f"}, "--{}".format) == {
        "b": "--b=1 has no effect without --a",
        "d": "--d=3 has no effect without --a=x or y (or so)",
    }
    assert useless(rules, {**values, "a": "x"}, set(values)) == {"e": "e=4 has no effect beside a=x"}
    assert useless(rules, {**values, "a": "z"}, {"c", "d"}) == {"d": "d=3 has no effect without a=x or y (or so)"}


@pytest.mark.parametrize(
    "fields",
    [
        dict(guidance_scale=1.5),
        dict(guidance="none", guidance_scale=3.0),
        dict(guidance="autoguidance"),
        dict(guidance="cfg", guidance_scale=1.0),
        dict(guidance="cfg", guidance_scale=2.0, guidance_scale_semantic=1.5),
        dict(guidance="autoguidance", guidance_scale_semantic=1.0),
        dict(guidance="cfg", guidance_scale=2.0, guidance_interval_groups="tex"),
        dict(guidance="cfg", guidance_scale=2.0, guidance_interval_start=0.2, guidance_interval_groups="text"),
        dict(guidance_interval_start=0.5),
        dict(guidance="cfg", guidance_scale=2.0, guidance_interval_start=1.0),
        dict(num_steps=50),
        dict(nfe=50),
        dict(timestep_shift=2.0),
        dict(mode="released", timestep_shift=2.0),
        dict(solver="euler", atol=1e-4),
        dict(solver="euler", rtol=1e-4),
        dict(solver="euler", nfe=12, num_steps=20),
    ],
)
def test_a_sampler_setting_without_effect_is_refused(fields):
    with pytest.raises(SfdError):
        SampleConfig(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        dict(solver="euler", nfe=12, timestep_shift=2.0),
        dict(rtol=1e-2, atol=1e-4),
        dict(guidance="cfg", guidance_scale=2.0, guidance_interval_start=0.2, guidance_interval_groups="tex"),
        dict(guidance="autoguidance", guidance_scale_semantic=1.5),
        dict(guidance="autoguidance", guidance_scale=0.0, guidance_scale_texture=1.0),
    ],
)
def test_a_sampler_setting_with_effect_is_accepted(fields):
    SampleConfig(**fields)


def test_a_config_group_fits_every_solver_and_guidance():
    config = load_config("configs/digits.py", ["--config.sample.solver=euler", "--config.sample.guidance=none"])
    sample = SampleConfig.from_group(config.sample)
    assert (sample.rtol, sample.guidance_scale, sample.num_steps) == (SampleConfig().rtol, 1.0, 100)
    once = {"guidance_scale_semantic": -1.0, "nfe": 0, "timestep_shift": 0.0}  # None, in the old form
    assert SampleConfig.from_group({**config.sample, **once}) == sample
