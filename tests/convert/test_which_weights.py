"""Which weights of a file are used: averages under any name, wrappers in keys, steps, weights that are not finite."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from sfd_jax.cli.convert import main
from sfd_jax.convert import FORMATS
from sfd_jax.convert.checkpoints import Stated, export_checkpoint, import_checkpoint
from sfd_jax.convert.lazy_array import LazyArray
from sfd_jax.convert.pickles import Record
from sfd_jax.convert.weight_files import choose_state, find_sets
from sfd_jax.diffusion.paths import GVPPath, LinearPath, VPPath
from sfd_jax.diffusion.predictions import NoisePrediction, ScorePrediction, VelocityPrediction, transport_of
from sfd_jax.errors import SfdError
from tests.convert.test_checkpoints import dit_state, same_bytes

RAW, MEAN = dit_state(0), dit_state(1)


def lazy(node):
    """Turn arrays into what a reader returns."""
    if isinstance(node, dict):
        return {key: lazy(value) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [lazy(value) for value in node]
    return LazyArray(node.shape, node.dtype, lambda: node) if isinstance(node, np.ndarray) else node


def choose(tree, which=None):
    return choose_state(lazy(tree), "f.pt", which)


def holds(file, state) -> bool:
    return file.state.keys() == state.keys() and all(np.array_equal(file.state[k], state[k]) for k in state)


def prefixed(state, prefix):
    return {prefix + key: array for key, array in state.items()}


NUMBER = np.ones((), np.float32)
TRAINED = {k: v for k, v in MEAN.items() if k != "pos_embed" and not k.startswith("feat_rope")}
DOTLESS = {f"model_ema.{key.replace('.', '')}": array for key, array in TRAINED.items()}
AVERAGES = {
    "ema": {"model": RAW, "ema": MEAN},
    "model_ema": {"model": RAW, "model_ema": MEAN},
    "ema_model": {"model": RAW, "ema_model": MEAN},
    "state_dict_ema": {"state_dict": RAW, "state_dict_ema": MEAN},
    "ema_state_dict": {"model_state_dict": RAW, "ema_state_dict": MEAN},
    "params_ema": {"params": RAW, "params_ema": MEAN},
    "EMAWeights": {"model": RAW, "EMAWeights": MEAN},
    "emaWeights": {"model": RAW, "emaWeights": MEAN},
    "averaged": {"model": RAW, "averaged_model": {"n_averaged": NUMBER} | prefixed(MEAN, "module.")},
    "swa": {"model": RAW, "swa_state_dict": MEAN},
    "g_ema": {"g": RAW, "d": {"w.a": NUMBER}, "g_ema": MEAN},
    "shadow": {"model": RAW, "ema": {"decay": 0.999, "shadow": MEAN}},
    "shadow with counters": {"model": RAW, "ema": {"decay": NUMBER, "num_updates": NUMBER, "shadow": MEAN}},
    "shadow and backup": {"model": RAW, "ema": {"shadow": MEAN, "backup": RAW}},
    "ema/module": {"model": RAW, "ema": {"module": MEAN, "updates": 5}},
    "ema/model": {"model": RAW, "ema": {"model": MEAN}},
    "list": {"model": RAW, "ema": list(MEAN.values())},
    "torch_ema": {"model": RAW, "ema": {"shadow_params": list(TRAINED.values()), "collected_params": None}},
    "torch_ema, collected": {
        "model": RAW,
        "ema": {"shadow_params": list(TRAINED.values()), "collected_params": list(RAW.values())},
    },
    "in the optimizer": {"model": RAW, "optimizer_states": [{"state": {}, "ema": list(MEAN.values())}]},
    "one a parameter in the optimizer": {
        "model": RAW,
        "opt": {"state": {i: {"exp_avg": a, "grad_ema": a, "ema": a} for i, a in enumerate(TRAINED.values())}},
    },
    "a callback's": {"state_dict": RAW, "callbacks": {"EMACallback{'decay': 0.9}": {"ema_state_dict": MEAN}}},
    "Lightning's WeightAveraging": {"state_dict": MEAN, "current_model_state": RAW},
    "two prefixes": {"state_dict": prefixed(RAW, "model.") | prefixed(MEAN, "ema_model.")},
    "ema-pytorch": {
        "ema": prefixed(RAW, "online_model.") | prefixed(MEAN, "ema_model.") | {"initted": NUMBER, "step": NUMBER}
    },
    "only one prefix": {"model": prefixed(MEAN, "ema_model.")},
    "a bare state dict": prefixed(RAW, "net.") | prefixed(MEAN, "net_ema."),
    "names without dots": {"state_dict": prefixed(RAW, "model.") | DOTLESS | {"model_ema.decay": NUMBER}},
    "all but the fixed tables": {"model": RAW, "ema": TRAINED},
}


@pytest.mark.parametrize("name", AVERAGES)
def test_averages_are_used_under_any_name(name):
    file = choose(AVERAGES[name])
    assert file.which == "ema"
    fixed = {key: RAW[key] for key in RAW if key not in TRAINED}
    assert holds(file, MEAN) or holds(file, TRAINED | fixed)
    if file.name != "ema":
        assert any("averaged weights: those of" in note for note in file.notes)
    if any(state is RAW for state in AVERAGES[name].values()):
        assert holds(choose(AVERAGES[name], "raw"), RAW)


@pytest.mark.parametrize(
    "tree, said",
    [
        ({"model": RAW, "ema": list(MEAN.values())[:-1]}, "list of .* does not fit the order, number and shapes"),
        ({"model": RAW, "ema": list(MEAN.values())[::-1]}, "does not fit the order"),
        # Sorted keys have lost the order of the parameters.
        ({"model": dict(sorted(RAW.items())), "ema": [MEAN[key] for key in sorted(MEAN)]}, "does not fit the order"),
        ({"ema": list(MEAN.values())}, "a list of arrays without names"),
        ({"model": RAW, "ema": [[key, array] for key, array in MEAN.items()]}, "several averages: 'ema/0' .* [.]{3};"),
        ({"model": RAW, "ema": {0: NUMBER[None], "w.b": NUMBER[None]}}, "does not fit the order"),
        ({"model": RAW, "ema_params": {}}, "'ema_params' should be an average but holds no arrays"),
        ({"model": RAW, "ema": {}}, "'ema' should be an average but holds no arrays"),
        ({"model": RAW, "ema": {"decay": 0.9, "updates": 3}}, "'ema' should be an average but holds no arrays"),
        ({"model": RAW, "helper": Record("timm.utils.ModelEmaV2")}, "'helper' should be an average"),
        ({"state_dict": RAW, "callbacks": {"EMA": {}}}, "'callbacks/EMA' should be an average"),
        ({"model": RAW, "ema": prefixed(MEAN, "other_")}, "should be the average of 'model' but has other keys"),
        ({"model": RAW, "ema_0.999": MEAN, "ema_0.9999": MEAN}, "several averages: 'ema_0.999' .*'ema_0.9999'"),
        ({"model": RAW, "teacher": MEAN}, "does not say which are averaged: 'model' .*'teacher'"),
        ({"model": RAW, "best_state": MEAN}, "does not say which are averaged"),
        ({"model": RAW, "teacher": TRAINED}, "does not say which are averaged"),
        ({"student": RAW, "teacher": MEAN}, "several sets of weights: 'student' .*'teacher'"),
    ],
)
def test_raw_weights_never_replace_an_average_silently(tree, said):
    with pytest.raises(SfdError, match=said):
        choose(tree)
    for name in ("model", "state_dict", "student"):
        if name in tree:
            assert holds(choose(tree, name if name == "student" else "raw"), RAW)


def test_names_without_dots_that_fit_several_are_refused():
    one = NUMBER[None]
    with pytest.raises(SfdError, match="abc of 'ema' could be several arrays of 'model'"):
        choose({"model": {"a.bc": one, "ab.c": one}, "ema": {"abc": one}})


@pytest.mark.parametrize("key", ["blocks.0.attn.proj.weight", "pos_embed", "y_embedder.embedding_table.weight"])
@pytest.mark.parametrize("shape", [(), (0,), (0, 0, 0)])
def test_impossible_shapes_are_refused(tmp_path, key, shape):
    state = {k: v for k, v in RAW.items() if not k.startswith("blocks.1.")} | {key: np.zeros(shape, np.float32)}
    safetensors.numpy.save_file(state, tmp_path / "f.safetensors")
    with pytest.raises(SfdError, match="f.safetensors'"):
        import_checkpoint(tmp_path / "f.safetensors")


def test_one_of_several_is_chosen_by_name():
    tree = {"model": RAW, "ema_0.999": RAW, "ema_0.9999": MEAN}
    assert holds(choose(tree, "ema_0.9999"), MEAN) and choose(tree, "ema_0.9999").which == "ema"
    with pytest.raises(SfdError, match="no weights named 'ema_0.99'; did you mean"):
        choose(tree, "ema_0.99")


METERS = {"loss_meters": {"average_meter": [Record("train.AverageMeter")]}, "best": Record("train.AverageMeter")}


@pytest.mark.parametrize(
    "beside", [{"use_ema": True}, {"ema": None}, {"ema_decay": 0.9}, {"config": {"ema": {}}}, METERS]
)
def test_settings_of_an_average_are_not_an_average(beside):
    file = choose({"model": RAW} | beside)
    assert file.which == "raw" and holds(file, RAW)


def test_a_bare_state_dict_may_be_an_average_by_the_files_name(tmp_path):
    for name, which in (("ema_0.9999_050000", "ema"), ("model_ema", "ema"), ("model", "raw")):
        safetensors.numpy.save_file(MEAN, tmp_path / f"{name}.safetensors")
        imported = import_checkpoint(tmp_path / f"{name}.safetensors")
        assert imported.metadata["foreign"]["weights"] == which
        assert ("averaged weights: by the file's name" in imported.notes) == (which == "ema")
    folder = tmp_path / "only"
    folder.mkdir()
    safetensors.numpy.save_file(MEAN, folder / "ema.safetensors")
    assert import_checkpoint(folder).metadata["foreign"]["weights"] == "ema"
    folder = tmp_path / "dit_0.9999_ema"
    folder.mkdir()
    safetensors.numpy.save_file(MEAN, folder / "model.safetensors")
    assert import_checkpoint(folder).metadata["foreign"]["weights"] == "ema"
    (folder / "ema").mkdir()
    with pytest.raises(SfdError, match="beside them averages: ema"):
        import_checkpoint(folder)


def test_no_key_of_a_known_network_reads_as_an_average():
    rows = [row.theirs for module in FORMATS.values() for row in module.TABLE.rows]
    keys = [key for theirs in rows for key in ([theirs] if isinstance(theirs, str) else theirs)]
    found = find_sets({key: LazyArray((2,), np.dtype("f4"), None) for key in keys})
    assert [(s.name, s.which, len(s.arrays)) for s in found] == [("", "raw", len(set(keys)))]


def test_raw_weights_without_an_average_are_noted(tmp_path, torch_file):
    for tree, said in (({"model": RAW}, "holds no average beside 'model'"), (RAW, "does not say whether they are av")):
        (tmp_path / "f.pt").write_bytes(torch_file(tree).zip_bytes())
        assert any(said in note for note in import_checkpoint(tmp_path / "f.pt").notes)
        assert not any("averag" in note for note in import_checkpoint(tmp_path / "f.pt", Stated(which="raw")).notes)


def inside(*words):
    """Put wrappers' names into the keys of each block."""
    wrap = ".".join(words)
    return {re_blocks(key, wrap): array for key, array in RAW.items()}


def re_blocks(key, wrap):
    head, *rest = key.split(".")
    return ".".join([head, rest[0], wrap, *rest[1:]]) if head == "blocks" else key


@pytest.mark.parametrize("word", ["_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "module"])
def test_wrappers_inside_keys_are_removed(word):
    file = choose({"model": inside(word)})
    assert holds(file, RAW)
    assert any(f"'{word}.' from " in note for note in file.notes)
    assert holds(choose({"model": inside(word, "_orig_mod", word)}), RAW)


@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "_orig_mod.",
        "_forward_module.",
        "_fsdp_wrapped_module.",
        "model.",
        "net.",
        "network.",
        "dit.",
        "_orig_mod.module.",
        "model._orig_mod.module.",
        "module.net.model.",
    ],
)
def test_wrappers_before_all_keys_are_removed(prefix):
    for tree in ({"model": prefixed(RAW, prefix)}, prefixed(RAW, prefix)):
        file = choose(tree)
        assert holds(file, RAW)
        assert all(any(f"'{part}.' from {len(RAW)}" in n for n in file.notes) for part in prefix.split(".")[:-1])


def test_a_copy_with_online_in_its_name_is_raw():
    file = choose({"model": prefixed(RAW, "online_model.")})
    assert holds(file, RAW) and file.which == "raw" and "weights: those of 'model/online_model.'" in file.notes


def test_without_wrappers_nothing_is_renamed():
    """Networks that really have such names keep them: LPIPS, and files of several networks."""
    assert choose({"model": RAW}).notes == []
    several = {"model.diffusion.blocks.w": NUMBER[None], "first_stage_model.encoder.w": NUMBER[None]}
    assert choose({"state_dict": several}).state.keys() == several.keys()
    lpips = {f"net.slice1.{i}.weight": NUMBER[None] for i in (0, 2)} | {"lin0.model.1.weight": NUMBER[None]}
    assert choose(lpips).state.keys() == lpips.keys()
    unknown = prefixed({"a.w": NUMBER[None], "a.b": NUMBER[None]}, "model.")
    assert choose({"model": unknown}).state.keys() == unknown.keys()


def test_keys_that_become_equal_are_both_named():
    key = "final_layer.linear.weight"
    with pytest.raises(SfdError, match=f"{key} and _orig_mod.{key} are both {key}"):
        choose({"model": RAW | {f"_orig_mod.{key}": RAW[key]}})


def test_entries_that_are_not_arrays_are_left_out_with_a_note():
    file = choose({"model": RAW | {"_extra_state": "x", "version": 3}})
    assert holds(file, RAW) and any("_extra_state, version" in note for note in file.notes)


@pytest.mark.parametrize(
    "name, beside, step",
    [
        ("0000100.pt", {}, 100),
        ("0400000.pt", {}, 400000),
        ("100.pt", {}, 100),
        ("step_100.pt", {}, 100),
        ("model-step=1200.ckpt", {}, 1200),
        ("epoch=3-step=4000.ckpt", {}, 4000),
        ("iter-100.pt", {}, 100),
        ("vae_iter_0100.pt", {}, 100),
        ("2025-05-01-final.pt", {}, 0),
        ("20250501.pt", {}, 0),
        ("1746057600.pt", {}, 0),
        ("2025_step_100.pt", {}, 100),
        ("100-final.pt", {}, 0),
        ("footstep_9.pt", {}, 0),
        ("step_100k.pt", {}, 0),
        ("100.pt", {"step": 7}, 7),
        ("final.pt", {"train_steps": 80000}, 80000),
        ("final.pt", {"global_step": np.full((), 77, np.float32)}, 77),
        ("final.pt", {"step": np.full((1,), 78, np.float32)}, 78),
        ("final.pt", {"step": 12.0}, 12),
        ("5.pt", {"step": float("nan")}, 5),
        ("5.pt", {"step": np.ones(3, np.float32)}, 5),
    ],
)
def test_the_step(tmp_path, torch_file, name, beside, step):
    (tmp_path / name).write_bytes(torch_file({"ema": RAW} | beside).zip_bytes())
    imported = import_checkpoint(tmp_path / name)
    assert imported.metadata["step"] == step
    assert any(note.startswith("step 0") for note in imported.notes) == (step == 0)


def test_step_and_config_may_be_one_level_down():
    file = choose({"checkpoint": {"model": RAW, "ema": {"shadow": MEAN, "step": 9}, "step": 4, "config": {"a": 1}}})
    assert file.extras == {"step": 4} and file.config == {"a": 1} and holds(file, MEAN)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_stop_a_conversion(tmp_path, dtype, value):
    state = {key: array.astype(dtype) for key, array in RAW.items()}
    for key, count in (("final_layer.linear.weight", 3), ("blocks.1.mlp.w3.bias", 1)):
        state[key] = state[key].copy()
        state[key].reshape(-1)[:count] = value
    safetensors.numpy.save_file(state, tmp_path / "bad.safetensors")
    with pytest.raises(SfdError) as error:
        import_checkpoint(tmp_path / "bad.safetensors")
    counts = "{0} NaN and 0 infinite" if np.isnan(value) else "0 NaN and {0} infinite"
    assert f"final_layer.linear.weight: {counts.format(3)} of 80" in str(error.value)
    assert f"blocks.1.mlp.w3.bias: {counts.format(1)} of 16" in str(error.value)
    assert "in 2 arrays" in str(error.value) and "--allow_nonfinite" in str(error.value)


def test_a_flag_allows_weights_that_are_not_finite(tmp_path, capsys):
    state = RAW | {"final_layer.linear.bias": np.full(5, np.nan, np.float32)}
    safetensors.numpy.save_file(state, tmp_path / "bad.safetensors")
    commands = (
        [str(tmp_path / "bad.safetensors"), f"--out={tmp_path}/ours"],
        [f"{tmp_path}/ours", f"--export={tmp_path}/back.safetensors"],
    )
    for command in commands:
        with pytest.raises(SfdError, match=r"in 1 arrays;[^$]*final_layer.linear.bias: 5 NaN and 0 infinite of 5"):
            main(command)
        assert main([*command, "--allow_nonfinite"]) == 0
    assert same_bytes(safetensors.numpy.load_file(tmp_path / "back.safetensors"), state)
    capsys.readouterr()


def test_numbers_too_large_for_the_written_dtype_are_refused(tmp_path):
    """float64 into our float32, and our float32 into a file's float16."""
    state = dict(RAW)
    state["final_layer.linear.weight"] = RAW["final_layer.linear.weight"].astype(np.float64) * 1e300
    safetensors.numpy.save_file(state, tmp_path / "large.safetensors")
    with pytest.raises(SfdError, match="final_layer.linear.weight: 0 NaN and 80 infinite"):
        import_checkpoint(tmp_path / "large.safetensors")
    half = {key: array.astype(np.float16) for key, array in RAW.items()}
    safetensors.numpy.save_file(half, tmp_path / "half.safetensors")
    imported = import_checkpoint(tmp_path / "half.safetensors")
    imported.params["final"]["linear"]["bias"][:] = 1e6
    with pytest.raises(SfdError, match="final_layer.linear.bias: 0 NaN and 5 infinite"):
        export_checkpoint(imported.params, imported.metadata)


@pytest.mark.parametrize(
    "changes, config, said, unsaid",
    [
        ({}, {}, ("delta_t 0.3: as released", "7 classes and a null label: as released"), ("prediction",)),
        ({}, {"semfirst_delta_t": 0.2, "class_dropout_prob": 0.1}, (), ("delta_t", "null label")),
        (dict(two_clocks=False), {}, ("prediction: velocity", "all 5 channels are texture"), ("sigma",)),
        (dict(two_clocks=False, learn_sigma=True), {}, ("the learned sigma is kept in the weights and not used",), ()),
        (dict(two_clocks=False), {"prediction": "velocity", "path_type": "Linear"}, (), ("prediction",)),
    ],
)
def test_assumptions_about_a_diffusion_network_are_noted(tmp_path, torch_file, changes, config, said, unsaid):
    tree = {"ema": dit_state(**changes)} | ({"config": json.dumps(config)} if config else {})
    (tmp_path / "f.pt").write_bytes(torch_file(tree).zip_bytes())
    notes = import_checkpoint(tmp_path / "f.pt").notes
    assert all(any(sentence in note for note in notes) for sentence in said)
    assert not any(word in note for note in notes for word in unsaid)


@pytest.mark.parametrize(
    ("config", "path", "prediction"),
    [
        ({"path_type": "Linear", "prediction": "velocity"}, LinearPath(), VelocityPrediction()),
        ({"path_type": "GVP", "prediction": "noise", "loss_weight": None}, GVPPath(), NoisePrediction()),
        (
            {"path_type": "VP", "prediction": "score", "loss_weight": "likelihood"},
            VPPath(),
            ScorePrediction(weight="likelihood"),
        ),
    ],
)
def test_path_and_prediction_of_the_files_config(tmp_path, torch_file, config, path, prediction):
    tree = {"ema": dit_state(two_clocks=False), "config": json.dumps({"transport": config})}
    (tmp_path / "f.pt").write_bytes(torch_file(tree).zip_bytes())
    metadata = import_checkpoint(tmp_path / "f.pt").metadata
    assert transport_of(metadata["config"]) == {"path": path, "prediction": prediction}


@pytest.mark.parametrize("config", [{"prediction": "data"}, {"path_type": "cosine"}])
def test_an_unknown_path_or_prediction_is_refused(tmp_path, torch_file, config):
    tree = {"ema": dit_state(two_clocks=False), "config": json.dumps({"transport": config})}
    (tmp_path / "f.pt").write_bytes(torch_file(tree).zip_bytes())
    with pytest.raises(SfdError, match=f"config in the file.*{next(iter(config.values()))}"):
        import_checkpoint(tmp_path / "f.pt")


def test_inspect_says_what_would_be_taken(tmp_path, torch_file, capsys):
    tree = {"model": RAW, "ema": {"decay": 0.9, "shadow": prefixed(MEAN, "module.")}}
    (tmp_path / "f.safetensors").write_bytes(torch_file(tree).zip_bytes())
    assert main(["--inspect", f"{tmp_path}/f.safetensors"]) == 0
    printed = capsys.readouterr().out
    for line in (
        "f.safetensors: a PyTorch file",
        f"weights 'model': raw, {len(RAW)} arrays",
        f"weights 'ema/shadow': averaged, {len(RAW)} arrays",
        "would convert 'ema/shadow': format lightning_dit, ema weights",
        f"note: names of wrappers removed: 'module.' from {len(RAW)} of {len(RAW)} keys",
    ):
        assert line in printed
