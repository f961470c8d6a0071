"""Files in the released formats, through the command and back."""

import json
import resource
import time

import jax
import numpy as np
import pytest
import safetensors.numpy
import yaml

from sfd_jax.cli.convert import main
from sfd_jax.convert import FORMATS
from sfd_jax.convert.checkpoints import Stated, export_checkpoint, import_checkpoint
from sfd_jax.convert.table import export_state
from sfd_jax.convert.weight_files import choose_state, read_tree
from sfd_jax.errors import SfdError
from sfd_jax.models import Network
from sfd_jax.parity.pack import drawn_weight
from sfd_jax.training.checkpoint import load_params

DIT = dict(width=16, depth=2, num_heads=2, input_size=3, in_channels=5, num_classes=7)


def dit_state(seed=0, **changes):
    network = Network("lightning_dit", DIT | changes)
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), network.abstract_params())
    return export_state(FORMATS["lightning_dit"].TABLE, params, network)


def write(path, data: bytes):
    path.write_bytes(data)
    return str(path)


def same_bytes(a, b) -> bool:
    return a.keys() == b.keys() and all(
        np.asarray(a[k]).tobytes() == np.asarray(b[k]).tobytes() and a[k].dtype == b[k].dtype for k in a
    )


@pytest.fixture
def released(tmp_path, torch_file):
    """A LightningDiT checkpoint with both sets of weights and an optimizer's state."""
    raw, ema = dit_state(0), dit_state(1)
    tree = {"model": raw, "ema": ema, "opt": {"lr": 1e-4, "m": np.ones(3, np.float32)}}
    return write(tmp_path / "0001234.pt", torch_file(tree).zip_bytes()), raw, ema


def test_average_by_default_raw_by_flag(released):
    path, raw, ema = released
    for which, weights in ((None, ema), ("ema", ema), ("raw", raw)):
        imported = import_checkpoint(path, Stated(which=which))
        state, tree = export_checkpoint(imported.params, imported.metadata)
        assert same_bytes(state, weights)
        assert list(tree) == (["model"] if which == "raw" else ["ema"])
    assert imported.metadata["step"] == 1234


def test_a_wrappers_prefix_is_removed(tmp_path, torch_file):
    state = dit_state()
    tree = {"model": {f"module.{key}": array for key, array in state.items()}}
    path = write(tmp_path / "ddp.pt", torch_file(tree).zip_bytes())
    imported = import_checkpoint(path)
    assert same_bytes(export_checkpoint(imported.params, imported.metadata)[0], state)
    with pytest.raises(SfdError, match=r"no ema weights \(it holds 'model'\); give --weights raw"):
        import_checkpoint(path, Stated(which="ema"))


def test_through_the_command_and_back(released, tmp_path, capsys):
    path, _, ema = released
    out, exported = tmp_path / "ours", tmp_path / "back.safetensors"
    for name, channels in (("tex", 3), ("sem", 2)):
        arrays = {k: np.full((1, channels, 1, 1), v, np.float32) for k, v in (("mean", 0.5), ("std", 2.0))}
        safetensors.numpy.save_file(arrays, tmp_path / f"{name}.safetensors")
    flags = [f"--statistics={tmp_path}/tex.safetensors", f"--semantic_statistics={tmp_path}/sem.safetensors"]
    assert main([path, f"--out={out}", *flags]) == 0
    assert main([str(out), f"--export={exported}"]) == 0
    assert same_bytes(safetensors.numpy.load_file(exported), ema)

    _, metadata = load_params(out)
    assert metadata["network"] == "lightning_dit" and metadata["step"] == 1234
    assert metadata["latent_statistics"]["semantic_std"] == [2.0, 2.0]
    assert metadata["config"]["latents"] == {"texture_channels": 3, "semantic_channels": 2}
    assert metadata["config"]["clocks"] == {"name": "fixed_offset", "delta_t": 0.3}
    json.dumps(metadata)

    # Nothing is overwritten.
    with pytest.raises(SfdError, match="exists"):
        main([path, f"--out={out}", *flags])
    with pytest.raises(SfdError, match="exists"):
        main([str(out), f"--export={exported}"])
    # Statistics of another system are refused.
    with pytest.raises(SfdError, match="2 texture and 2 semantic channels do not fit"):
        main([path, f"--out={out}2", flags[0].replace("tex", "sem"), flags[1]])
    capsys.readouterr()


def test_inspect_prints_and_converts_nothing(released, tmp_path, capsys):
    path, *_ = released
    before = sorted(tmp_path.iterdir())
    assert main(["--inspect", path]) == 0
    printed = capsys.readouterr().out
    for line in ("x_embedder.proj.weight  [16, 5, 1, 1] float32", "ema:  ", "depth 2", "lightning_dit"):
        assert line in printed
    assert sorted(tmp_path.iterdir()) == before


def test_a_config_in_the_file_informs_but_the_weights_decide(tmp_path, torch_file):
    """The released OmegaConf config is read as a plain dict; one that contradicts the weights is ignored."""

    def config(**values):
        def node(kind, key, value):
            call = f"comegaconf.{kind}\n)".encode() + b"\x81}X"
            return call + len(key).to_bytes(4, "little") + key.encode() + value + b"sb"

        raw = torch_file.Raw
        leaves = {k: raw(node("nodes\nAnyNode", "_val", torch_file({})._value(v))) for k, v in values.items()}
        inner = raw(node("dictconfig\nDictConfig", "_content", torch_file({})._value(leaves)))
        return raw(node("dictconfig\nDictConfig", "_content", torch_file({})._value({"model": inner})))

    state = dit_state(repa_features=3, repa_width=4)
    stored = dict(in_chans=5, semantic_chans=2, semfirst_delta_t=0.25, repa_depth=1)
    for in_chans, delta_t, repa_depth in ((5, 0.25, 1), (48, 0.3, 2)):
        tree = {"ema": state, "config": config(**stored | {"in_chans": in_chans})}
        imported = import_checkpoint(write(tmp_path / f"{in_chans}.pt", torch_file(tree).zip_bytes()))
        assert imported.metadata["foreign"]["config"]["model"]["semfirst_delta_t"] == 0.25
        assert imported.metadata["config"]["clocks"]["delta_t"] == delta_t
        assert imported.network.config.repa_depth == repa_depth
        assert any("weights win" in note for note in imported.notes) == (in_chans == 48)


def test_heads_are_read_from_the_semantic_vaes_yaml_config(tmp_path, torch_file):
    config = dict(arch="transformer", input_dim=7, bottleneck_dim=3, hidden_dim=10, transformer_heads=5)
    network = Network("semantic_vae", config | dict(transformer_blocks=2))
    module = FORMATS["semantic_vae"]
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), network.abstract_params())
    state = export_state(module.TABLE, params, network)
    text = yaml.safe_dump({"model": {"arch": "transformer", "params": {"transformer_heads": 5}}})
    tree = {"model_state_dict": state, "config": text, "iteration": 500}
    imported = import_checkpoint(write(tmp_path / "s.pt", torch_file(tree).zip_bytes()))
    assert imported.network.config == network.config and imported.metadata["step"] == 500
    _, exported = export_checkpoint(imported.params, imported.metadata)
    model = yaml.safe_load(exported["config"])["model"]
    assert model["params"]["transformer_heads"] == 5 and exported["input_dim"] == 7
    # Without the config the error says what to give.
    path = write(tmp_path / "t.pt", torch_file({"model_state_dict": state}).zip_bytes())
    with pytest.raises(SfdError, match="--set transformer_heads"):
        import_checkpoint(path)
    assert import_checkpoint(path, Stated(given={"transformer_heads": 5})).network.config == network.config


def test_other_formats_of_a_network_by_flag():
    network = Network("dinov2", dict(width=24, depth=2, num_heads=2, image_size=15, patch_size=5, num_registers=2))
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), network.abstract_params())
    metadata = {"network": "dinov2", "network_config": network.config_dict()}
    assert "cls_token" in export_checkpoint(params, metadata)[0]
    assert "embeddings.cls_token" in export_checkpoint(params, metadata, "dinov2_hf")[0]
    with pytest.raises(SfdError, match="no format 'dino'"):
        export_checkpoint(params, metadata, "dino")
    with pytest.raises(SfdError, match="is for inception"):
        export_checkpoint(params, metadata, "inception")


def test_unknown_and_damaged_files_say_what_is_wrong(tmp_path, torch_file, released):
    path, *_ = released
    with pytest.raises(SfdError, match=r"none of the known networks.*its keys begin with w \(1\)"):
        import_checkpoint(write(tmp_path / "x.pt", torch_file({"w": np.ones(3, np.float32)}).zip_bytes()))
    with pytest.raises(SfdError, match="holds a str"):
        import_checkpoint(write(tmp_path / "y.pt", torch_file("weights").zip_bytes()))
    with pytest.raises(SfdError, match="has no field 'num_head': did you mean 'num_heads'"):
        import_checkpoint(path, Stated(given={"num_head": 2}))
    safetensors.numpy.save_file(dit_state(), tmp_path / "z.safetensors")
    data = (tmp_path / "z.safetensors").read_bytes()
    for length in (4, 100, len(data) - 4):
        with pytest.raises(SfdError, match="not a complete safetensors"):
            import_checkpoint(write(tmp_path / "cut.safetensors", data[:length]))


def test_many_arrays_of_safetensors_cost_linear_time(tmp_path):
    arrays = {f"k{index}": np.full(2, index, np.float16) for index in range(6000)}
    safetensors.numpy.save_file(arrays, tmp_path / "f.safetensors")
    start = time.process_time()
    tree = read_tree(tmp_path / "f.safetensors")
    assert all(np.array_equal(tree[key], array) for key, array in arrays.items())
    assert time.process_time() - start < 15  # reading the header for each takes more than twice that
    (tmp_path / "f.safetensors").write_bytes(b"")
    with pytest.raises(SfdError, match="changed while it was being read"):
        np.asarray(tree["k0"])


def test_export_needs_a_known_suffix(released, tmp_path):
    path, *_ = released
    assert main([path, f"--out={tmp_path}/o"]) == 0
    with pytest.raises(SfdError, match="ends in .pt"):
        main([f"{tmp_path}/o", f"--export={tmp_path}/o.onnx"])
    assert not (tmp_path / "o.onnx").exists()


@pytest.mark.parametrize("suffix", ["safetensors", pytest.param("pt", marks=pytest.mark.torch)])
def test_an_export_that_cannot_be_written_is_named(released, tmp_path, suffix):
    if suffix == "pt":
        pytest.importorskip("torch", reason="needs the extra `torch`: pip install sfd_jax[torch]")
    path, *_ = released
    assert main([path, f"--out={tmp_path}/o"]) == 0
    with pytest.raises(SfdError, match=f"cannot write '.*absent/x.{suffix}'"):
        main([f"{tmp_path}/o", f"--export={tmp_path}/absent/x.{suffix}"])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # as on a full disk
    try:
        with pytest.raises(SfdError, match=f"cannot write '.*x.{suffix}'"):
            main([f"{tmp_path}/o", f"--export={tmp_path}/x.{suffix}"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["0001234.pt", "o"]


def test_swapped_statistics_are_noted_or_refused(tmp_path, torch_file):
    for name, channels in (("texture", 3), ("semantic", 2)):
        ones = np.ones((1, channels, 1, 1), np.float32)
        write(tmp_path / f"{name}.pt", torch_file({"mean": ones, "std": ones}).zip_bytes())
    texture, semantic = tmp_path / "texture.pt", tmp_path / "semantic.pt"
    file = write(tmp_path / "f.pt", torch_file({"ema": dit_state()}).zip_bytes())
    imported = import_checkpoint(file, Stated(texture_statistics=semantic, semantic_statistics=texture))
    assert "2 texture and 3 semantic channels: from the given statistics" in imported.notes
    tree = {"ema": dit_state(), "config": json.dumps({"in_chans": 5, "semantic_chans": 2})}
    with_config = write(tmp_path / "with_config.pt", torch_file(tree).zip_bytes())
    assert import_checkpoint(with_config, Stated(texture_statistics=texture, semantic_statistics=semantic))
    with pytest.raises(SfdError, match="2 texture and 3 semantic channels do not fit .* 2 of them semantic"):
        import_checkpoint(with_config, Stated(texture_statistics=semantic, semantic_statistics=texture))


# --- The parity pack's own files, where it is installed ---------------------------------------------------


@pytest.mark.parametrize(
    "name, which, seed",
    [
        ("0000100.pt", None, "seed_ema"),
        ("0000100_full.pt", None, "seed_ema"),
        ("0000100_full.pt", "raw", "seed_model"),
        ("ddp_prefixed.pt", None, "seed_model"),
        ("semvae.pt", None, None),
    ],
)
def test_the_packs_files_hold_the_drawn_weights_and_round_trip(parity_dir, name, which, seed):
    files = parity_dir / "files"
    if not (files / "files.json").exists():
        pytest.skip("this parity pack has no files in the released formats")
    drawn = json.loads((files / "files.json").read_text())
    shapes = drawn["semvae_params" if "semvae" in name else "params"]
    imported = import_checkpoint(files / name, Stated(which=which))
    state, _ = export_checkpoint(imported.params, imported.metadata)
    # files.json does not say which seed drew the Semantic VAE.
    seeds = [drawn[seed]] if seed else [0, drawn["seed_model"], drawn["seed_ema"]]
    assert any(
        all(np.array_equal(state[key], drawn_weight(key, shape, s)) for key, shape in shapes.items()) for s in seeds
    )
    original = choose_state(read_tree(files / name), name, which).state
    assert same_bytes(state, {key: np.asarray(array) for key, array in original.items()})
