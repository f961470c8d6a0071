"""Records of runs and demos started by earlier versions."""

import pytest

from sfd_jax.diffusion.sample_config import SampleJob
from sfd_jax.errors import SfdError
from sfd_jax.settings import to_dict
from sfd_jax.training.record import claim_workdir, upgraded


def record(**clocks):
    return {"config": {"clocks": clocks, "loss": {"repa_weight": 1.0}, "seed": 0}}


def test_a_run_whose_record_gives_all_clocks_a_delta_t_resumes(tmp_path):
    claim_workdir(tmp_path, record(name="sequential", delta_t=0.3), may_extend=False)
    claim_workdir(tmp_path, record(name="sequential"), may_extend=False)
    with pytest.raises(SfdError, match='config.clocks.name: there "sequential", here "fixed_offset"'):
        claim_workdir(tmp_path, record(name="fixed_offset", delta_t=0.3), may_extend=False)
    old = record(name="of_a_plugin_that_is_not_here", x=1)
    assert upgraded(old)["config"]["clocks"] == old["config"]["clocks"]


def test_a_run_from_before_a_setting_was_added_resumes_with_the_value_it_had(tmp_path):
    claim_workdir(tmp_path, record(), may_extend=False)
    new = lambda gamma: {"config": {**record()["config"], "loss": {"repa_weight": 1.0, "repa_spatial_norm": gamma}}}
    claim_workdir(tmp_path, new(0.0), may_extend=False)
    with pytest.raises(SfdError, match="config.loss.repa_spatial_norm: there 0.0, here 0.6"):
        claim_workdir(tmp_path, new(0.6), may_extend=False)


def test_groups_at_any_depth_are_upgraded():
    once = {
        "diffusion": {"clocks": {"name": "fixed_offset", "delta_t": 0.3}},
        "sample": {"solver": "dopri5", "num_steps": 50, "calls": 0, "timestep_shift": 1.0, "rtol": 0.01, "num": 9},
    }
    assert upgraded(once) == once | {"sample": to_dict(SampleJob(rtol=0.01, num=9))}


def test_settings_of_parts_may_not_change_whatever_their_names(tmp_path):
    def own(**changed):
        values = {"path": "a", "workers": 1, "remat": False, "sample": 1.0} | changed
        clocks, term = {"name": "mine", **values}, {"weight": 1.0, **values}
        return {"config": {"clocks": clocks, "loss": {"terms": {"sample": term, "mesh": term}}}, "data_hash": "0"}

    claim_workdir(tmp_path, own(), may_extend=True)
    assert (
        upgraded(own())["config"]["loss"]["terms"] == own()["config"]["loss"]["terms"]
    )  # a term called `sample` is not the config group
    for changed in ({"path": "b"}, {"workers": 2}, {"remat": True}, {"sample": 2.0}):
        [name] = changed
        with pytest.raises(SfdError) as error:
            claim_workdir(tmp_path, own(**changed), may_extend=True)
        for group in ("clocks", "loss.terms.sample", "loss.terms.mesh"):
            assert f"config.{group}.{name}: there" in str(error.value)
