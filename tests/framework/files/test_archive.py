"""The archive of a checkpoint: what would unpack to more than the file holds is refused before it is read."""

import io
import struct
import tracemalloc
import zipfile
import zlib

import pytest
import torch

from orthotrain.checkpoints.reading import check_checkpoint, read_checkpoint
from orthotrain.errors import ConfigurationError
from orthotrain.files.archive import MOST_ENTRIES, Archive


def good():
    stream = io.BytesIO()
    torch.save({"w": torch.arange(8.0), "name": "x"}, stream)
    return stream


def packed(change=lambda info: None, compression=zipfile.ZIP_STORED, entries=None):
    stream = io.BytesIO()
    with zipfile.ZipFile(good()) as source, zipfile.ZipFile(stream, "w", compression) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
        for name, data in (entries or {}).items():
            target.writestr(name, data)
    return stream


def test_every_entry_is_read_and_summed():
    archive = Archive(good())
    assert archive.size_of("data/0") == 32
    assert torch.frombuffer(bytearray(archive.read("data/0")), dtype=torch.float32).tolist() == list(range(8))
    archive.check_sums()


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_packed_entry_is_refused(method, tmp_path):
    stream = packed(compression=method, entries={"good/data/1": bytes(10**7)})
    assert stream.seek(0, 2) < 10**5
    with pytest.raises(ValueError, match="is compressed or encrypted"):
        Archive(stream)
    (tmp_path / "bomb.ckpt").write_bytes(stream.getvalue())
    for read in (read_checkpoint, check_checkpoint):
        with pytest.raises(ConfigurationError, match=r"bomb.ckpt' cannot be read: .* is compressed or encrypted"):
            read(tmp_path / "bomb.ckpt")


def test_two_entries_of_one_name_are_refused():
    with pytest.warns(UserWarning, match="Duplicate"):
        stream = packed(entries={"good/data/1": b"a"})
        with zipfile.ZipFile(stream, "a") as target:
            target.writestr("good/data/1", b"b")
    with pytest.raises(ValueError, match="is there twice, or is not in a folder"):
        Archive(stream)
    with pytest.raises(ValueError, match="is there twice, or is not in a folder"):  # of two folders
        Archive(packed(entries={"other/data/0": b"b"}))


def directory_of(stream):
    """The bytes of a small archive before its directory, and the directory's entries."""
    data = stream.getvalue()
    count, size, start = struct.unpack_from("<H2L", data, len(data) - 12)
    entries, at = [], start
    for _ in range(count):
        name, extra, comment = struct.unpack_from("<3H", data, at + 28)
        end = at + 46 + name + extra + comment
        entries.append(bytearray(data[at:end]))
        at = end
    return data[:start], entries


def rebuilt(body, entries, count=None):
    directory = b"".join(entries)
    count = len(entries) if count is None else count
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, len(directory), len(body), 0)
    return io.BytesIO(body + directory + end)


def test_entries_that_share_their_bytes_are_refused():
    """The overlapping bomb: a thousand names for the same bytes."""
    body, entries = directory_of(packed(entries={"good/data/1": bytes(10**4)}))
    last = entries[-1]
    copies = []
    for number in range(1000):
        copy = bytearray(last)
        copy[46:57] = f"good/d/{number:04d}".encode()
        copies.append(copy)
    with pytest.raises(ValueError, match="overlaps another entry"):
        Archive(rebuilt(body, [*entries, *copies]))


@pytest.mark.parametrize("size", [10**5, 2**32 - 2])
def test_an_entry_beyond_the_end_is_refused(size):
    body, entries = directory_of(packed())
    struct.pack_into("<2L", entries[-1], 20, size, size)
    with pytest.raises(ValueError, match="overlaps another entry"):
        Archive(rebuilt(body, entries))


@pytest.mark.parametrize("place", [0, 10**6, 2**32 - 2])
def test_an_entry_that_lies_elsewhere_is_refused(place):
    body, entries = directory_of(packed())
    struct.pack_into("<L", entries[-1], 42, place)
    with pytest.raises(ValueError, match=r"overlaps another entry|not at its place|truncated|unpack"):
        Archive(rebuilt(body, entries)).check_sums()


def test_a_directory_without_end_is_not_read(tmp_path):
    """It says of itself how long it is: 2 GB of entries lie in a file without blocks on the disk."""
    path, size = tmp_path / "long.ckpt", 1 << 31
    with path.open("wb") as file:
        file.seek(size)
        file.write(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1000, 1000, size, 0, 0))
    with pytest.raises(ConfigurationError, match="it lists 1,000 entries in 2,147,483,648 bytes"):
        read_checkpoint(path)
    many = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, MOST_ENTRIES + 1, MOST_ENTRIES + 1, 0, 0)
    many += struct.pack("<4sLQL", b"PK\6\7", 0, 0, 1) + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0, 0, 0, 0, 0)
    with pytest.raises(ValueError, match="it lists 262,145 entries"):
        Archive(io.BytesIO(many))


@pytest.mark.parametrize("change", [lambda data: data + b"x", lambda data: b"x" + data, lambda data: data[:-1]])
def test_an_archive_inside_other_bytes_is_refused(change):
    """Readers of archives disagree on what lies where in such a file."""
    with pytest.raises(ValueError, match="is not a checkpoint, or is truncated"):
        Archive(io.BytesIO(change(good().getvalue())))


def test_a_flipped_bit_of_any_entry_is_found():
    data = good().getvalue()
    archive = Archive(io.BytesIO(data))
    for name, info in archive._entries.items():
        begin = info.header_offset + 30 + sum(struct.unpack_from("<2H", data, info.header_offset + 26))
        spoilt = bytearray(data)
        spoilt[begin + info.file_size // 2] ^= 4
        with pytest.raises(ValueError, match=f"{info.filename} does not match its checksum"):
            Archive(io.BytesIO(spoilt)).check_sums()
        with pytest.raises(ValueError, match="does not match its checksum"):
            Archive(io.BytesIO(spoilt)).read(name)


def test_checking_takes_no_memory_for_the_file(tmp_path):
    """300 MB of zeros without blocks on the disk, summed a megabyte at a time."""
    path, size, name = tmp_path / "large.ckpt", 300 << 20, b"large/data/0"
    crc = 0
    for _ in range(300):
        crc = zlib.crc32(bytes(1 << 20), crc)
    local = struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, 0, 0, 0, crc, size, size, len(name), 0) + name
    entry = struct.pack("<4s6H3L5H2L", b"PK\1\2", 20, 20, 0, 0, 0, 0, crc, size, size, len(name), 0, 0, 0, 0, 0, 0)
    with path.open("wb") as file:
        file.write(local)
        file.seek(len(local) + size)
        file.write(entry + name)
        file.write(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, len(entry) + len(name), len(local) + size, 0))
    with path.open("rb") as file:
        tracemalloc.start()
        Archive(file).check_sums()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 4 << 20
