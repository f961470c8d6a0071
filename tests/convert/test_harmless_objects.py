"""Objects that training scripts save beside the weights are read as data, or left out with a note."""

import argparse
import collections
import datetime
import decimal
import fractions
import functools
import pathlib
import pickle
import sys
import types

import numpy as np
import pytest

from sfd_jax.convert.pickles import Record, left_out
from sfd_jax.convert.torch_files import read_torch_file
from sfd_jax.errors import SfdError

A = np.arange(6, dtype=np.float32).reshape(2, 3)
PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


class Settings(dict):
    """A dict with attributes."""

    def __init__(self, **entries):
        super().__init__(entries)
        self.__dict__ = dict(entries)


class Schedule:
    def __init__(self):
        self.lr, self.self = 1e-4, self


DATA = {
    "namespace": (argparse.Namespace(lr=1e-4, out=pathlib.PurePosixPath("/a/b")), {"lr": 1e-4, "out": "/a/b"}),
    "simple": (types.SimpleNamespace(a=[1]), {"a": [1]}),
    "set": ({"a", "b"}, {"a", "b"}),
    "frozenset": (frozenset([1, 2]), {1, 2}),
    "deque": (collections.deque([1, 2], maxlen=3), [1, 2]),
    "counter": (collections.Counter("aab"), {"a": 2, "b": 1}),
    "ordered": (collections.OrderedDict(a=1), {"a": 1}),
    "default": (collections.defaultdict(list, a=[1]), {"a": [1]}),
    "path": (pathlib.PurePosixPath("runs/x"), "runs/x"),
    "windows": (pathlib.PureWindowsPath("C:/runs"), "C:\\runs"),
    "fraction": (fractions.Fraction(1, 3), "1/3"),
    "decimal": (decimal.Decimal("0.1"), "0.1"),
    "bytes": (b"\x00\xff", b"\x00\xff"),
    "float32": (np.float32(1.5), 1.5),
    "int64": (np.int64(-7), -7),
    "flag": (np.bool_(True), True),
    "str_": (np.str_("é"), "é"),
    "keys": ({(1, "a"): 2, None: 3}, {"(1, 'a')": 2, None: 3}),
    "settings": (Settings(a=1), {"a": 1}),
}


def read(tmp_path, torch_file, value, protocol):
    opcodes = pickle.dumps(value, protocol)[2 if protocol > 1 else 0 : -1]
    path = tmp_path / "f.pt"
    path.write_bytes(torch_file({"ema": {"a": A}, "x": torch_file.Raw(opcodes)}).zip_bytes())
    tree = read_torch_file(path)
    np.testing.assert_array_equal(tree["ema"]["a"], A)
    return tree


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", DATA)
def test_data(tmp_path, torch_file, name, protocol):
    value, expected = DATA[name]
    tree = read(tmp_path, torch_file, value, protocol)
    assert type(tree["x"]) is type(expected) and tree["x"] == expected
    assert not left_out(tree)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    "array",
    [A, A.T, A.astype(">f8"), np.int32(3) + np.zeros((), int), np.zeros((0, 2))],
    ids=["whole", "transposed", "big-endian", "scalar", "empty"],
)
def test_numpy_arrays(tmp_path, torch_file, array, protocol):
    found = np.asarray(read(tmp_path, torch_file, array, protocol)["x"])
    np.testing.assert_array_equal(found, array)
    assert found.dtype == array.dtype


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    "value",
    [
        Schedule(),
        Schedule,
        datetime.datetime(2024, 1, 2),
        functools.partial(Schedule),
        np.array([Schedule()]),
        np.random.default_rng(0),
    ],
    ids=["instance", "class", "datetime", "partial", "array of objects", "generator"],
)
def test_objects_are_left_out_with_a_note(tmp_path, torch_file, value, protocol):
    tree = read(tmp_path, torch_file, value, protocol)
    assert left_out(tree)[0].startswith("left out: x is an object of ")


def test_an_unknown_class_is_recorded_and_an_unknown_function_refused(tmp_path, torch_file):
    for name, match in (
        ("nowhere.train TrainState", None),
        ("nowhere.train restore", r"refused.*nowhere\.train\.restore"),
    ):
        raw = torch_file.Raw(f"c{name.replace(' ', chr(10))}\n(K\x01tR".encode("latin-1"))
        path = tmp_path / "f.pt"
        path.write_bytes(torch_file({"ema": {"a": A}, "state": raw}).zip_bytes())
        if match:
            with pytest.raises(SfdError, match=match):
                read_torch_file(path)
        else:
            tree = read_torch_file(path)
            assert isinstance(tree["state"], Record)
            assert left_out(tree) == ["left out: state is an object of nowhere.train.TrainState"]
    assert "nowhere" not in sys.modules


@pytest.mark.parametrize(
    "name",
    [
        "pty spawn",
        "runpy run_path",
        "timeit timeit",
        "code interact",
        "webbrowser open",
        "operator attrgetter",
        "ctypes CDLL",
        "torch._utils _rebuild_sparse_tensor",
        "torch.jit load",
        "joblib load",
        "builtins compile",
    ],
)
def test_calls_with_effects_are_refused_by_name(tmp_path, torch_file, name):
    raw = torch_file.Raw(f"c{name.replace(' ', chr(10))}\n(X\x01\x00\x00\x00atR".encode("latin-1"))
    path = tmp_path / "f.pt"
    path.write_bytes(torch_file({"ema": {"a": A}, "state": raw}).zip_bytes())
    with pytest.raises(SfdError, match=f"refused.*{name.replace(' ', '.')}"):
        read_torch_file(path)


@pytest.mark.parametrize(
    "call",
    [
        lambda f, tensor: b"ctorch._utils\n_rebuild_parameter_with_state\n(" + tensor + b"\x88}}tR",
        lambda f, tensor: b"ctorch.nn.parameter\nParameter\n(" + tensor + b"\x88tR",
        lambda f, tensor: (
            b"ctorch._tensor\n_rebuild_from_type_v2\n("
            + tensor[: tensor.index(b"(")]
            + b"ctorch\nTensor\n"
            + tensor[tensor.index(b"(") : -1]
            + b"}tR"
        ),
        lambda f, tensor: tensor + b"}X\x01\x00\x00\x00aK\x01sb",
    ],
    ids=["with_state", "parameter", "from_type", "attributes"],
)
def test_wrapped_tensors(tmp_path, torch_file, call):
    file = torch_file({})
    file.storages = [A.tobytes()]
    file.pickle = b"\x80\x02" + call(file, file.rebuild("0", 6, 0, (2, 3), (3, 1))) + b"."
    path = tmp_path / "f.pt"
    path.write_bytes(file.zip_bytes())
    np.testing.assert_array_equal(read_torch_file(path), A)


@pytest.mark.torch
def test_files_that_torch_saves(tmp_path):
    torch = pytest.importorskip("torch", reason="needs the extra `torch`: pip install sfd_jax[torch]")
    buffer = torch.nn.Parameter(torch.ones(2))
    buffer.no_decay = True
    tree = {
        "version": torch.torch_version.TorchVersion("2.7.0"),
        "device": torch.device("cuda", 1),
        "dtype": torch.bfloat16,
        "size": torch.Size([1, 2]),
        "layout": torch.strided,
        "random": torch.get_rng_state(),
        "attributes": buffer,
        "float8": torch.arange(3).to(torch.float8_e4m3fn),
        "uint16": torch.arange(3).to(torch.uint16),
        "complex": torch.tensor([1 + 2j]),
        "expanded": torch.ones(1).expand(3, 2),
        "numpy": np.random.get_state(),
        "opt": torch.optim.AdamW([buffer]).state_dict(),
        "schedule": torch.optim.lr_scheduler.StepLR(torch.optim.SGD([buffer], 0.1), 2).state_dict(),
    }
    torch.save(tree, tmp_path / "f.pt")
    read = read_torch_file(tmp_path / "f.pt")
    assert not left_out(read)
    assert [read[key] for key in ("version", "device", "dtype", "size", "layout")] == [
        "2.7.0",
        "cuda:1",
        "torch.bfloat16",
        (1, 2),
        "torch.strided",
    ]
    for key in ("random", "attributes", "float8", "uint16", "complex", "expanded"):
        found = np.asarray(read[key])
        assert str(tree[key].dtype) == f"torch.{found.dtype.name}"
        np.testing.assert_array_equal(found.astype(complex), np.asarray(tree[key].detach().to(torch.complex64)))
    np.testing.assert_array_equal(read["numpy"][1], tree["numpy"][1])

    for name, tensor in {
        "sparse": torch.eye(2).to_sparse(),
        "quantised": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        "module": torch.nn.Linear(2, 2),
    }.items():
        torch.save(tensor if name == "module" else {"a": tensor}, tmp_path / "g.pt")
        with pytest.raises(SfdError, match="refused.*(_rebuild_sparse_tensor|QInt8Storage|_rebuild_qtensor|Linear)"):
            read_torch_file(tmp_path / "g.pt")
    torch.save({"ema": {"a": torch.ones(2)}, "model": torch.nn.Linear(2, 2)}, tmp_path / "h.pt")
    read = read_torch_file(tmp_path / "h.pt")
    assert left_out(read) == ["left out: model is an object of torch.nn.modules.linear.Linear"]
