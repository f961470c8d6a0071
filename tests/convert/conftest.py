"""Torch files assembled by hand, so that reading is tested without torch too."""

import io
import struct
import zipfile

import numpy as np
import pytest


class TorchFile:
    """Assemble the pickle and the containers that torch.save writes, opcode by opcode.

    A tree of dicts, str, int, float and float32 arrays; `Raw(bytes)` puts opcodes in as they are.
    """

    class Raw(bytes):
        """Opcodes that leave one value on the stack."""

    def __init__(self, tree, legacy=False):
        self.legacy, self.storages = legacy, []
        self.pickle = b"\x80\x02" + self._value(tree) + b"."

    def zip_bytes(self, root="archive", **members) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr(f"{root}/data.pkl", self.pickle)
            archive.writestr(f"{root}/byteorder", members.get("byteorder", b"little"))
            for key, data in enumerate(self.storages):
                archive.writestr(f"{root}/data/{key}", data)
        return buffer.getvalue()

    def legacy_bytes(self) -> bytes:
        magic = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
        version = b"\x80\x02M\xe9\x03."
        system = b"\x80\x02" + self._value({"little_endian": 1}) + b"."
        keys = b"\x80\x02](" + b"".join(self._text(str(k)) for k in range(len(self.storages))) + b"e."
        data = b"".join(struct.pack("<q", len(d) // 4) + d for d in self.storages)
        return magic + version + system + self.pickle + keys + data

    def _value(self, node) -> bytes:
        if isinstance(node, self.Raw):
            return bytes(node)
        if isinstance(node, dict):
            return b"}(" + b"".join(self._text(k) + self._value(v) for k, v in node.items()) + b"u"
        if isinstance(node, str):
            return self._text(node)
        if isinstance(node, int):
            return b"J" + struct.pack("<i", node)
        if isinstance(node, float):
            return b"G" + struct.pack(">d", node)
        return self._tensor(np.asarray(node))

    def _tensor(self, array, storage="FloatStorage") -> bytes:
        key = len(self.storages)
        self.storages.append(array.tobytes())
        strides = [s // array.itemsize for s in np.empty(array.shape, array.dtype).strides]
        return self.rebuild(str(key), array.size, 0, array.shape, strides, storage)

    def rebuild(self, key, length, offset, shape, strides, storage="FloatStorage") -> bytes:
        """The call of _rebuild_tensor_v2 for any numbers, valid or not."""
        view = b"N" if self.legacy else b""
        persistent = (
            b"("
            + self._text("storage")
            + b"ctorch\n"
            + storage.encode()
            + b"\n"
            + self._text(key)
            + self._text("cpu")
            + self._value(length)
            + view
            + b"tQ"
        )
        numbers = [b"(" + b"".join(map(self._value, map(int, n))) + b"t" for n in (shape, strides)]
        call = b"(" + persistent + self._value(offset) + numbers[0] + numbers[1] + b"\x89Nt"
        return b"ctorch._utils\n_rebuild_tensor_v2\n" + call + b"R"

    @staticmethod
    def _text(text) -> bytes:
        data = text.encode()
        return b"X" + struct.pack("<I", len(data)) + data


@pytest.fixture
def torch_file():
    return TorchFile
