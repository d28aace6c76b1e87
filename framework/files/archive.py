"""Reader of the ZIP archive that ``torch.save`` writes, whose entries are never compressed."""

import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable
from typing import IO

MOST_ENTRIES = 1 << 18
MOST_DIRECTORY_BYTES = 1 << 26
BLOCK = 1 << 20
"""Bytes that are read at a time."""

_END = struct.Struct("<4s4H2LH")
_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCAL = struct.Struct("<4s22x2H")


class Archive:
    """The entries of a checkpoint file by name. All entries lie in one folder, which is left out of the names.

    ``torch.save`` stores its entries uncompressed, one after the other. An archive with compressed entries, with
    entries that share bytes of the file, or with two entries of one name is refused. All entries together are therefore
    never larger than the file.

    Args:
        stream: An open file, or a part of a file, with ``seek``.

    Raises:
        ValueError: The archive has something that ``torch.save`` does not write; the message names it.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.size = stream.seek(0, 2)
        start = self._check_directory()
        found = zipfile.ZipFile(stream).infolist()
        self._entries: dict[str, zipfile.ZipInfo] = {}
        for info in found:
            if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 1:
                raise ValueError(f"{info.filename} is compressed or encrypted, which torch.save never does")
            name = info.filename.partition("/")[2]
            if not name or name in self._entries:
                raise ValueError(f"the entry {info.filename!r} is there twice, or is not in a folder")
            self._entries[name] = info
        _check_overlap(found, start)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def size_of(self, name: str) -> int:
        """Return the size of an entry in bytes."""
        return self._entry(name).file_size

    def read(self, name: str) -> bytes:
        """Return the bytes of an entry, compared with their checksum.

        Raises:
            ValueError: The entry is missing, truncated or changed.
        """
        target = bytearray(self.size_of(name))
        self.read_into(name, memoryview(target))
        return bytes(target)

    def read_into(self, name: str, target: memoryview, verify: bool = True) -> None:
        """Read an entry into ``target``, which has the size of the entry.

        Args:
            name: Name of the entry.
            target: Bytes to fill.
            verify: Whether the bytes are compared with their checksum.

        Raises:
            ValueError: The entry is truncated or changed.
        """
        entry = self._entry(name)
        parts = (target[start : start + BLOCK] for start in range(0, len(target), BLOCK))
        self._read(entry, parts, verify)

    def check_sums(self, advance: Callable[[float], None] = lambda more: None) -> None:
        """Compare every entry with its checksum (about a second per GB), in one megabyte of memory.

        Args:
            advance: Is called with the number of bytes after each block.

        Raises:
            ValueError: An entry is truncated or changed; the message names the first one.
        """
        block = memoryview(bytearray(BLOCK))
        for entry in self._entries.values():
            sizes = (min(BLOCK, entry.file_size - start) for start in range(0, entry.file_size, BLOCK))
            self._read(entry, (block[:size] for size in sizes), advance=advance)

    def _read(
        self,
        entry: zipfile.ZipInfo,
        parts: Iterable[memoryview],
        verify: bool = True,
        advance: Callable[[float], None] = lambda more: None,
    ) -> None:
        """Read an entry, one part after the other."""
        self._stream.seek(entry.header_offset)
        signature, name, extra = _LOCAL.unpack(self._stream.read(_LOCAL.size))
        begin = entry.header_offset + _LOCAL.size + name + extra
        if signature != b"PK\3\4" or begin + entry.file_size > self.size:
            raise ValueError(f"{entry.filename} is not at its place in the file")
        self._stream.seek(begin)
        crc = 0
        for part in parts:
            if self._stream.readinto(part) != len(part):  # type: ignore[attr-defined]
                raise ValueError(f"{entry.filename} is truncated")
            crc = zlib.crc32(part, crc) if verify else crc
            advance(len(part))
        if verify and crc != entry.CRC:
            raise ValueError(f"{entry.filename} does not match its checksum")

    def _entry(self, name: str) -> zipfile.ZipInfo:
        if name not in self._entries:
            raise ValueError(f"it has no entry {name}")
        return self._entries[name]

    def _check_directory(self) -> int:
        """Check the list of entries before zipfile reads it, and return where the list begins."""
        missing = ValueError("it is not a checkpoint, or is truncated")
        end = self.size - _END.size
        if end < 0:
            raise missing
        self._stream.seek(end)
        signature, _, _, _, entries, size, start, comment = _END.unpack(self._stream.read(_END.size))
        if signature != b"PK\5\6" or comment:
            raise missing
        if end >= _LOCATOR.size + _END64.size:
            self._stream.seek(end - _LOCATOR.size)
            signature, _, offset, _ = _LOCATOR.unpack(self._stream.read(_LOCATOR.size))
            if signature == b"PK\6\7":
                end -= _LOCATOR.size + _END64.size
                if offset != end:
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


def _check_overlap(entries: list[zipfile.ZipInfo], end: int) -> None:
    """Refuse entries that share bytes of the file, or that reach into the list of entries, which begins at ``end``."""
    for info in sorted(entries, key=lambda info: info.header_offset, reverse=True):
        last = info.header_offset + _LOCAL.size + len(info.orig_filename.encode()) + info.file_size
        if last > end:
            raise ValueError(f"{info.filename} overlaps another entry")
        end = info.header_offset
