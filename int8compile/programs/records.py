"""The records of a PyTorch archive, from a zip file that has the same content for every reader.

An archive is checked by one reader and read by another (torch's own), and zip files can be written so that two readers
see two contents: a directory that names one record and a header that names another, records within records, sizes in
two places, bytes between records. So ``Records`` takes the one shape that PyTorch and Python's ``zipfile`` write, in
which every byte of the file has one meaning: uncompressed records one after the other from the first byte on, the
directory of the same records in the same order, the end. What it refuses is damaged or made to deceive.
"""

from __future__ import annotations

import os
import struct
import zlib
from typing import BinaryIO, NamedTuple

from int8compile.errors import ProgramFileError

_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_END_64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR_64 = struct.Struct("<4sIQI")
_FULL_16, _FULL_32 = 0xFFFF, 0xFFFFFFFF  # "too large for this field": the value is in the 64 bit one
_SIZES_FOLLOW, _UTF_8 = 1 << 3, 1 << 11  # the only flags in use
_CHUNK = 1 << 20


class Record(NamedTuple):
    """Where a record's bytes are, how many, and their checksum."""

    start: int
    size: int
    crc: int


class _Entry(NamedTuple):
    """A record as the directory has it."""

    name: bytes
    flags: int
    crc: int
    size: int
    header: int


class Records:
    """What is in an archive, by name, without the folder that all its records are in.

    Args:
        file: open for reading; has to stay open for ``read`` and ``check_bytes``.
        path, kind: for messages: ``m.pt2``, ``a file of int8compile.save``.

    Raises:
        ProgramFileError: the file is no such archive, is not whole, or does not have the one shape (see above).
    """

    def __init__(self, file: BinaryIO, path: str, kind: str) -> None:
        self.path = path
        self._file = file
        self._size = file.seek(0, os.SEEK_END)
        directory, stop, count = self._end(kind)
        entries = self._directory(directory, stop, count)
        starts = self._walk(entries, directory)
        names = [entry.name.decode() for entry in entries]
        self.root = names[0].split("/", 1)[0]
        self._records: dict[str, Record] = {}
        for name, entry, start in zip(names, entries, starts, strict=True):
            root, _, short = name.partition("/")
            if root != self.root or not root or "\\" in name or {"", ".", ".."} & set(short.split("/")):
                raise self.damaged(f"{name!r} is no name of a record in {self.root!r}")
            if short in self._records:
                raise self.damaged(f"{short!r} is in it twice")
            self._records[short] = Record(start, entry.size, entry.crc)

    def __contains__(self, name: str) -> bool:
        return name in self._records

    def __getitem__(self, name: str) -> Record:
        return self._records[name]

    def names(self) -> list[str]:
        """In the order of the file."""
        return list(self._records)

    def read(self, name: str) -> bytes:
        """A record's bytes, compared to their checksum."""
        if name not in self._records:
            raise self.damaged(f"{name} is missing")
        record = self._records[name]
        data = self._bytes(record.start, record.size)
        if zlib.crc32(data) != record.crc:
            raise self._not_as_written(name)
        return data

    def check_bytes(self) -> None:
        """Compare each record to its checksum, which torch does not: a flipped bit would be another weight."""
        for name, record in self._records.items():
            crc, left = 0, record.size
            self._file.seek(record.start)
            while left:
                data = self._file.read(min(left, _CHUNK))
                if not data:
                    raise self.damaged("it became shorter while it was read")
                crc, left = zlib.crc32(data, crc), left - len(data)
            if crc != record.crc:
                raise self._not_as_written(name)

    def damaged(self, what: str) -> ProgramFileError:
        return ProgramFileError(f"{self.path} is damaged: {what}")

    def _not_as_written(self, name: str) -> ProgramFileError:
        return self.damaged(f"the bytes of {name} are not those that were written")

    def _bytes(self, start: int, size: int) -> bytes:
        if start < 0 or start + size > self._size:
            raise self.damaged("it says that it is longer than it is")
        self._file.seek(start)
        return self._file.read(size)

    def _end(self, kind: str) -> tuple[int, int, int]:
        """Where the directory is, where it stops, and how many records it has."""
        at = self._size - _END.size
        tail = self._bytes(at, _END.size) if at >= 0 else b""
        if tail[:4] != b"PK\5\6" or tail[-2:] != b"\0\0":
            raise ProgramFileError(f"{self.path} is truncated, or not {kind} at all")
        _, disk, start_disk, here, count, size, start, _ = _END.unpack(tail)
        small = [disk, start_disk, here, count, size, start]
        locator = self._bytes(at - _LOCATOR_64.size, _LOCATOR_64.size) if at >= _LOCATOR_64.size else b""
        if locator[:4] == b"PK\6\7":
            _, disk, at, disks = _LOCATOR_64.unpack(locator)
            if at != self._size - _END.size - _LOCATOR_64.size - _END_64.size or disks != 1:
                raise self.damaged("its 64 bit end is not where it belongs")
            mark, length, _, _, start_disk, disk_64, here, count, size, start = _END_64.unpack(
                self._bytes(at, _END_64.size)
            )
            if mark != b"PK\6\6" or length != _END_64.size - 12 or disk_64:
                raise self.damaged("its 64 bit end is none")
            large = [disk, start_disk, here, count, size, start]
            full = [_FULL_16] * 4 + [_FULL_32] * 2
            if any(a not in (b, most) for a, b, most in zip(small, large, full, strict=True)):
                raise self.damaged("its two ends differ")
        if disk or start_disk or here != count or not count or start + size != at:
            raise self.damaged("its directory is not where it belongs")
        return start, at, count

    def _directory(self, start: int, stop: int, count: int) -> list[_Entry]:
        data, at = self._bytes(start, stop - start), 0
        entries = []
        for _ in range(count):
            if at + _CENTRAL.size > len(data):
                raise self.damaged("its directory ends too early")
            fields = _CENTRAL.unpack_from(data, at)
            mark, _, _, flags, method, _, _, crc, packed, size, name_size, extra_size, note, disk, _, _, header = fields
            at += _CENTRAL.size
            name, extra = data[at : at + name_size], data[at + name_size : at + name_size + extra_size]
            at += name_size + extra_size
            if mark != b"PK\1\2" or note or disk or at > len(data):
                raise self.damaged("its directory is none")
            if method:
                raise self.damaged("it is compressed, which neither PyTorch nor int8compile does")
            if flags & ~(_SIZES_FOLLOW | _UTF_8) or not _readable(name, flags):
                raise self.damaged(f"it holds {name!r} in a way that is not PyTorch's")
            size, packed, header = self._large([size, packed, header], extra)
            if packed != size:
                raise self.damaged(f"{name.decode()} has two sizes, {size} and {packed}")
            entries.append(_Entry(name, flags, crc, size, header))
        if at != len(data):
            raise self.damaged("its directory goes on after its end")
        return entries

    def _large(self, fields: list[int], extra: bytes) -> list[int]:
        """Sizes and position, of which those that need more than 32 bits are in the extra field, alone."""
        full = [i for i, value in enumerate(fields) if value == _FULL_32]
        if not full and not extra:
            return fields
        if not full or len(extra) != 4 + 8 * len(full) or struct.unpack_from("<2H", extra) != (1, 8 * len(full)):
            raise self.damaged("its directory holds what is neither a size nor a position")
        for i, value in zip(full, struct.unpack_from(f"<{len(full)}Q", extra, 4), strict=True):
            fields[i] = value
        return fields

    def _walk(self, entries: list[_Entry], directory: int) -> list[int]:
        """Where each record's bytes start, if record follows record from the file's first byte to the directory."""
        starts, at = [], 0
        for entry, after in zip(entries, [*(entry.header for entry in entries[1:]), directory], strict=True):
            name = entry.name.decode()
            if entry.header != at:
                raise self.damaged(f"{name} is not where it belongs")
            mark, _, flags, method, _, _, crc, packed, size, name_size, extra_size = _LOCAL.unpack(
                self._bytes(at, _LOCAL.size)
            )
            start = at + _LOCAL.size + name_size + extra_size
            written = self._bytes(at + _LOCAL.size, name_size)
            if mark != b"PK\3\4" or (written, flags, method) != (entry.name, entry.flags, 0):
                raise self.damaged(f"{name} is called something else where it is")
            trailer = (
                self._bytes(start + entry.size, after - start - entry.size) if after >= start + entry.size else None
            )
            if flags & _SIZES_FOLLOW:
                fits = not (crc or packed or size) or (crc, packed, size) == (entry.crc, entry.size, entry.size)
                trailers = [
                    struct.pack(f"<4sI2{kind}", b"PK\7\x08", entry.crc, entry.size, entry.size)
                    for kind in "IQ"
                    if kind == "Q" or entry.size <= _FULL_32
                ]
            else:
                is_large = packed == size == _FULL_32
                fits = crc == entry.crc and (is_large or packed == size == entry.size)
                trailers = [b""]
            if not fits or trailer not in trailers:
                raise self.damaged(f"{name} is not as long as the directory says")
            starts.append(start)
            at = after
        return starts


def _readable(name: bytes, flags: int) -> bool:
    """Whether a name has one meaning: ASCII, or said to be UTF-8 and that."""
    try:
        text = name.decode("utf-8" if flags & _UTF_8 else "ascii")
    except UnicodeDecodeError:
        return False
    return text.isprintable()
