"""With PyTorch installed: its files are read as it reads them, it loads ours, and layers equal its own."""

from collections import OrderedDict

import jax
import numpy as np
import pytest

from sfd_jax.cli.convert import main
from sfd_jax.convert import FORMATS
from sfd_jax.convert.table import export_state, import_params
from sfd_jax.convert.torch_files import read_torch_file, write_torch_file
from sfd_jax.errors import SfdError
from sfd_jax.models import Network
from sfd_jax.training.checkpoint import load_params

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch", reason="needs the extra `torch`: pip install sfd_jax[torch]")


def random_params(network, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), network.abstract_params())


def numpy_of(tensor):
    return tensor.float().numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_reads_what_torch_writes(tmp_path, zipped):
    """All dtypes, views, shared storages, parameters, an optimizer's state: the same numbers."""
    torch.manual_seed(0)
    base = torch.randn(5, 7)
    tree = {
        "ema": OrderedDict(
            plain=base,
            transposed=base.T[1:4],
            strided=base[::2, ::3],
            shared=base.view(-1)[3:9],
            parameter=torch.nn.Parameter(torch.randn(3)),
            scalar=torch.tensor(7),
            empty=torch.zeros(0, 3),
            **{
                str(dtype): torch.arange(11).to(dtype)
                for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.uint8, torch.bool)
            },
        ),
        "lr": 1e-4,
        "betas": (0.9, 0.95),
        "list": [torch.ones(2), None, "x"],
    }
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    tree["opt"], tree["model"] = optimizer.state_dict(), layer.state_dict()
    torch.save(tree, tmp_path / "f.pt", _use_new_zipfile_serialization=zipped)
    read = read_torch_file(tmp_path / "f.pt")
    assert read["ema"].keys() == tree["ema"].keys()
    for key, tensor in tree["ema"].items():
        array = np.asarray(read["ema"][key])
        assert array.shape == tuple(tensor.shape) and str(tensor.dtype) == f"torch.{array.dtype.name}"
        np.testing.assert_array_equal(array.astype(np.float32), numpy_of(tensor.detach()).astype(np.float32))
    assert read["lr"] == 1e-4 and read["betas"] == (0.9, 0.95) and read["list"][1:] == [None, "x"]
    exp_avg = optimizer.state_dict()["state"][0]["exp_avg"]
    np.testing.assert_array_equal(read["opt"]["state"][0]["exp_avg"], exp_avg)
    np.testing.assert_array_equal(read["model"]["weight"], layer.weight.detach())


def test_checksums_may_be_left_out_of_a_file_but_not_of_one_storage(tmp_path):
    torch.serialization.set_crc32_options(False)
    torch.save({"ema": torch.ones(3)}, tmp_path / "f.pt")
    torch.serialization.set_crc32_options(True)
    np.testing.assert_array_equal(read_torch_file(tmp_path / "f.pt")["ema"], np.ones(3))
    with torch.serialization.skip_data():  # leaves space for numbers that are written later
        torch.save({"ema": torch.ones(3)}, tmp_path / "f.pt")
    with pytest.raises(SfdError, match="checksum"):
        np.asarray(read_torch_file(tmp_path / "f.pt")["ema"])


def test_a_whole_module_is_refused(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "f.pt")
    with pytest.raises(SfdError, match=r"refused: .* asks for torch\.nn"):
        read_torch_file(tmp_path / "f.pt")


def test_writes_what_torch_reads(tmp_path):
    import ml_dtypes

    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "half": np.arange(3, dtype=np.float16),
        "brain": np.arange(3).astype(ml_dtypes.bfloat16),
        "scalar": np.array(7, np.int64),
    }
    write_torch_file(tmp_path / "f.pt", {"ema": arrays, "iteration": 3, "config": "text"})
    read = torch.load(tmp_path / "f.pt", weights_only=True)
    assert read["iteration"] == 3 and read["config"] == "text"
    for key, array in arrays.items():
        assert str(read["ema"][key].dtype) == f"torch.{array.dtype.name}"
        np.testing.assert_array_equal(numpy_of(read["ema"][key]), array.astype(numpy_of(read["ema"][key]).dtype))


def test_an_export_loads_strictly_where_it_came_from(tmp_path, capsys):
    """Import a file that torch wrote, export it, load it with torch: bit-identical."""
    network = Network(
        "lightning_dit",
        dict(width=16, depth=2, num_heads=2, input_size=3, in_channels=5, num_classes=7, repa_features=3),
    )
    state = export_state(FORMATS["lightning_dit"].TABLE, random_params(network), network)
    theirs = torch.nn.Module()  # a module with their nested names
    for key, array in state.items():
        *path, last = key.split(".")
        node = theirs
        for name in path:
            if name not in node._modules:
                node.add_module(name, torch.nn.Module())
            node = node._modules[name]
        node.register_parameter(last, torch.nn.Parameter(torch.from_numpy(array.copy())))
    torch.save({"model": theirs.state_dict(), "ema": theirs.state_dict()}, tmp_path / "0000007.pt")
    assert main([str(tmp_path / "0000007.pt"), f"--out={tmp_path}/ours"]) == 0
    assert main([f"{tmp_path}/ours", f"--export={tmp_path}/back.pt"]) == 0
    capsys.readouterr()
    back = torch.load(tmp_path / "back.pt", weights_only=True)["ema"]
    theirs.load_state_dict(back, strict=True)
    assert all(back[key].numpy().tobytes() == array.tobytes() for key, array in state.items())


def test_the_semantic_vaes_block_is_torchs_own_encoder_layer():
    """A public reference: pre-norm TransformerEncoderLayer with exact GELU, weights through our table."""
    width, heads, inputs, bottleneck = 20, 5, 7, 3
    network = Network(
        "semantic_vae",
        dict(
            arch="transformer",
            input_dim=inputs,
            bottleneck_dim=bottleneck,
            hidden_dim=width,
            transformer_heads=heads,
            transformer_blocks=2,
        ),
    )
    torch.manual_seed(0)

    def layer():
        return torch.nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)

    def tower(a, b):
        return torch.nn.Sequential(
            torch.nn.Linear(a, width), layer(), layer(), torch.nn.LayerNorm(width), torch.nn.Linear(width, b)
        )

    towers = {"encoder": tower(inputs, 2 * bottleneck), "decoder": tower(bottleneck, inputs)}
    names = {"self_attn.": "attn.", "linear1.": "mlp.0.", "linear2.": "mlp.2."}
    state = {}
    for side, module in towers.items():
        for parameter in module.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)  # away from the initial values
        for key, tensor in module.eval().state_dict().items():
            for theirs, released in names.items():
                key = key.replace(theirs, released)
            state[f"{side}.{key}"] = tensor.numpy()
    params = import_params(FORMATS["semantic_vae"].TABLE, state, network)
    features = np.random.default_rng(0).standard_normal((2, 6, inputs)).astype(np.float32)
    with torch.no_grad():
        moments = towers["encoder"](torch.from_numpy(features))
        mean = moments[..., :bottleneck]
        decoded = towers["decoder"](mean)
    ours, logvar = network.apply(params, features, method="encode")
    # float32 sums in another order
    np.testing.assert_allclose(ours, mean, atol=2e-5)
    np.testing.assert_allclose(logvar, moments[..., bottleneck:].clip(-30, 20), atol=2e-5)
    np.testing.assert_allclose(network.apply(params, ours, method="decode"), decoded, atol=5e-5)


@pytest.mark.parametrize("kind, leading", [("DINOv3ViT", 4), ("SiglipVision", 0), ("CLIPVision", 1), ("ViTMAE", 1)])
def test_visual_encoders_are_hugging_faces(tmp_path, kind, leading):
    """As `test_dinov2_is_hugging_faces`, at an image size that is not the config's; what we export loads there."""
    transformers = pytest.importorskip("transformers", reason="needs the package transformers")
    sizes = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=80, patch_size=4)
    sizes |= {"ViTMAE": {"mask_ratio": 0.0}, "DINOv3ViT": {"num_register_tokens": 3}}.get(kind, {})
    config = getattr(transformers, f"{kind}Config")(**sizes, image_size=12)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}Model")(config).eval()
    for parameter in model.parameters():
        parameter.data = 0.2 * torch.randn_like(parameter) + (1 if parameter.ndim == 1 else 0)
    model.save_pretrained(tmp_path / "theirs")
    assert main([f"{tmp_path}/theirs", f"--out={tmp_path}/ours"]) == 0
    params, metadata = load_params(tmp_path / "ours")
    network = Network(metadata["network"], metadata["network_config"])
    pixels = np.random.default_rng(0).standard_normal((2, 20, 20, 3)).astype(np.float32)
    options = {} if kind == "DINOv3ViT" else {"interpolate_pos_encoding": True}
    if kind == "ViTMAE":
        options["noise"] = torch.arange(25.0)[None].expand(2, 25)  # it shuffles, though nothing is masked
    answer = lambda model: model(torch.from_numpy(pixels.transpose(0, 3, 1, 2)), **options).last_hidden_state
    with torch.no_grad():
        hidden = answer(model).numpy()
    ours = network.apply(params, pixels)
    scale = np.abs(hidden).max()
    np.testing.assert_allclose(ours["patch_tokens"] / scale, hidden[:, leading:] / scale, atol=5e-6)
    if leading:
        np.testing.assert_allclose(ours["cls_token"] / scale, hidden[:, 0] / scale, atol=5e-6)

    (tmp_path / "back").mkdir()
    config.save_pretrained(tmp_path / "back")
    assert main([f"{tmp_path}/ours", f"--export={tmp_path}/back/model.safetensors"]) == 0
    back = getattr(transformers, f"{kind}Model").from_pretrained(tmp_path / "back").eval()
    with torch.no_grad():  # poolers, which we leave out, come after these
        assert torch.equal(answer(back), torch.from_numpy(hidden))


@pytest.mark.parametrize("swiglu", [False, True])
def test_dinov2_is_hugging_faces(tmp_path, swiglu):
    """A public reference for DINOv2 and its second table, by files, where transformers is installed.

    By files, because recent versions hold other names in memory than they read and write.
    """
    transformers = pytest.importorskip("transformers", reason="needs the package transformers")
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=30,
        patch_size=5,
        num_register_tokens=3,
        use_swiglu_ffn=swiglu,
    )
    torch.manual_seed(0)
    model = transformers.Dinov2WithRegistersModel(config).eval()
    for parameter in model.parameters():
        parameter.data = 0.1 * torch.randn_like(parameter) + (parameter.data if parameter.ndim == 1 else 0)
    model.save_pretrained(tmp_path / "theirs")
    flags = [f"--out={tmp_path}/ours", "--set", "num_heads=4"]
    assert main([f"{tmp_path}/theirs/model.safetensors", *flags]) == 0
    params, metadata = load_params(tmp_path / "ours")
    assert metadata["foreign"]["format"] == "dinov2_hf"
    pixels = np.random.default_rng(0).standard_normal((2, 30, 30, 3)).astype(np.float32)
    with torch.no_grad():
        hidden = model(torch.from_numpy(pixels.transpose(0, 3, 1, 2))).last_hidden_state.numpy()
    ours = Network("dinov2", metadata["network_config"]).apply(params, pixels)
    # float32 sums in another order
    np.testing.assert_allclose(ours["cls_token"], hidden[:, 0], atol=1e-4)
    np.testing.assert_allclose(ours["register_tokens"], hidden[:, 1:4], atol=1e-4)
    np.testing.assert_allclose(ours["patch_tokens"], hidden[:, 4:], atol=1e-4)

    (tmp_path / "back").mkdir()
    config.save_pretrained(tmp_path / "back")
    assert main([f"{tmp_path}/ours", f"--export={tmp_path}/back/model.safetensors"]) == 0
    back = transformers.Dinov2WithRegistersModel.from_pretrained(tmp_path / "back").eval()
    for (key, a), b in zip(model.state_dict().items(), back.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
