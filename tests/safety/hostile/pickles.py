"""Checkpoint archives made by hand: what torch.save would not write."""

import pickle
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

MIB = 1 << 20


class Call:
    """A value that is pickled as a call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple:
        return self.function, self.arguments


class Built:
    """A value that is pickled as ``module.name(*arguments)``, whatever that is."""

    def __init__(self, module: str, name: str, *arguments: Any) -> None:
        self.module, self.name, self.arguments = module, name, arguments


def pickled(value: Any) -> bytes:
    """Pickle nested plain values and ``Built``, without the pickler's own checks; protocol 2."""
    if isinstance(value, Built):
        arguments = b"".join(pickled(argument) for argument in value.arguments)
        return f"c{value.module}\n{value.name}\n".encode() + b"(" + arguments + b"tR"
    if isinstance(value, dict):
        return b"}(" + b"".join(pickled(key) + pickled(inner) for key, inner in value.items()) + b"u"
    if isinstance(value, list):
        return b"](" + b"".join(map(pickled, value)) + b"e"
    if isinstance(value, tuple):
        return b"(" + b"".join(map(pickled, value)) + b"t"
    if isinstance(value, bytes):
        return value  # opcodes
    return pickle.dumps(value, 2)[2:-1]


def archive(path: Path, code: bytes, more: dict[str, bytes] | None = None, compressed: bool = False) -> Path:
    """Write a checkpoint archive around opcodes that build one value."""
    kind = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", kind) as out:
        out.writestr("bad/data.pkl", b"\x80\x02" + code + b".")
        out.writestr("bad/byteorder", "little")
        out.writestr("bad/version", "3\n")
        for name, data in (more or {}).items():
            out.writestr(f"bad/{name}", data)
    return path


def zeros(size: int, raw: bool = True) -> bytes:
    """Return what inflates to ``size`` zeros, made by repeating one compressed block of 16 MiB."""
    pack = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = pack.compress(bytes(16 * MIB)) + pack.flush(zlib.Z_FULL_FLUSH)
    data = block * (size // (16 * MIB)) + zlib.compressobj(9, zlib.DEFLATED, -15).flush()
    return data if raw else b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + data + struct.pack("<II", 0, size & 0xFFFFFFFF)


def deflated_entry(path: Path, source: Path, entry: str, size: int) -> Path:
    """Copy an archive, one of its entries replaced by one that inflates to ``size`` zeros."""
    data = zeros(size)
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w") as new:
        for info in old.infolist():
            name = info.filename.partition("/")[2]
            if name != entry:
                new.writestr(info.filename, old.read(info))
                continue
            with new.open(zipfile.ZipInfo(info.filename), "w") as out:
                out.write(data)
            info = new.getinfo(info.filename)
    raw, name = bytearray(path.read_bytes()), entry.encode()
    for mark, method, sizes in ((b"PK\x03\x04", 8, 18), (b"PK\x01\x02", 10, 20)):
        at = -1
        while (at := raw.find(mark, at + 1)) >= 0:
            length, start = (26, 30) if method == 8 else (28, 46)
            end = at + start + struct.unpack_from("<H", raw, at + length)[0]
            if bytes(raw[at + start : end]).endswith(b"/" + name):
                struct.pack_into("<H", raw, at + method, 8)
                struct.pack_into("<II", raw, at + sizes, len(data), min(size, 0xFFFFFFFE))
    path.write_bytes(raw)
    return path


def overlapping(path: Path, source: Path, times: int) -> Path:
    """Copy an archive and add directory entries that all name the largest of its entries again."""
    raw = source.read_bytes()
    with zipfile.ZipFile(source) as old:
        infos, start = old.infolist(), old.start_dir
    largest = max(infos, key=lambda info: info.file_size)
    directory = raw[start : raw.rfind(b"PK\x05\x06")].partition(b"PK\x06\x06")[0]
    at = directory.find(largest.filename.encode()) - 46
    end = at + 46 + sum(struct.unpack_from("<HHH", directory, at + 28))
    entry, size = directory[at:end], len(largest.filename)
    made = bytearray(directory)
    for number in range(times):
        made += entry[:46] + f"{number:0{size}d}".encode()[:size] + entry[46 + size :]
    total = min(len(infos) + times, 0xFFFF)
    tail = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, total, total, len(made), start, 0)
    path.write_bytes(raw[:start] + made + tail)
    return path


def expanded(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return a tensor of one value and stride 0."""
    return torch.zeros(1, dtype=dtype).expand(*shape)


def doubling(depth: int) -> list:
    """Return lists that hold the next one twice: 2 ** depth values in depth lists."""
    inner: list = [0]
    for _ in range(depth):
        inner = [inner, inner]
    return inner


def nested(depth: int) -> bytes:
    """Return opcodes for a list in a list in a list."""
    return b"]" * depth + b"a" * (depth - 1)
