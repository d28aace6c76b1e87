"""The archive that ``torch.save`` writes, read within the bounds of the file: its entries are never packed."""

import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import IO

MOST_ENTRIES = 1 << 18
MOST_DIRECTORY_BYTES = 1 << 26
BLOCK = 1 << 20
"""Bytes that are read and summed at a time."""

_END = struct.Struct("<4s4H2LH")
_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCAL = struct.Struct("<4s22x2H")


class Archive:
    """The entries of a checkpoint file by their names, without the folder that all of them lie in.

    ``torch.save`` stores entries unpacked, one after the other. An archive with packed entries, with entries that share
    bytes of the file, or with two entries of one name is refused, so that all entries together are never larger than
    the file.

    Args:
        stream: An open file, or a part of one, that can be searched.

    Raises:
        ValueError: Naming what such a file does not have.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.size = stream.seek(0, 2)
        start = self._check_directory()
        found = zipfile.ZipFile(stream).infolist()
        self._entries: dict[str, zipfile.ZipInfo] = {}
        for info in found:
            self._check_entry(info)
            name = info.filename.partition("/")[2]
            if not name or name in self._entries:
                raise ValueError(f"two of its entries have the name {info.filename!r}, or it lies in no folder")
            self._entries[name] = info
        _check_places(found, start)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def size_of(self, name: str) -> int:
        """Return the bytes of an entry."""
        return self._entry(name).file_size

    def read(self, name: str) -> bytes:
        """Return an entry whose checksum is right.

        Raises:
            ValueError: If it is missing, cut, or altered.
        """
        target = bytearray(self.size_of(name))
        self.read_into(name, memoryview(target))
        return bytes(target)

    def read_into(self, name: str, target: memoryview, verify: bool = True) -> None:
        """Fill ``target``, as large as the entry, with the entry.

        Args:
            name: The entry.
            target: Bytes to fill.
            verify: Whether the bytes are compared with their checksum.

        Raises:
            ValueError: If the entry is cut or altered.
        """
        entry, crc = self._entry(name), 0
        self._seek(entry)
        for at in range(0, len(target), BLOCK):
            part = target[at : at + BLOCK]
            if self._stream.readinto(part) != len(part):  # type: ignore[attr-defined]
                raise ValueError(f"{entry.filename} is cut")
            if verify:
                crc = zlib.crc32(part, crc)
        if verify and crc != entry.CRC:
            raise ValueError(f"{entry.filename} does not match its checksum")

    def check_sums(self, advance: Callable[[float], None] = lambda more: None) -> None:
        """Compare every entry with its checksum, a megabyte at a time (about a second per GB).

        Raises:
            ValueError: Naming the first entry that is cut or altered.
        """
        block = memoryview(bytearray(BLOCK))
        for entry in self._entries.values():
            self._seek(entry)
            crc, left = 0, entry.file_size
            while left:
                part = block[: min(left, BLOCK)]
                if self._stream.readinto(part) != len(part):  # type: ignore[attr-defined]
                    raise ValueError(f"{entry.filename} is cut")
                crc, left = zlib.crc32(part, crc), left - len(part)
                advance(len(part))
            if crc != entry.CRC:
                raise ValueError(f"{entry.filename} does not match its checksum")

    def _entry(self, name: str) -> zipfile.ZipInfo:
        if name not in self._entries:
            raise ValueError(f"it has no entry {name}")
        return self._entries[name]

    def _seek(self, entry: zipfile.ZipInfo) -> None:
        self._stream.seek(entry.header_offset)
        signature, name, extra = _LOCAL.unpack(self._stream.read(_LOCAL.size))
        begin = entry.header_offset + _LOCAL.size + name + extra
        if signature != b"PK\3\4" or begin + entry.file_size > self.size:
            raise ValueError(f"{entry.filename} does not lie where the directory says")
        self._stream.seek(begin)

    def _check_directory(self) -> int:
        """Return where the list of entries begins, which is looked at before it is read."""
        missing = ValueError("it is no checkpoint or is truncated")
        end = self.size - _END.size
        if end < 0:
            raise missing
        self._stream.seek(end)
        signature, _, _, _, entries, size, start, comment = _END.unpack(self._stream.read(_END.size))
        if signature != b"PK\5\6" or comment:
            raise missing
        if end >= _LOCATOR.size + _END64.size:
            self._stream.seek(end - _LOCATOR.size)
            signature, _, place, _ = _LOCATOR.unpack(self._stream.read(_LOCATOR.size))
            if signature == b"PK\6\7":
                end -= _LOCATOR.size + _END64.size
                if place != end:
                    raise missing
                self._stream.seek(end)
                signature, *_, entries, size, start = _END64.unpack(self._stream.read(_END64.size))
                if signature != b"PK\6\6":
                    raise missing
        if start + size != end:
            raise missing
        if entries > MOST_ENTRIES or size > MOST_DIRECTORY_BYTES:
            raise ValueError(f"it lists {entries:,} entries in {size:,} bytes, more than a checkpoint has")
        return start

    def _check_entry(self, info: zipfile.ZipInfo) -> None:
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 1:
            raise ValueError(f"{info.filename} is packed or encrypted, which no checkpoint is")


def _check_places(entries: list[zipfile.ZipInfo], end: int) -> None:
    """Refuse entries that share bytes of the file, or reach into the list of entries."""
    for info in sorted(entries, key=lambda info: info.header_offset, reverse=True):
        last = info.header_offset + _LOCAL.size + len(info.orig_filename.encode()) + info.file_size
        if last > end:
            raise ValueError(f"{info.filename} reaches into another entry")
        end = info.header_offset
