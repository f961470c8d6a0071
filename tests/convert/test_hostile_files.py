"""Small files that ask for much memory or time: each is refused quickly and with little memory."""

import io
import json
import pickle
import struct
import time
import tracemalloc
import zipfile

import numpy as np
import pytest

from sfd_jax import budget
from sfd_jax.convert.torch_files import read_torch_file
from sfd_jax.convert.weight_files import choose_state, describe, read_statistics, read_tree
from sfd_jax.errors import SfdError

A = np.arange(6, dtype=np.float32).reshape(2, 3)


def refused(path, match):
    """Read a file and load everything in it; this must raise SfdError and cost almost nothing."""

    def read():
        with pytest.raises(SfdError, match=match):
            tree = read_tree(path)
            describe(tree)
            for array in tree.values():
                np.asarray(array)

    assert is_quick(read)  # before the allocations are traced, which takes several times as long
    tracemalloc.start()
    try:
        read()
        assert tracemalloc.get_traced_memory()[1] < budget.Budget(path).total < 32 * 2**20
    finally:
        tracemalloc.stop()


def is_quick(work):
    """Tell whether it takes 5 s of this thread's processor time, once in three attempts: a busy machine is no fault."""

    def seconds():
        start = time.thread_time()
        work()
        return time.thread_time() - start

    return any(seconds() < 5 for _ in range(3))


def zipped(path, torch_file, opcodes, storage=None):
    file = torch_file({})
    file.storages, file.pickle = [A.tobytes() if storage is None else storage], b"\x80\x04" + opcodes + b"."
    path.write_bytes(file.zip_bytes())
    return path


def nested(protocol=2):
    shared = ["lol"]
    for _ in range(40):
        shared = [shared, shared]
    return pickle.dumps({"config": shared}, protocol)[2:-1]


PICKLES = {
    "memo index": (b"}r\x00\x00\x00\x10", None),  # can be read: the index is only a number
    "length of text": (b"X\xff\xff\xff\x7f", "damaged"),
    "length of bytes": (b"\x8e" + struct.pack("<Q", 2**62), "damaged"),
    "length of a bytearray": (b"\x96" + struct.pack("<Q", 2**40), "damaged"),
    "frame": (b"\x95" + struct.pack("<Q", 2**62) + b"}", None),
    "a long integer": (b"}\x8c\x01a\x8b" + struct.pack("<I", 5000) + b"\x7f" * 5000 + b"s", "integer of 39,999 bits"),
    "shared lists": (nested(), "memory"),
    "shared tuples as keys": (b"}(K\x01\x85" + b"2\x86" * 40 + b"K\x01u", None),
    "a list in itself": (b"]q\x00h\x00a", "in themselves"),
    "deep lists": (b"]" * 5000 + b"a" * 4999, "deep"),
    "many dicts": (b"(" + b"}" * 420_000 + b"l", "memory"),
    "copies of one list": (
        b"(" + b"K\x00" * 50_000 + b"lq\x00" + b"0(" + b"ccollections\ndeque\nh\x00\x85R" * 3000 + b"l",
        "memory",
    ),
    "equal hashes": (
        b"}(" + b"".join(pickle.dumps(n * (2**61 - 1), 2)[2:-1] + b"N" for n in range(20_000)) + b"u",
        None,
    ),
}


@pytest.mark.parametrize("name", PICKLES)
def test_pickles_that_ask_for_more_than_they_hold(tmp_path, torch_file, name):
    opcodes, match = PICKLES[name]
    path = zipped(tmp_path / "f.pt", torch_file, opcodes)
    if match:
        return refused(path, match)
    assert is_quick(lambda: read_torch_file(path)) and isinstance(read_torch_file(path), dict)


@pytest.mark.parametrize(
    "numbers, match",
    [
        (("0", 6, 0, (2**17, 2**16), (0, 0)), "memory"),  # a stride of zero
        (("0", 6, 0, (1,) * 65, (1,) * 65), "65 dimensions"),
        (("0", 6, 0, (0, 2**30, 2**30, 2**30), (1, 1, 1, 1)), "larger than any memory"),
        (("0", 6, 0, (3,), (2**30,)), "larger than its storage"),
    ],
)
def test_tensors_without_data(tmp_path, torch_file, numbers, match):
    call = torch_file({}).rebuild(*numbers)
    refused(zipped(tmp_path / "f.pt", torch_file, b"}\x8c\x01a" + call + b"s"), match)


def test_the_views_of_all_tensors_are_counted_together(tmp_path, torch_file):
    file = torch_file({})
    one = file.rebuild("0", 6, 0, (2**18,), (0,))  # 1 MiB each
    opcodes = b"}(" + b"".join(b"K" + bytes([n]) + one for n in range(40)) + b"u"
    path = zipped(tmp_path / "f.pt", torch_file, opcodes)
    refused(path, "memory")
    budget.allow(1)
    try:
        assert len(read_torch_file(path)) == 40
    finally:
        budget.allow(None)


def legacy_view(start, size, count):
    """An older stream with a tensor of `count` numbers in a view (start, size) of 8 numbers."""
    number = lambda n: b"\x8a\x08" + struct.pack("<q", n)  # noqa: E731
    storage = (
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x08"
        b"(X\x01\x00\x00\x00v" + number(start) + number(size) + b"ttQ"
    )
    call = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00" + number(count) + b"\x85K\x01\x85\x89NtR"
    parts = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    parts += [b"\x80\x02}X\x01\x00\x00\x00a" + call + b"s.", pickle.dumps(["0"], 2), struct.pack("<q", 8)]
    return b"".join(parts) + np.arange(8, dtype=np.float32).tobytes()


def test_views_of_an_older_stream_stay_inside_their_storage(tmp_path):
    path = tmp_path / "f.pt"
    path.write_bytes(legacy_view(2, 5, 5))
    np.testing.assert_array_equal(read_torch_file(path)["a"], [2, 3, 4, 5, 6])
    for start, size, count, match in (
        (1000, 64, 64, "view beyond"),
        (4, 5, 5, "view beyond"),
        (-1, 5, 5, "view beyond"),
        (2, 5, 6, "larger than its storage"),
        (1000, 2**28, 2**28, "memory|view beyond"),
        (0, -8, 1, "view beyond"),
    ):
        path.write_bytes(legacy_view(start, size, count))
        refused(path, match)


def archive(path, members, **changes):
    """Write a zip of members {name: bytes}, then change fields of the last one's directory entry."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, data in members.items():
            file.writestr(name, data, changes.get("method", zipfile.ZIP_STORED))
    data = bytearray(buffer.getvalue())
    at = data.rindex(b"PK\x01\x02")
    for offset, layout, value in changes.get("fields", ()):
        struct.pack_into(layout, data, at + offset, value)
    path.write_bytes(data)
    return path


def test_members_that_unpack_to_more_than_they_may(tmp_path, torch_file):
    call = torch_file({}).rebuild("0", 2**25, 0, (1,), (1,))
    members = {"a/data.pkl": b"\x80\x02}X\x01\x00\x00\x00a" + call + b"s.", "a/data/0": bytes(2**27)}
    refused(archive(tmp_path / "f.pt", members, method=zipfile.ZIP_DEFLATED), "memory")
    # The directory says 24 bytes, but it unpacks to a gigabyte.
    call = torch_file({}).rebuild("0", 6, 0, (6,), (1,))
    members["a/data.pkl"] = b"\x80\x02}X\x01\x00\x00\x00a" + call + b"s."
    refused(archive(tmp_path / "f.pt", members, method=zipfile.ZIP_DEFLATED, fields=[(24, "<I", 24)]), "checksum")
    members["a/data/0"] = A.tobytes()
    refused(archive(tmp_path / "f.pt", members, method=zipfile.ZIP_LZMA), "unusual method")
    refused(archive(tmp_path / "f.pt", members, fields=[(8, "<H", 1)]), "encrypted")
    refused(archive(tmp_path / "f.pt", members, fields=[(42, "<I", 2)]), "not where it should be")
    path = archive(tmp_path / "f.pt", members)
    np.testing.assert_array_equal(read_torch_file(path)["a"], np.arange(6))


def test_numbers_as_keys(tmp_path, torch_file):
    file = torch_file({})
    one = b"}K\x01" + file.rebuild("0", 6, 0, (6,), (1,)) + b"s"
    path = zipped(tmp_path / "f.pt", torch_file, b"}(" + file._text("ema") + one + file._text("ema_model") + one + b"u")
    with pytest.raises(SfdError, match="several averages"):
        choose_state(read_tree(path), path)
    with pytest.raises(SfdError, match="arrays without names"):
        choose_state(read_tree(path), path, "ema_model")


def test_compressed_files_are_read(tmp_path, torch_file):
    file = torch_file({"a": A})
    members = {"a/data.pkl": file.pickle, "a/data/0": file.storages[0]}
    path = archive(tmp_path / "f.pt", members, method=zipfile.ZIP_DEFLATED)
    np.testing.assert_array_equal(read_torch_file(path)["a"], A)


@pytest.mark.parametrize("container", ["zip", "legacy"])
def test_a_file_that_changed_since_its_header_was_read(tmp_path, torch_file, container):
    file = torch_file({"a": A, "b": A}, legacy=container == "legacy")
    path = tmp_path / "f.pt"
    path.write_bytes(file.zip_bytes() if container == "zip" else file.legacy_bytes())
    tree = read_torch_file(path)
    np.testing.assert_array_equal(tree["a"], A)
    with path.open("ab") as stream:
        stream.write(b"more")
    with pytest.raises(SfdError, match="changed while it was being read"):
        np.asarray(tree["b"])


@pytest.mark.parametrize("container", ["zip", "legacy"])
def test_views_read_only_their_own_part(tmp_path, torch_file, container, monkeypatch):
    """Contiguous views and columns: the storage is read a few times, not once for each view."""
    flat = np.random.default_rng(0).standard_normal((400, 500)).astype(np.float32)
    file = torch_file({}, legacy=container == "legacy")
    rows = [file._text(f"r{i}") + file.rebuild("0", flat.size, 500 * i, (500,), (1,)) for i in range(400)]
    columns = [file._text(f"c{i}") + file.rebuild("0", flat.size, i, (400,), (500,)) for i in range(500)]
    file.storages = [flat.tobytes()]
    file.pickle = b"\x80\x02}(" + b"".join(rows + columns) + b"u."
    path = tmp_path / "f.pt"
    path.write_bytes(file.zip_bytes() if container == "zip" else file.legacy_bytes())
    tree = read_torch_file(path)
    read, fromfile = [], np.fromfile
    monkeypatch.setattr(np, "fromfile", lambda f, dtype, n: read.append(n) or fromfile(f, dtype, n))
    for i in range(400):
        np.testing.assert_array_equal(tree[f"r{i}"], flat[i])
    for i in range(500):
        np.testing.assert_array_equal(tree[f"c{i}"], flat[:, i])
    assert sum(read) <= 4 * flat.nbytes


@pytest.mark.parametrize("view", [(0, (3,)), (2, (4,))])
def test_a_damaged_storage_is_found_from_any_view(tmp_path, torch_file, view):
    file = torch_file({})
    file.storages = [A.tobytes()]
    file.pickle = b"\x80\x02" + file.rebuild("0", 6, view[0], view[1], (1,)) + b"."
    data = bytearray(file.zip_bytes())
    data[bytes(data).index(A.tobytes()) + 23] ^= 1  # in the last number, which the first view leaves out
    path = tmp_path / "f.pt"
    path.write_bytes(data)
    with pytest.raises(SfdError, match="checksum"):
        np.asarray(read_torch_file(path))


CONFIGS = {
    "aliases": "a: &a [x, x]\n"
    + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(24)),
    "merges": "a: &a {x: 1}\n"
    + "".join(f"{chr(98 + i)}: &{chr(98 + i)} {{<<: [*{chr(97 + i)}, *{chr(97 + i)}]}}\n" for i in range(24)),
    "in itself": "a: &a [*a]\n",
    "deep": "[" * 5000,
    "long": "a: 1\n" * 100_000,
    "integer": "a: " + "9" * 5000,
    "date": "a: 2024-13-45",
    "object": "a: !!python/object/apply:os.system [echo]",
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_in_yaml_that_explode(tmp_path, torch_file, name):
    path = tmp_path / "f.pt"
    path.write_bytes(torch_file({"ema": {"a": A}, "config": CONFIGS[name]}).zip_bytes())
    tree = read_tree(path)

    def read():
        with pytest.raises(SfdError, match="config is not YAML"):
            choose_state(tree, path)

    assert is_quick(read)


def test_configs_become_json_values(tmp_path, torch_file):
    text = "model: &m {depth: 2, when: 2024-01-02}\nother: *m\n"
    path = tmp_path / "f.pt"
    path.write_bytes(torch_file({"ema": {"a": A}, "config": text}).zip_bytes())
    config = choose_state(read_tree(path), path).config
    assert config["model"] == config["other"] == {"depth": 2, "when": "2024-01-02"}
    json.dumps(config)


ONES = np.ones((1, 3, 1, 1), np.float32)


@pytest.mark.parametrize(
    "tree, match",
    [
        (A, "needs arrays 'mean' and 'std', but holds one"),
        ({"mean": ONES}, "holds 'mean'"),
        ({"mean": ONES, "std": 1.0}, "needs arrays"),
        ({"mean": ONES, "std": np.ones((1, 4, 1, 1), np.float32)}, "one value a channel"),
        (
            {"mean": ONES.reshape(()) if ONES.size == 1 else ONES[0, 0, 0, 0], "std": ONES[0, 0, 0, 0]},
            "one value a channel",
        ),
        ({"mean": np.ones((2, 3), np.float32), "std": np.ones((2, 3), np.float32)}, "one value a channel"),
        ({"mean": ONES[:, :0], "std": ONES[:, :0]}, "one value a channel"),
        ({"mean": ONES, "std": 0 * ONES}, "channel 0 has mean 1.0 and std 0.0"),
        ({"mean": ONES, "std": -ONES}, "std -1.0"),
        ({"mean": np.nan * ONES, "std": ONES}, "mean nan"),
        ({"mean": ONES, "std": np.inf * ONES}, "std inf"),
    ],
)
def test_impossible_statistics_are_refused(tmp_path, torch_file, tree, match):
    path = tmp_path / "s.pt"
    path.write_bytes(torch_file(tree).zip_bytes())
    with pytest.raises(SfdError, match=match):
        read_statistics(path)


def test_statistics_are_read(tmp_path, torch_file):
    path = tmp_path / "s.pt"
    path.write_bytes(torch_file({"mean": 2 * ONES, "std": ONES}).zip_bytes())
    mean, std = read_statistics(path)
    np.testing.assert_array_equal([mean, std], [[2, 2, 2], [1, 1, 1]])
