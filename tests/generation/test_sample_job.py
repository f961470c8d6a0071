"""Settings of sampling: flags override the checkpoint, which overrides the defaults."""

import pytest

from sfd_jax.cli.flags import command_parser, parse_command
from sfd_jax.cli.sampling_flags import add_sampling_flags
from sfd_jax.diffusion.sample_config import SampleJob
from sfd_jax.errors import SfdError
from sfd_jax.experiment.config_files import load_config
from sfd_jax.experiment.sampling import described, sample_job

SHIPPED = load_config("configs/sfd.py:xl").sample.to_dict()
AUTO = dict(guidance="autoguidance", guidance_scale=1.5)
WEAK = "--weak=weak"


def job(saved, *flags):
    parser = command_parser("sample", "")
    add_sampling_flags(parser, required=False)
    args = parse_command(parser, list(flags))
    return sample_job({name: getattr(args, name) for name in args.given if name != "weak"}, saved, weak=args.weak)


@pytest.mark.parametrize(
    "saved, flags, wanted",
    [
        ({}, [], {}),  # older checkpoints have no settings
        ({}, [WEAK, "--guidance_scale=2"], dict(guidance="autoguidance", guidance_scale=2.0)),
        (SHIPPED, [WEAK], dict(AUTO, batch_size=64)),
        (SHIPPED, [WEAK, "--guidance_scale=2"], dict(AUTO, guidance_scale=2.0, batch_size=64)),
        (SHIPPED, ["--guidance=none", "--batch_size=3"], dict(batch_size=3)),
        (AUTO, ["--guidance=cfg", "--guidance_scale=4"], dict(guidance="cfg", guidance_scale=4.0)),
        (dict(solver="euler", nfe=20), [], dict(solver="euler", nfe=20)),
        (dict(solver="euler", nfe=20), ["--num_steps=9"], dict(solver="euler", num_steps=9)),
        (dict(solver="euler", num_steps=9), ["--nfe=20"], dict(solver="euler", nfe=20)),
        (dict(solver="euler", num_steps=9, rtol=0.1), ["--solver=dopri5"], dict(rtol=0.1)),
        (dict(num=5, labels="3"), ["--labels=random"], dict(num=5, labels="random")),
        # Older groups and checkpoints have settings of every solver and kind of guidance.
        (
            dict(SHIPPED, nfe=0, timestep_shift=0.0, guidance_scale_texture=-1.0, of_then=7),
            [WEAK],
            dict(AUTO, batch_size=64),
        ),
    ],
)
def test_flags_override_saved_settings(saved, flags, wanted):
    found, notes = job(saved, *flags)
    assert found == SampleJob(**wanted) and not notes


def test_saved_autoguidance_without_a_weak_model_is_noted():
    found, [note] = job(SHIPPED)
    assert found == SampleJob(batch_size=64) and "(--weak=CKPT): these samples are without guidance" in note
    with pytest.raises(SfdError, match="--guidance_scale=2.0 has no effect without --guidance=cfg or autoguidance"):
        job(SHIPPED, "--guidance_scale=2")


def test_saved_settings_dropped_for_a_weak_model_are_noted():
    saved = dict(guidance="cfg", guidance_scale=3.0, guidance_interval_start=0.2)
    found, [note] = job(saved, WEAK, "--guidance_scale=1.5")
    assert found == SampleJob(**AUTO)
    assert note.endswith("are dropped: guidance=cfg guidance_interval_start=0.2")
    assert job(saved, WEAK, "--guidance_scale=1.5", "--guidance=autoguidance") == (found, [])


@pytest.mark.parametrize(
    "saved, flags, says",
    [
        ({}, ["--nfe=9"], "--nfe=9 has no effect beside --solver=dopri5"),
        (dict(solver="euler"), ["--rtol=0.1"], "--rtol=0.1 has no effect without --solver=dopri5"),
        (dict(solver="euler"), ["--nfe=9", "--num_steps=9"], "--num_steps=9 has no effect beside --nfe"),
        ({}, [WEAK], "guidance 'autoguidance' with guidance_scale=1 is no guidance"),
        (AUTO, ["--guidance=cfg"], "guidance 'cfg' with guidance_scale=1 is no guidance"),  # a scale of another kind
        (AUTO, ["--guidance=cfg", WEAK], "--weak=weak has no effect without --guidance=autoguidance"),
        (
            {},
            [WEAK, *(f"--guidance_scale{of}=3" for of in ("", "_semantic", "_texture"))],
            "--guidance_scale has no effect beside --guidance_scale_semantic and --guidance_scale_texture",
        ),
        (dict(rtol=2.0), [], "sample.rtol=2.0: give a number above 0 to 1"),
    ],
)
def test_flags_without_effect_are_refused(saved, flags, says):
    with pytest.raises(SfdError, match=says):
        job(saved, *flags)


def test_settings_without_effect_are_not_described():
    assert described(SampleJob(num=5)) == (
        "solver=dopri5 mode=staged atol=1e-06 rtol=0.001 max_nfe=10000 guidance=none num=5 labels=balanced "
        "batch_size=16"
    )
