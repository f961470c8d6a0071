"""Which folders are classes, on disk and in tars: hidden entries are left out, others named or refused."""

import io
import os
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from sfd_jax.data.class_folders import find_classes, is_hidden
from sfd_jax.data.images import open_images
from sfd_jax.errors import SfdError
from sfd_jax.evaluation.image_sets import open_image_set

HIDDEN = [
    ".ipynb_checkpoints",
    "@eaDir",
    "@Recycle",
    "__MACOSX",
    "#recycle",
    "lost+found",
    ".Trash-1000",
    "$RECYCLE.BIN",
]


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(params=["folder", "tar"])
def lay(request, tmp_path):
    """Return a function that writes files into a folder or a tar (a final slash: empty folder) and opens it."""

    def write(names, split="train", name="net"):
        root = tmp_path / name
        root.mkdir()
        for entry in names:
            path = root / entry
            (path if entry.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
            if not entry.endswith("/"):
                path.write_bytes(b"\0\5\x16\7 of a Mac" if path.name.startswith("._") else png())
        if request.param == "folder":
            return open_images("folder", str(root), split, 8)
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            for entry in sorted(root.iterdir()):
                tar.add(entry, arcname=entry.name)
        return open_images("tar", str(tmp_path / f"{name}.tar"), split, 8)

    return write


def test_hidden_entries_are_neither_classes_nor_images(lay):
    names = ["n1/a.JPEG", "n2/a.JPEG", "n1/._a.JPEG", "._n1", ".DS_Store", "n2/Thumbs.db", "n1/.a.JPEG.swp.png"]
    names += [f"{folder}/a.JPEG" for folder in HIDDEN] + [f"n1/{folder}/a.JPEG" for folder in HIDDEN] + ["n2/.git/"]
    source = lay([f"train/{name}" for name in names])
    assert source.class_names == ["n1", "n2"] and len(source) == 2
    assert source.notes == [] and source.label_counts() == {0: 1, 1: 1}


def test_hidden_entries_are_not_samples(tmp_path):
    for name in (
        "0.png",
        "1.png",
        "._0.png",
        ".ipynb_checkpoints/0-checkpoint.png",
        "@eaDir/1.png",
        "sub.png/notes.txt",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(png())
    assert open_image_set(tmp_path).count == 2
    assert is_hidden("a/.b/c.png") and not is_hidden("a.b/c.png")


@pytest.mark.parametrize(
    ("names", "split", "words"),
    [
        (["n1/a.png", "n0/", "n2/notes.txt"], "", r"folders without images: n0, n2 \(2 of 3 folders\)"),
        (["n1/a.png", "n0/@eaDir/a.png"], "", "folders without images: n0"),
        (
            ["train/n1/a.png", "val/n1/a.png"],
            "validation",
            "no split 'validation': it holds train, val.*one of these splits: train, val",
        ),
        (["train/n1/a.png", "val/n1/a.png"], "", "is not a folder of classes.*one of these splits: train, val"),
        (["val/n1/a.png"], "train", "no split 'train': it holds val.*one of these splits: val"),
        (["train/n1/a.png", "extra/a.png"], "", "one of these splits: train"),
        (["n1/a.png", "n2/a.png"], "val", "no split 'val': it holds n1, n2.*give an empty split"),
        (
            ["k/ILSVRC/Data/CLS-LOC/train/n1/a.png", "k/ILSVRC/Annotations/"],
            "train",
            "no split .train.*Give .*Data/CLS-LOC/train as the split",
        ),
        (["ImageNet/n01440764/a.png", "other/n01443537/a.png"], "", "are not classes: ImageNet holds"),
        (["bottle/train/good/a.png", "cable/train/good/a.png"], "", "are not classes: bottle holds"),
        (
            ["val/ILSVRC2012_val_00000001.JPEG"],
            "val",
            "1 images that have no class, such as ILSVRC2012_val_00000001.JPEG",
        ),
        (
            ["val/images/val_0.JPEG", "val/val_annotations.txt"],
            "val",
            "1 images that have no class, such as images/val_0",
        ),
        (["n1/a.png", "n2/a.png", "b.png"], "", "1 images that have no class, such as b.png, and 2 folders"),
        (["notes.txt"], "", "no images in .*net"),
        (["1/a.png", "01/a.png"], "", "'01' and '1' are one number"),
        (["1/a.png", "-1/a.png"], "", "'-1' is not a label"),
        (["20240101/a.png", "20240102/a.png"], "", "'20240101' is not a label"),
    ],
)
def test_what_holds_no_classes_is_refused_with_what_was_found(lay, names, split, words):
    with pytest.raises(SfdError, match=words):
        lay(names, split)


def test_wrong_root_is_refused_on_disk_and_found_in_a_tar(tmp_path):
    """`tar` of a folder puts a folder around everything; on disk the user can give the path to the classes."""
    for name in ("d/e/n1/a.png", "d/e/n2/a.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(png())
    with pytest.raises(SfdError, match="are not classes: d holds d/e/n1, d/e/n2.*such as d/e in it"):
        open_images("folder", str(tmp_path), "train", 8)
    with tarfile.open(tmp_path / "d.tar", "w") as tar:
        tar.add(tmp_path / "d", arcname="./d")
    assert open_images("tar", str(tmp_path / "d.tar"), "train", 8).class_names == ["n1", "n2"]


def test_existing_split_is_read(lay, tmp_path):
    source = lay(["train/n1/a.png", "val/n1/a.png", "val/n2/a.png", "val/n2/b.png"], "val")
    assert source.class_names == ["n1", "n2"] and len(source) == 3 and source.notes == []


def test_a_folder_of_classes_is_read_for_an_empty_split_or_the_split_in_its_name(lay):
    names = ["n1/a.png", "n2/a.png"]
    for name, split, notes in (("net", "", 0), ("val", "val", 0), ("x_train", "train", 0), ("other", "train", 1)):
        source = lay(names, split, name)
        assert source.class_names == ["n1", "n2"] and len(source.notes) == notes
    with pytest.raises(SfdError, match="test.* has no split 'train': it holds n1, n2"):
        lay(names, "train", "test")  # named after another split
    assert "no split 'train': its own folders are taken as the classes" in source.notes[0]


def test_class_folders_that_are_numbers_are_labels(lay):
    source = lay([f"train/{name}/a.png" for name in range(12)])
    assert [source[i]["label"] for i in range(12)] == list(range(12))
    assert [Path(source.name(i)).parent.name for i in (2, 10)] == ["2", "10"]
    assert source.class_names[10] == "10" and "taken as labels 0..11" in source.notes[0]
    padded = lay(["train/001/a.png", "train/003/a.png", "train/003/b.png"], name="padded")
    assert [padded[i]["label"] for i in range(3)] == [1, 3, 3] and padded.label_counts() == {1: 1, 3: 2}
    assert padded.class_names == ["0", "001", "2", "003"]
    assert "labels 0..3; no images have 0, 2 (2 labels)" in padded.notes[0]
    mixed = lay(["train/1/a.png", "train/10/a.png", "train/2/a.png", "train/cat/a.png"], name="mixed")
    assert mixed.class_names == ["1", "10", "2", "cat"] and "not all class folders" in mixed.notes[0]


def test_images_in_subfolders_belong_to_the_class_folder(lay):
    source = lay([f"train/{name}" for name in ("n1/images/b.png", "n1/images/a.png", "n2/images/a.png")])
    assert source.class_names == ["n1", "n2"] and source.notes == []
    assert [Path(source.name(i)).name for i in range(3)] == ["a.png", "b.png", "a.png"]
    source = lay(["train/dog/poodle/a.png", "train/dog/beagle/a.png", "train/cat/a.png"], name="deep")
    assert source.class_names == ["cat", "dog"] and "belong to the class folder above them: dog" in source.notes[0]


def test_dangling_and_circular_links_are_refused(tmp_path):
    (tmp_path / "store" / "x").mkdir(parents=True)
    (tmp_path / "store" / "x" / "a.png").write_bytes(png())
    net = tmp_path / "net"
    net.mkdir()
    (net / "n1").symlink_to(tmp_path / "store")
    source = open_images("folder", str(net), "", 8)
    assert source.class_names == ["n1"] and len(source) == 1
    (net / "n2").symlink_to(tmp_path / "gone")
    with pytest.raises(SfdError, match="n2 is a link whose target is missing"):
        open_images("folder", str(net), "", 8)
    (net / "n2").unlink()
    (tmp_path / "store" / "x" / "again").symlink_to(tmp_path / "store")
    with pytest.raises(SfdError, match="again is a link to one of its own parent folders"):
        open_images("folder", str(net), "", 8)


def test_a_class_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    for name in ("n1", "n2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(png())
    scandir = os.scandir  # the root user, who may run this, ignores permissions

    def denied(path):
        if os.fspath(path).endswith("n2"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(SfdError, match="cannot read folder .*n2: Permission denied"):
        open_images("folder", str(tmp_path), "", 8)


def test_files_that_are_left_out_are_counted(tmp_path):
    for name in ("n1/a.png", "n1/b.avif", "n2/a.png", "n2/boxes.txt", "n2/c", "n2/.d.txt", "n3.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(png())
    (note,) = open_images("folder", str(tmp_path), "", 8).notes
    assert "left out" in note and all(part in note for part in (".avif (1)", ".txt (1)", ".tar (1)", "none (1)"))


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_an_empty_path_is_not_the_working_folder(tmp_path, monkeypatch, kind):
    (tmp_path / "n1").mkdir()
    (tmp_path / "n1" / "a.png").write_bytes(png())
    monkeypatch.chdir(tmp_path)
    for path, words in (("", "no (folder|tar file) ''"), ("n1/a.png", "n1/a.png")):
        with pytest.raises(SfdError, match=words):
            open_images(kind, path, "", 8)


def test_a_class_may_be_called_train():
    found = find_classes("net", ["plane/a.png", "train/a.png"], ["plane", "train"])
    assert found.class_names == ["plane", "train"] and found.labels.tolist() == [0, 1]
