"""Files are identified by content, not by name; what is not weights is named, with advice."""

import gzip
import io
import json
import tarfile
import zipfile

import jax
import numpy as np
import pytest
import safetensors.numpy

from sfd_jax.cli.convert import main
from sfd_jax.convert import FORMATS
from sfd_jax.convert.checkpoints import Stated, export_checkpoint, import_checkpoint
from sfd_jax.convert.file_kinds import find_weights
from sfd_jax.convert.table import export_state
from sfd_jax.errors import SfdError
from sfd_jax.models import Network

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 2700000000\n"


@pytest.fixture(scope="module")
def state():
    config = dict(width=16, depth=2, num_heads=2, input_size=3, in_channels=5, num_classes=7)
    network = Network("lightning_dit", config)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), network.abstract_params())
    return export_state(FORMATS["lightning_dit"].TABLE, params, network)


def same_as(state, path) -> bool:
    imported = import_checkpoint(path)
    back, _ = export_checkpoint(imported.params, imported.metadata)
    return back.keys() == state.keys() and all(np.array_equal(back[key], state[key]) for key in state)


def npz(**arrays) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def zipped(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, b"x")
    return buffer.getvalue()


def tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model.pt"), io.BytesIO())
    return buffer.getvalue()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ""])
@pytest.mark.parametrize(
    "data, said",
    [
        (b"", "an empty file"),
        (bytes(3000), "zeros from its beginning"),
        (LFS, "Git LFS pointer.*git lfs pull"),
        (b"/annex/objects/SHA256E-s27--00.pt\n", "git-annex pointer"),
        (b"<!DOCTYPE html><html><title>Virus scan warning</title></html>", "a web page"),
        (b"\xef\xbb\xbf\n <HTML><body>", "a web page"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "a web page"),
        (b"Entry not found", "text that begins with 'Entry not found'"),
        ("Kein Zugriff für ".encode() * 400, "text that begins with 'Kein Zugriff"),
        (b'{"error": "Invalid username or password."}', "text that begins with .*Invalid username"),
        (gzip.compress(b"PK\x03\x04", mtime=0), "compressed with gzip"),
        (b"\x28\xb5\x2f\xfd\x00", "compressed with zstd"),
        (b"\xfd7zXZ\0\0", "compressed with xz"),
        (tar(), "a tar archive"),
        (npz(arr_0=np.ones(3)), "NumPy archive \\(npz\\) of 'arr_0'"),
        (zipped("model.weights.h5"), "zip archive that holds 'model.weights.h5'"),
        (b"\x93NUMPY\x01\x00", "single NumPy array"),
        (b"\x89HDF\r\n\x1a\n\0\0", "HDF5"),
        (b"GGUF\x03\0\0\0", "GGUF"),
        (b"\x82\xa6params\x80", "msgpack"),
        (b"\x80\x04\x95\x02\0\0\0\0\0\0\0}.", "pickle that torch.save did not write"),
        (b"\x89PNG\r\n\x1a\n", "an image"),
    ],
)
def test_what_is_not_weights_is_named(tmp_path, data, said, suffix):
    path = tmp_path / f"file{suffix}"
    path.write_bytes(data)
    with pytest.raises(SfdError, match=said):
        import_checkpoint(path)


def test_content_decides_and_not_the_name(tmp_path, state, torch_file):
    for name in ("really_safetensors.pt", "without_suffix", "model.bin"):
        safetensors.numpy.save_file(state, tmp_path / name)
        assert same_as(state, tmp_path / name)
    for name in ("really_torch.safetensors", "torch", "latest.zip"):
        (tmp_path / name).write_bytes(torch_file({"ema": state}).zip_bytes())
        assert same_as(state, tmp_path / name)
    (tmp_path / "older.safetensors").write_bytes(torch_file({"ema": state}, legacy=True).legacy_bytes())
    assert same_as(state, tmp_path / "older.safetensors")


def test_statistics_are_read_by_content_too(tmp_path, state, torch_file):
    (tmp_path / "w.pt").write_bytes(torch_file({"ema": state}).zip_bytes())
    stats = {key: np.full((1, 5, 1, 1), 2, np.float32) for key in ("mean", "std")}
    safetensors.numpy.save_file(stats, tmp_path / "stats.pt")
    statistics = import_checkpoint(tmp_path / "w.pt", Stated(texture_statistics=tmp_path / "stats.pt")).metadata
    assert statistics["latent_statistics"]["texture_std"] == [2.0] * 5
    (tmp_path / "lfs.pt").write_bytes(LFS)
    with pytest.raises(SfdError, match="lfs.pt' is a Git LFS pointer"):
        import_checkpoint(tmp_path / "w.pt", Stated(texture_statistics=tmp_path / "lfs.pt"))


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"PK\x03\x04")
    return folder


@pytest.mark.parametrize(
    "names, said",
    [
        ((".metadata", "__0_0.distcp"), "distributed checkpoint.*dcp_to_torch"),
        (("__0_0.distcp",), "without its .metadata"),
        (("pytorch_model_fsdp_0/.metadata", "pytorch_model_fsdp_0/__0_0.distcp"), "around a PyTorch distributed"),
        (("latest", "zero_to_fp32.py", "global_step10/mp_rank_00_model_states.pt"), "DeepSpeed.*zero_to_fp32"),
        (("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"), "part of a DeepSpeed"),
        (("checkpoint", "model.index", "model.data-00000-of-00001"), "a TensorFlow checkpoint"),
        (("_METADATA", "manifest.ocdbt", "d/0"), "Orbax checkpoint"),
        (("model_index.json", "unet/model.safetensors"), "Diffusers pipeline"),
        (("model.safetensors", "model_1.safetensors"), "several files of weights.*model.safetensors, model_1.safet"),
        (("model-00001-of-00002.safetensors",), r"shards .* but not their \*.index.json"),
        (("README.md", "optimizer.bin"), "without a file of weights .it holds README.md, optimizer.bin"),
        ((), "without a file of weights .it holds nothing"),
    ],
)
def test_folders_of_other_programs_are_named(tmp_path, names, said):
    with pytest.raises(SfdError, match=said):
        import_checkpoint(touch(tmp_path, *names))


def test_a_folder_with_one_file_of_weights_means_that_file(tmp_path, state, capsys):
    """Accelerate's folder with its other files; an average in it is not ignored."""
    folder = touch(tmp_path / "checkpoint-1200", "optimizer.bin", "scheduler.bin", "random_states_0.pkl", "scaler.pt")
    safetensors.numpy.save_file(state, folder / "model.safetensors")
    assert same_as(state, folder)
    assert import_checkpoint(folder).metadata["step"] == 1200
    touch(folder, "custom_checkpoint_0.pkl")
    assert any("custom_checkpoint_0.pkl" in note for note in import_checkpoint(folder).notes)
    touch(folder, "unet_ema/config.json")
    with pytest.raises(SfdError, match="beside them averages: unet_ema"):
        import_checkpoint(folder)
    assert import_checkpoint(folder, Stated(which="raw")).network.name == "lightning_dit"
    # A checkpoint of ours is not imported.
    assert main([str(folder), f"--out={tmp_path}/ours", "--weights=raw"]) == 0
    for ours in ("ours", "ours/1200"):
        with pytest.raises(SfdError, match="checkpoints? of sfd_jax"):
            main([f"{tmp_path}/{ours}", f"--out={tmp_path}/again"])
    capsys.readouterr()


def shards(folder, state, suffix="safetensors"):
    """Write a state dict as three shards with their index; return the index."""
    keys = list(state)
    names = [f"model-0000{i}-of-00003.{suffix}" for i in (1, 2, 3)]
    index = {key: names[i * 3 // len(keys)] for i, key in enumerate(keys)}
    for name in names:
        part = {key: state[key] for key in keys if index[key] == name}
        safetensors.numpy.save_file(part, folder / name)
    path = folder / f"model.{suffix}.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": index}))
    return path, index


def test_sharded_weights_are_read(tmp_path, state):
    index, _ = shards(tmp_path, state)
    assert same_as(state, tmp_path) and same_as(state, index)
    with pytest.raises(SfdError, match="is shard 2 of 3: give the folder"):
        import_checkpoint(tmp_path / "model-00002-of-00003.safetensors")


def test_every_fault_of_a_sharded_checkpoint_is_named(tmp_path, state):
    index, place = shards(tmp_path, state)
    files = sorted(set(place.values()))
    first, last = list(state)[0], list(state)[-1]
    parts = {name: safetensors.numpy.load_file(tmp_path / name) for name in files}
    del parts[files[0]][first]
    parts[files[1]][last] = state[last]
    parts[files[1]]["strange"] = np.ones(3, np.float32)
    for name in files[:2]:
        safetensors.numpy.save_file(parts[name], tmp_path / name)
    with pytest.raises(SfdError) as error:
        import_checkpoint(tmp_path)
    for line in (f"missing   {first} is not in {files[0]}", f"twice     {last}", "extra     strange of"):
        assert line in str(error.value)
    for name in files[1:]:
        (tmp_path / name).unlink()
    with pytest.raises(SfdError, match=f"missing shards {files[1]}, {files[2]}"):
        import_checkpoint(index)
    (tmp_path / files[1]).write_bytes(LFS)
    (tmp_path / files[2]).write_bytes(LFS)
    with pytest.raises(SfdError, match=f"{files[1]}' is a Git LFS pointer"):
        import_checkpoint(index)
    for text in ('{"weight_map": {"a": "../x"}}', '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map"'):
        index.write_text(text)
        with pytest.raises(SfdError, match="points at|not an index"):
            import_checkpoint(index)


def test_paths_that_are_not_files(tmp_path):
    for path, said in ((tmp_path / "none.pt", "no file"), ("/dev/null", "neither a file nor a folder")):
        with pytest.raises(SfdError, match=said):
            find_weights(path)
