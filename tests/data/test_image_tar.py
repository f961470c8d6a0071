"""Tars that are cut, damaged or something else are refused with the member's name; and the index beside them."""

import gzip
import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from sfd_jax.data.images import open_images
from sfd_jax.errors import SfdError

BLOCK = 512


def jpeg(value: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value,) * 3).save(buffer, "PNG")
    return buffer.getvalue()


def tar_of(files: dict[str, bytes | tarfile.TarInfo]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in files.items():
            info = data if isinstance(data, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = 0 if isinstance(data, tarfile.TarInfo) else len(data)
            tar.addfile(info, None if isinstance(data, tarfile.TarInfo) else io.BytesIO(data))
    return buffer.getvalue()


def link(name: str, target: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def inner(name: str) -> bytes:
    return tar_of({f"{name}_1.JPEG": jpeg(), f"{name}_2.JPEG": jpeg()})


def sparse_tar() -> bytes:
    """A member of the old GNU sparse kind: its header says 'S'."""
    data = bytearray(tar_of({"n1/a.JPEG": jpeg()}))
    data[156:157] = b"S"
    data[483:495] = b"%011o\0" % 10_000  # real size
    data[148:156] = b"        "
    data[148:156] = b"%06o\0 " % sum(data[:BLOCK])
    return bytes(data)


WHOLE = tar_of({f"n{i}.tar": inner(f"n{i}") for i in (1, 2, 3)})
with tarfile.open(fileobj=io.BytesIO(WHOLE)) as _tar:
    SECOND = _tar.getmembers()[1].offset
    END = _tar.getmembers()[-1].offset_data + _tar.getmembers()[-1].size


def damaged_header() -> bytes:
    data = bytearray(WHOLE)
    data[SECOND + 10] ^= 255
    return bytes(data)


def inner_cut(where) -> bytes:
    """The first class's tar cut short, then another class, whose headers must not be read as the first's."""
    return tar_of({"n1.tar": inner("n1")[:where], "n2.tar": inner("n2")})


def test_complete_tars_are_read(tmp_path):
    for name, data in {"whole": WHOLE, "one_block_of_zeros": WHOLE[: END + BLOCK]}.items():
        (tmp_path / f"{name}.tar").write_bytes(data)
        source = open_images("tar", str(tmp_path / f"{name}.tar"), "train", 8)
        assert source.class_names == ["n1", "n2", "n3"] and len(source) == 6


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (WHOLE[:SECOND], "x.tar is not a complete.*it ends without a block of zeros after n1.tar"),
        (WHOLE[: SECOND + 100], "it ends without a block of zeros after n1.tar"),
        (WHOLE[:END], "it ends without a block of zeros after n3.tar"),
        (WHOLE[: END - 700], "(unexpected end of data|it is cut in n3.tar) after n"),
        (damaged_header(), "damaged header, or a second tar, after n1.tar"),
        (WHOLE + WHOLE, "damaged header, or a second tar, after n3.tar"),
        (inner_cut(2 * BLOCK), "n1.tar in .*x.tar is not a complete.*after n1_1.JPEG"),
        (inner_cut(4 * BLOCK), "n1.tar in .*x.tar is not a complete.*after n1_2.JPEG"),
        (inner_cut(BLOCK + 20), "n1.tar in .*x.tar is not a complete.*it is cut in n1_1.JPEG"),
        (tar_of({"n1.tar": b"<html>error</html>" * 40, "n2.tar": inner("n2")}), "n1.tar in .*x.tar.*a web page"),
        (tar_of({"n1.tar": b"", "n2.tar": inner("n2")}), "n1.tar in .*x.tar.*it is empty"),
        (
            tar_of({"n1.tar": b"nonsense" * 100, "n2.tar": inner("n2")}),
            "n1.tar in .*x.tar is not a complete.*after its start",
        ),
        (
            tar_of({"n1.tar": gzip.compress(inner("n1")), "n2.tar": inner("n2")}),
            "n1.tar in .*x.tar.*compressed with gzip",
        ),
        (
            tar_of({"n1.tar.gz": gzip.compress(inner("n1")), "n2.tar": inner("n2")}),
            "n1.tar.gz in .*compressed with gzip",
        ),
        (tar_of({"n1.tar": tar_of({"deeper.tar": inner("n1")}), "n2.tar": inner("n2")}), "folders without images: n1"),
        (tar_of({"n1.tar": tar_of({}), "n2.tar": inner("n2")}), "folders without images: n1"),
        (gzip.compress(WHOLE), "x.tar is not a complete, uncompressed tar: it is compressed with gzip"),
        (b"version https://git-lfs.github.com/spec/v1\n", "x.tar .* pointer of Git LFS"),
        (b"", "x.tar .* it is empty"),
        (
            tar_of({"n1/a.JPEG": jpeg(), "n1/b.JPEG": link("n1/b.JPEG", "n1/a.JPEG", tarfile.LNKTYPE)}),
            "n1/b.JPEG in .*is a link",
        ),
        (
            tar_of({"n1/a.JPEG": jpeg(), "n1/b.JPEG": link("n1/b.JPEG", "a.JPEG", tarfile.SYMTYPE)}),
            "n1/b.JPEG in .*is a link",
        ),
        (tar_of({"n1/a.JPEG": jpeg(), "n2": link("n2", "n1", tarfile.SYMTYPE)}), "n2 in .*is a link"),
        (sparse_tar(), "n1/a.JPEG in .*is a link, sparse"),
    ],
)
def test_damaged_tars_are_refused_with_the_member(tmp_path, data, words):
    (tmp_path / "x.tar").write_bytes(data)
    with pytest.raises(SfdError, match=words):
        open_images("tar", str(tmp_path / "x.tar"), "train", 8)


def test_a_repeated_name_is_refused(tmp_path):
    buffer = io.BytesIO(tar_of({"n1/a.JPEG": jpeg()}))
    with tarfile.open(fileobj=buffer, mode="a") as tar:
        info = tarfile.TarInfo("./n1/a.JPEG")
        info.size = len(jpeg(9))
        tar.addfile(info, io.BytesIO(jpeg(9)))
    (tmp_path / "x.tar").write_bytes(buffer.getvalue())
    with pytest.raises(SfdError, match="holds n1/a.JPEG twice"):
        open_images("tar", str(tmp_path / "x.tar"), "train", 8)


def test_every_cut_is_noticed(tmp_path):
    """Cut at any length, the tar is refused unless only padding is lost."""
    for length in range(0, len(WHOLE), 300):
        (tmp_path / f"{length}.tar").write_bytes(WHOLE[:length])
        try:
            source = open_images("tar", str(tmp_path / f"{length}.tar"), "train", 8)
            assert length >= END + BLOCK and len(source) == 6
        except SfdError:
            assert length < END + BLOCK


def test_an_index_that_is_damaged_or_of_another_tar_is_made_anew(tmp_path):
    path, index = tmp_path / "x.tar", tmp_path / "x.tar.index.npz"
    path.write_bytes(WHOLE)
    source = open_images("tar", str(path), "train", 8)
    names = [source.name(i) for i in range(len(source))]
    good, random = index.read_bytes(), np.random.default_rng(0)
    for trial in range(150):
        data = bytearray(good[: random.integers(1, len(good))] if trial % 3 == 0 else good)
        data[random.integers(len(data))] ^= 1 << random.integers(8)
        index.write_bytes(data)
        source = open_images("tar", str(path), "train", 8)
        assert [source.name(i) for i in range(len(source))] == names and [source[i]["label"] for i in range(6)] == [
            0,
            0,
            1,
            1,
            2,
            2,
        ]
    with np.load(index) as file:
        arrays = dict(file)
    for change in (
        {"offsets": arrays["offsets"] + len(WHOLE)},
        {"sizes": arrays["sizes"][:2]},
        {"names": np.arange(6)},
    ):
        np.savez(index, **(arrays | change))
        assert len(open_images("tar", str(path), "train", 8)) == 6
    path.write_bytes(tar_of({"n5.tar": inner("n5")}))
    assert open_images("tar", str(path), "train", 8).class_names == ["n5"]
