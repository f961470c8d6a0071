"""Reading PyTorch files: right numbers, and no code from them runs."""

import logging
import os
import pickle
import sys

import numpy as np
import pytest

from sfd_jax.convert.lazy_array import LazyArray
from sfd_jax.convert.torch_files import read_torch_file
from sfd_jax.errors import SfdError

A = np.arange(6, dtype=np.float32).reshape(2, 3)
B = np.linspace(-1, 1, 5, dtype=np.float32)


def write(path, data: bytes):
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("container", ["zip", "legacy"])
def test_reads_both_containers(tmp_path, torch_file, container):
    file = torch_file({"ema": {"a": A, "b": B}, "step": 7, "note": "x"}, legacy=container == "legacy")
    data = file.zip_bytes() if container == "zip" else file.legacy_bytes()
    tree = read_torch_file(write(tmp_path / "f.pt", data))
    assert isinstance(tree["ema"]["a"], LazyArray) and tree["ema"]["a"].shape == (2, 3)
    np.testing.assert_array_equal(tree["ema"]["a"], A)
    np.testing.assert_array_equal(tree["ema"]["b"], B)
    assert tree["step"] == 7 and tree["note"] == "x"


def test_strides_and_offsets_are_followed(tmp_path, torch_file):
    file = torch_file({})
    file.storages = [np.arange(12, dtype=np.float32).tobytes()]
    # Columns 1 and 2 of the transpose of a 3 x 4 array.
    file.pickle = b"\x80\x02" + file.rebuild("0", 12, 1, (2, 3), (1, 4)) + b"."
    tree = read_torch_file(write(tmp_path / "f.pt", file.zip_bytes()))
    np.testing.assert_array_equal(tree, np.arange(12.0).reshape(3, 4)[:, 1:3].T)


# Names that a hostile pickle may ask for: existing modules, some harmful when imported, and names
# close to those on the list.
HOSTILE = [
    "os system",
    "posix system",
    "subprocess Popen",
    "builtins eval",
    "builtins exec",
    "builtins getattr",
    "builtins __import__",
    "__builtin__ eval",
    "nt system",
    "importlib import_module",
    "pickle loads",
    "shutil rmtree",
    "torch.storage _load_from_bytes",
    "torch load",
    "torch.hub load",
    "torch._utils _rebuild_qtensor",
    "numpy load",
    "numpy.testing._private.utils runstring",
    "omegaconf.omegaconf OmegaConf",
    "collections namedtuple",
    "collections OrderedDict.__init_subclass__",
    "antigravity geohash",
    "sfd_jax.errors nearest",
    "sfd_jax.convert.torch_files read_torch_file",
]


@pytest.mark.parametrize("container", ["zip", "legacy"])
@pytest.mark.parametrize("name", HOSTILE)
def test_other_names_are_refused_by_name(tmp_path, torch_file, name, container):
    module, attribute = name.split()
    marker = tmp_path / "marker"
    command = f"touch {marker}"
    call = f"c{module}\n{attribute}\n(X".encode() + len(command).to_bytes(4, "little")
    raw = torch_file.Raw(call + command.encode() + b"tR")
    file = torch_file({"ema": {"a": A, "b": raw}}, legacy=container == "legacy")
    path = write(tmp_path / "f.pt", file.zip_bytes() if container == "zip" else file.legacy_bytes())
    before = set(sys.modules)
    with pytest.raises(SfdError, match="refused") as error:
        read_torch_file(path)
    assert f"{module.replace('__builtin__', 'builtins')}.{attribute}" in str(error.value)
    assert str(path) in str(error.value)
    assert not marker.exists()
    assert "antigravity" not in set(sys.modules) - before


class Bomb:
    """Objects that an attacker would pickle, one for each way to cause a call."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_real_hostile_pickles_do_not_run(tmp_path, torch_file, protocol):
    marker = tmp_path / "marker"
    file = torch_file({})
    file.pickle = pickle.dumps({"ema": Bomb(f"touch {marker}")}, protocol)
    path = write(tmp_path / "f.pt", file.zip_bytes())
    with pytest.raises(SfdError, match=r"refused.*system"):
        read_torch_file(path)
    assert not marker.exists()
    pickle.loads(file.pickle)  # the pickle is really harmful: without the guard the command would have run
    assert marker.exists()


@pytest.mark.parametrize(
    "opcodes",
    [
        b"(S'touch marker'\nios\nsystem\n",  # INST
        b"(cos\nsystem\nS'touch marker'\no",  # OBJ
        b"\x8c\x02os\x8c\x06system\x93\x8c\x0ctouch marker\x85R",  # STACK_GLOBAL
        b"ccollections\nOrderedDict\n)R}X\x0c\x00\x00\x00__setstate__cos\nsystem\nsb",  # BUILD
    ],
)
def test_other_opcodes_are_refused_too(tmp_path, torch_file, opcodes, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = torch_file({"ema": torch_file.Raw(opcodes)})
    with pytest.raises(SfdError, match=r"refused.*os\.system"):
        read_torch_file(write(tmp_path / "f.pt", file.zip_bytes()))
    assert not (tmp_path / "marker").exists()


def test_listed_names_build_only_records(tmp_path, torch_file):
    """Calls of listed names keep their arguments and do nothing: no logger, and only latin-1 as codec."""
    calls = {
        "logger": b"clogging\ngetLogger\n(X\x04\x00\x00\x00sfd1tR",
        "codec": b"c_codecs\nencode\n(X\x01\x00\x00\x00aX\x03\x00\x00\x00hextR",
        "bytes": b"c_codecs\nencode\n(X\x01\x00\x00\x00aX\x06\x00\x00\x00latin1tR",
    }
    raw = {key: torch_file.Raw(call) for key, call in calls.items()}
    read = read_torch_file(write(tmp_path / "f.pt", torch_file(raw).zip_bytes()))
    assert repr(read["logger"]) == "<logging.getLogger>" and repr(read["codec"]) == "<builtins.bytes>"
    assert read["bytes"] == b"a"
    assert "sfd1" not in logging.Logger.manager.loggerDict


@pytest.mark.parametrize(
    "numbers",
    [
        ("0", 6, 0, (2, 4), (3, 1)),  # one row too long
        ("0", 6, 5, (2,), (1,)),
        ("0", 6, -1, (2,), (1,)),
        ("0", 6, 0, (2,), (-1,)),
        ("0", 600, 0, (600,), (1,)),  # the storage itself is shorter
        ("1", 6, 0, (6,), (1,)),  # no such storage
    ],
)
def test_tensors_cannot_reach_beyond_their_storage(tmp_path, torch_file, numbers):
    file = torch_file({})
    file.storages = [A.tobytes()]
    file.pickle = b"\x80\x02" + file.rebuild(*numbers) + b"."
    with pytest.raises(SfdError, match="damaged"):
        read_torch_file(write(tmp_path / "f.pt", file.zip_bytes()))


def test_a_storage_cannot_be_changed_afterwards(tmp_path, torch_file):
    """BUILD may set attributes of what is on the stack; a longer `length` would read past the end."""
    file = torch_file({})
    file.storages = [A.tobytes()]
    call = file.rebuild("0", 6, 0, (600,), (1,))
    at = call.index(b"Q") + 1
    lie = b"}X\x06\x00\x00\x00lengthJ\x58\x02\x00\x00sb"
    file.pickle = b"\x80\x02" + call[:at] + lie + call[at:] + b"."
    with pytest.raises(SfdError, match="damaged"):
        read_torch_file(write(tmp_path / "f.pt", file.zip_bytes()))


@pytest.mark.parametrize("name", ["omegaconf.nodes\nAnyNode", "collections\nOrderedDict"])
def test_recorders_cannot_be_changed(tmp_path, torch_file, name):
    # A state pair (None, slots) makes BUILD call setattr on what is on the stack: here, the class.
    raw = f"c{name}\n".encode() + b"N}X\x0c\x00\x00\x00__setstate__X\x01\x00\x00\x00as\x86b"
    file = torch_file({"x": torch_file.Raw(raw), "a": A})
    with pytest.raises(SfdError):
        read_torch_file(write(tmp_path / "f.pt", file.zip_bytes()))
    np.testing.assert_array_equal(read_torch_file(write(tmp_path / "g.pt", torch_file({"a": A}).zip_bytes()))["a"], A)


@pytest.mark.parametrize("container", ["zip", "legacy"])
def test_truncated_files_are_refused(tmp_path, torch_file, container):
    file = torch_file({"ema": {"a": A, "b": B}}, legacy=container == "legacy")
    data = file.zip_bytes() if container == "zip" else file.legacy_bytes()
    for length in [0, 3, 10, 40, len(data) // 2, len(data) - 21, len(data) - 1]:
        path = write(tmp_path / "f.pt", data[:length])
        with pytest.raises(SfdError, match=r"cut short|not a PyTorch file"):
            read_torch_file(path)


def test_a_flipped_bit_in_a_weight_is_noticed(tmp_path, torch_file):
    data = bytearray(torch_file({"a": A}).zip_bytes())
    at = bytes(data).index(A.tobytes())
    data[at + 3] ^= 1
    tree = read_torch_file(write(tmp_path / "f.pt", bytes(data)))
    with pytest.raises(SfdError, match="damaged"):
        np.asarray(tree["a"])


def test_files_without_weights_are_named(tmp_path, torch_file):
    with pytest.raises(SfdError, match="no file"):
        read_torch_file(tmp_path / "none.pt")
    with pytest.raises(SfdError, match="not a PyTorch file"):
        read_torch_file(write(tmp_path / "f.pt", b"hello, world: not weights at all"))
    with pytest.raises(SfdError, match="big-endian"):
        big = torch_file({"a": A}).zip_bytes(byteorder=b"big")
        read_torch_file(write(tmp_path / "g.pt", big))
