"""Files of records of one size, read at random by several threads: ours, and the ArrayRecord files of older stores."""

import os
from pathlib import Path
from typing import BinaryIO

import google_crc32c
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

CRC_BYTES = 4
_NOWAIT = getattr(os, "RWF_NOWAIT", 0)  # Linux; elsewhere each read waits


def write_record(file: BinaryIO, record: bytes) -> None:
    """Append a record and its CRC-32C to a file that `RecordFile` reads."""
    file.write(record + google_crc32c.value(record).to_bytes(CRC_BYTES, "little"))


class RecordFile:
    """Records one after another, each followed by its CRC-32C.

    Args:
      path: the file.
      record_bytes: size of a record without its CRC.
    """

    def __init__(self, path: Path, record_bytes: int):
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115  # stays open
        self._size = record_bytes + CRC_BYTES

    def __len__(self) -> int:
        return os.fstat(self._file.fileno()).st_size // self._size

    def read(self, number: int, parts: list[np.ndarray], wait: bool = True) -> bool:
        """Read a record into arrays.

        Args:
          number: which one.
          parts: contiguous uint8 arrays that together have the size of a record.
          wait: for the disk; else a record that is not in the page cache is only requested from the system.

        Returns:
          Whether the record was read.

        Raises:
          ValueError: the record is damaged.
        """
        file, start = self._file.fileno(), number * self._size
        wait = wait or not _NOWAIT
        crc, stored = 0, bytearray(CRC_BYTES)
        try:
            size = os.preadv(file, [*parts, stored], start, 0 if wait else _NOWAIT)
        except OSError:
            if wait:
                raise
            size = 0
        if size != self._size:
            if wait:
                raise ValueError(f"it ends within record {number}")
            os.posix_fadvise(file, start, self._size, os.POSIX_FADV_WILLNEED)
            return False
        for part in parts:
            crc = google_crc32c.extend(crc, part)
        if crc != int.from_bytes(stored, "little"):
            raise ValueError(f"record {number} does not match its CRC-32C")
        return True


class ArrayRecordFile:
    """The same for an ArrayRecord file, whose library checks a hash of each record: three copies instead of one."""

    def __init__(self, path: Path):
        # Random access; the buffer is for the headers around a record, which itself bypasses it.
        self._reader = ArrayRecordReader(str(path), "readahead_buffer_size:0", file_reader_buffer_size=16384)

    def __len__(self) -> int:
        return self._reader.num_records()

    def read(self, number: int, parts: list[np.ndarray], wait: bool = True) -> bool:
        """See `RecordFile.read`; it waits always."""
        # A range of one: `read([number])` takes half as long again, a list of many twice as long.
        record = np.frombuffer(self._reader.read(number, number + 1)[0], np.uint8)
        ends = np.cumsum([part.size for part in parts])
        if record.size != ends[-1]:
            raise ValueError(f"record {number} has {record.size} bytes, not {ends[-1]}")
        for part, values in zip(parts, np.split(record, ends[:-1]), strict=True):
            part[...] = values
        return True
