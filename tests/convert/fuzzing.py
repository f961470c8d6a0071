"""Feed mutated files to the readers: `python tests/convert/fuzzing.py EXAMPLES [SEED]`.

Run as a process of its own, so that a segmentation fault or a memory limit ends only this one. Each
example must be read or be refused by SfdError, within a bound of memory and of time. The mutations know
the containers: a pickle inside a zip is changed before its checksum is computed, as are arrays in an npz
and the header of a .safetensors file.

For one file in four every allocation is traced, which takes three times as long as the reading. For the others the
process's peak resident memory is compared, which misses memory that is allocated but never touched.
"""

import argparse
import collections
import contextlib
import datetime
import io
import itertools
import json
import os
import pathlib
import pickle
import pickletools
import resource
import struct
import sys
import tempfile
import time
import tracemalloc
import types
import zipfile
from random import Random

import numpy as np
import safetensors.numpy
from conftest import TorchFile
from hypothesis import Phase, given, seed, settings
from hypothesis import strategies as st

from sfd_jax.budget import Budget
from sfd_jax.convert.lazy_array import LazyArray
from sfd_jax.convert.pickles import left_out
from sfd_jax.convert.weight_files import choose_state, describe, read_statistics, read_tree
from sfd_jax.errors import SfdError
from sfd_jax.evaluation.image_sets import open_image_set
from sfd_jax.evaluation.reference import open_reference

SECONDS = 5
BATCH = 20  # files in an example of hypothesis, since drawing one takes longer than reading a file
COUNT = itertools.count()  # of the files so far
FOLDER = pathlib.Path(tempfile.mkdtemp(prefix="sfd_fuzz_", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
A = np.arange(6, dtype=np.float32).reshape(2, 3)
YAML = "model: &m\n  name: x\n  layers: [1, 2.5, .nan, 0x1f, 2024-01-01]\nother: *m\nlast:\n  <<: *m\n  text: 'a'\n"
TREES = [
    {"ema": {"a": A, "b": A[:1]}, "step": 7, "config": YAML},
    {"mean": np.ones((1, 3, 1, 1), np.float32), "std": np.full((1, 3, 1, 1), 2, np.float32)},
    {"state_dict": {"module.a": A, "module.b": A[0]}, "epoch": 3, "lr": 1e-4},
]
OBJECTS = {
    "args": argparse.Namespace(lr=1e-4, path=pathlib.PurePosixPath("/a/b"), when=datetime.datetime(2024, 1, 2)),
    "more": types.SimpleNamespace(tags={"a", "b"}, frozen=frozenset([1, 2]), queue=collections.deque([1, 2], 3)),
    "count": collections.Counter("aab"),
    "numpy": [np.float32(1.5), np.arange(4).reshape(2, 2), np.str_("x"), np.bool_(True)],
    "numbers": [1, -1, 2**40, 2**100, 1e300, 1j, None, True, b"bytes", bytearray(b"more")],
    "default": collections.defaultdict(list, {"a": [1]}),
}


def with_objects(protocol: int) -> dict:
    opcodes = pickle.dumps(OBJECTS, protocol)[2 if protocol > 1 else 0 : -1]
    return {"ema": {"a": A}, "more": TorchFile.Raw(opcodes), "b": A}


TREES += [with_objects(protocol) for protocol in range(6)]
PICKLES = [TorchFile(tree).pickle for tree in TREES]
OPCODES = [
    bytes([code])
    for code in b"(.012FGIJKLMNPQRSTUVXabcdeghijlopqrstu}]]\x80\x81\x82\x85\x86\x87\x88\x89\x8a\x8b\x8c"
    b"\x8d\x8e\x8f\x90\x91\x92\x93\x94\x95\x96\x97\x98B)"
] + [
    b"r\x00\x00\x00\x10",
    b"\x8d" + b"\xff" * 8,
    b"\x96" + struct.pack("<Q", 2**40),
    b"X\xff\xff\xff\x7f",
    b"}}]]((",
    b"\x95" + struct.pack("<Q", 2**60),
    b"](2222222e",
    b"](h\x00h\x00e",
    b"q\x00h\x00",
    b"\x86q\x01h\x01",
    b"J\xff\xff\xff\xff",
    b"ccollections\ndeque\n",
    b"ccollections\nOrderedDict\n)R",
    b"cx.y\nThing\n)\x81}b",
    b"cnumpy\ndtype\n(U\x02f4K\x00K\x01tR",
    b"ctorch\nSize\n",
    b"(I1\nI2\nI3\nt",
    b"\x8a\x09" + b"\x7f" * 9,
    b"2222",
    b"\x94" * 4,
    b"h\x00h\x01s",
    b"cos\nsystem\n",
]
NUMBERS = [0, 1, 2, 3, 255, 2**15, 2**16, 2**28, 2**31 - 1, 2**31, 2**32 - 1, 2**33, 2**62, 2**63 - 1, 2**64 - 1]

DIGITS = [b"-1", b"0", b"9" * 12, b"9" * 25, b"1e999", b"NaN", b"null"]


def draw_mutations(random: Random) -> list[tuple]:
    values = {
        "byte": lambda: (random.randrange(256),),
        "letter": lambda: (random.choice(b"SUVOMmcib?<>|=fu"),),
        "cut": lambda: (random.randrange(1, 40),),
        "insert": lambda: (random.choice(OPCODES),),
        "repeat": lambda: (random.randrange(2, 200),),
        "number": lambda: (random.choice(NUMBERS), random.choice(["<B", "<H", "<I", "<Q"])),
        "copy": lambda: (random.randrange(2**16),),
        "digits": lambda: (random.choice(DIGITS),),
    }
    kinds = random.choices(list(values), k=random.choice([1, 1, 1, 2, 2, 3, 6]))
    return [(kind, random.randrange(2**16), *values[kind]()) for kind in kinds]


def mutated(data: bytes, changes) -> bytes:
    for kind, place, value, *more in changes:
        at = place % (len(data) + 1)
        if kind in ("byte", "letter"):
            data = data[:at] + bytes([value]) + data[at + 1 :]
        elif kind == "cut":
            data = data[:at] + data[at + value :]
        elif kind == "insert":
            data = data[:at] + value + data[at:]
        elif kind == "repeat":
            data = data[:at] + data[at : at + 8] * value + data[at + 8 :]
        elif kind == "number":
            size = struct.calcsize(more[0])
            data = data[:at] + struct.pack(more[0], value % 2 ** (8 * size)) + data[at + size :]
        elif kind == "copy":
            source = value % (len(data) + 1)
            data = data[:at] + data[source : source + 24] + data[at:]
        elif kind == "digits":  # the next run of digits, as in JSON and npy headers
            end = at = next((i for i in range(at, len(data)) if data[i : i + 1].isdigit()), len(data))
            while data[end : end + 1].isdigit():
                end += 1
            data = data[:at] + value + data[end:]
    return data


def mutated_pickle(data: bytes, random: Random) -> bytes:
    """Change whole opcodes, or any bytes."""
    if random.random() < 0.3:
        return mutated(data, draw_mutations(random))
    starts = [position for _, _, position in pickletools.genops(data)]
    parts = [data[start:end] for start, end in zip(starts, [*starts[1:], len(data)], strict=True)]
    for _ in range(random.choice([1, 1, 1, 2, 3, 6])):
        at, change = random.randrange(len(parts)), random.randrange(6)
        if change == 0:
            parts[at] = b""
        elif change == 1:
            parts[at] = random.choice(parts)
        elif change == 2:
            parts.insert(at, random.choice([*OPCODES, *parts]))
        elif change == 3:
            parts[at] *= random.choice([2, 3, 100, 1000])
        elif change == 4:
            parts[at : at + 1] = parts[at : at + random.randrange(12)] * 2
        else:  # another number where there is one
            numbers = [index for index, part in enumerate(parts) if part[:1] in b"JKMG\x8a" and part]
            if numbers:
                number = random.choice(NUMBERS) - random.randrange(2)
                parts[random.choice(numbers)] = pickle.dumps(number, 2)[2:-1]
    return b"".join(parts)


def zipped(members: dict[str, bytes], compressed: bool) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


@contextlib.contextmanager
def bounded(path: pathlib.Path):
    """Allow SfdError only, the memory that the budget states, and a few seconds."""
    start, before, traced = time.process_time(), peak_memory(), next(COUNT) % 4 == 0
    if traced:
        tracemalloc.start()
    try:
        with contextlib.suppress(SfdError):
            yield
        peak = tracemalloc.get_traced_memory()[1] if traced else peak_memory() - before
    finally:
        tracemalloc.stop()
    assert peak < Budget(path).total, f"{peak:,} bytes of memory"
    assert time.process_time() - start < SECONDS, "too slow"


def peak_memory() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def check_weights(data: bytes, suffix: str) -> None:
    path = FOLDER / f"f{suffix}"
    path.write_bytes(data)
    with bounded(path):
        tree = read_tree(path)
        describe(tree)
        left_out(tree)
        for array in arrays(tree):
            with contextlib.suppress(SfdError):
                read = np.asarray(array)
                assert (read.shape, read.dtype) == (array.shape, array.dtype)
                read.tobytes()
        for which in ("ema", "raw"):
            with contextlib.suppress(SfdError):
                json.dumps(choose_state(tree, path, which).stored(), default=str)
        if not (isinstance(tree, dict) and tree.keys() & {"mean", "std"}):
            return  # the rest would read the same again
    with bounded(path):
        mean, std = read_statistics(path)
        assert mean.shape == std.shape and mean.dtype == std.dtype == np.float32 and np.all(std > 0)


def arrays(node):
    if isinstance(node, LazyArray):
        yield node
    elif isinstance(node, (dict, list, tuple)):
        for child in node.values() if isinstance(node, dict) else node:
            yield from arrays(child)


def zips(random: Random) -> None:
    pickled, changes, inside = random.choice(PICKLES), draw_mutations(random), random.random() < 0.7
    members = {"a/data.pkl": mutated_pickle(pickled, random) if inside else pickled, "a/byteorder": b"little"}
    data = zipped(members | {f"a/data/{i}": A.tobytes() for i in range(2)}, random.random() < 0.3)
    check_weights(data if inside else mutated(data, changes), ".pt")


VIEW = b"(X\x01\x00\x00\x00vK\x00K\x06ttQ"  # of all of a storage


def older_streams(random: Random) -> None:
    file = TorchFile(random.choice(TREES), legacy=True)
    inside = random.random() < 0.7
    if random.random() < 0.3:
        file.pickle = file.pickle.replace(b"NtQ", VIEW)
    file.pickle = mutated_pickle(file.pickle, random) if inside else file.pickle
    data = file.legacy_bytes()
    check_weights(data if inside else data[:15] + mutated(data[15:], draw_mutations(random)), ".pt")


def safetensors_files(random: Random) -> None:
    changes, inside = draw_mutations(random), random.random() < 0.7
    data = safetensors.numpy.save({"mean": A[:1], "std": A[1:], "c": np.arange(3)})
    size = int.from_bytes(data[:8], "little")
    if inside:
        header = json.loads(data[8 : 8 + size])
        for _ in range(random.randrange(4)):
            entry, field = (
                random.choice(list(header.values())),
                random.choice(["dtype", "shape", "shape", "data_offsets"]),
            )
            number = random.choice(NUMBERS)
            entry[field] = {
                "dtype": random.choice(["F64", "F16", "BF16", "I32", "U8", "BOOL", "F8_E4M3", "F4", "X"]),
                "shape": random.choice([[number], [2, 3, number], [1] * (number % 70), [3, 1], [6], [0], [-1], []]),
                "data_offsets": random.choice([[number, number + 12], [0, number], [12, 0], [0, 12]]),
            }[field]
        header = json.dumps(header).encode()
        header = mutated(header, changes) if random.random() < 0.3 else header
        data = struct.pack("<Q", len(header)) + header + data[8 + size :]
    check_weights(data if inside else mutated(data, changes), ".safetensors")


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


REFERENCE = {
    "mu.npy": npy(np.zeros(3)),
    "sigma.npy": npy(np.eye(3)),
    "count.npy": npy(np.array(9)),
    "extractor.npy": npy(np.array("inception")),
    "arr_0.npy": npy(np.zeros((2, 4, 4, 3), np.uint8)),
}
OBJECT = npy(np.array([argparse.Namespace(a=1)], object))


def npz_files(random: Random) -> None:
    name, changes, compressed = random.choice(sorted(REFERENCE)), draw_mutations(random), random.random() < 0.3
    kind = random.choice(["array", "array", "object", "file"])
    members = REFERENCE | {name: mutated(OBJECT if kind == "object" else REFERENCE[name], changes)}
    data = zipped(REFERENCE if kind == "file" else members, compressed)
    path = FOLDER / "f.npz"
    path.write_bytes(mutated(data, changes) if kind == "file" else data)
    with bounded(path):
        open_reference(path)
    with bounded(path):
        for piece in open_image_set(path).pieces(1):
            assert piece.dtype == np.uint8 and piece.ndim == 4


def draw_tree(random: Random, depth: int = 0):
    kind = random.randrange(5 if depth < 4 else 4)
    if kind == 4:
        return {
            f"{random.random()}"[: random.randrange(8)]: draw_tree(random, depth + 1)
            for _ in range(random.randrange(5))
        }
    shape = random.choices(range(4), k=random.randrange(4))
    return [
        random.choice("abcé") * random.randrange(4),
        random.randrange(-(2**31), 2**31),
        random.random(),
        np.ones(shape, np.float32),
    ][kind]


def parameter_trees(random: Random) -> None:
    """Trees of any shape come back as they were; their YAML configs may be anything."""
    tree = {"ema": draw_tree(random), "config": mutated(YAML.encode(), draw_mutations(random)).decode("latin-1")}
    legacy = random.random() < 0.5
    file = TorchFile(tree, legacy=legacy)
    check_weights(file.legacy_bytes() if legacy else file.zip_bytes(), ".pt")
    same(read_tree(FOLDER / "f.pt"), tree)


def same(read, written):
    if isinstance(written, dict):
        assert list(read) == list(written)
        for key in written:
            same(read[key], written[key])
    elif isinstance(written, np.ndarray):
        np.testing.assert_array_equal(np.asarray(read), written)
    else:
        assert type(read) is type(written) and read == written


# How many of every 20 files each gets.
SHARES = {zips: 6, older_streams: 4, safetensors_files: 3, npz_files: 5, parameter_trees: 2}


def main(files: int, start: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30,) * 2)  # jax maps some of it
    for test, share in SHARES.items():
        before, count = time.time(), files * share // 20
        fuzz(test, count, start)
        print(f"{test.__name__}: {count} files, {time.time() - before:.0f} s", flush=True)


def fuzz(test, count: int, start: int) -> None:
    @seed(start)
    @settings(max_examples=count // BATCH, deadline=None, database=None, phases=[Phase.generate])
    @given(st.integers(0, 2**32))
    def batch(first):
        for number in range(BATCH * first, BATCH * (first + 1)):
            try:
                test(Random(number))
            except BaseException:
                print(f"to repeat: {test.__name__}(Random({number}))", flush=True)
                raise

    batch()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
