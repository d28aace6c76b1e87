"""Distributed checkpoints and token caches with values that lie, and right checksums over them."""

import hashlib
import json
import pickle
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from hostile import pickles
from hostile.rows import EITHER, Call, Place, Row
from hostile.text_bombs import DEEP

KIND = "shards"


def sum_again(folder: Path) -> None:
    """Make the checksums of a distributed checkpoint right again, as whoever makes a hostile one would."""
    names = [file.name for file in folder.iterdir() if file.name != "checksums.json"]
    index = {name: [(folder / name).stat().st_size, zlib.crc32((folder / name).read_bytes())] for name in names}
    (folder / "checksums.json").write_text(json.dumps(index))


def _sharded(change: Callable[[Place, Path], None]) -> Callable[[Place], Call]:
    def make(place: Place) -> Call:
        folder = place.copy("shards", "bad.ckpt")
        change(place, folder)
        return Call(["consolidate", folder, "one.ckpt"])

    return make


def _rest(**entries: Any) -> Callable[[Place, Path], None]:
    def change(place: Place, folder: Path) -> None:
        rest = torch.load(folder / "meta.pt", weights_only=True)
        for name, value in entries.items():
            if value is None:
                rest.pop(name)
            else:
                rest[name] = value
        torch.save(rest, folder / "meta.pt")
        sum_again(folder)

    return change


def _description(code: Callable[[Place], bytes]) -> Callable[[Place, Path], None]:
    def change(place: Place, folder: Path) -> None:
        (folder / ".metadata").write_bytes(code(place))
        sum_again(folder)

    return change


def _sums(text: str) -> Callable[[Place, Path], None]:
    return lambda place, folder: (folder / "checksums.json").write_text(text)  # type: ignore[return-value]


def rows() -> Iterator[Row]:
    """Distributed checkpoints whose description, rest or sums are hostile."""
    trap = "mkdir {}".format
    changes = {
        "without optimizer states": _rest(optimizer_states=None),
        "optimizer states of text": _rest(optimizer_states="x"),
        "optimizer states of numbers": _rest(optimizer_states=[1, 2]),
        "more optimizer states": _rest(optimizer_states=[{}, {}, {}]),
        "optimizer states in themselves": _rest(optimizer_states=pickles.doubling(50)),
        "sums in lists": _sums("[" * DEEP), "sums of text": _sums('{"meta.pt": "x"}'),
        "sums of another folder": _sums('{"../../canary/a.txt": [1, 1]}'),
        "sums of numbers": _sums("3"), "sums with escapes": _sums('{"\\u001b[2J": [1, 1]}'),
        "description runs": _description(lambda place: f"cposix\nsystem\n(S'{trap(place.sprung)}'\ntR.".encode()),
        "description imports": _description(lambda place: b"cantigravity\nfly\n."),
        "description of a number": _description(lambda place: pickle.dumps(3)),
        "description numbers": _description(lambda place: b"\x80\x02}r" + struct.pack("<I", (1 << 31) - 1) + b"."),
        "description in lists": _description(lambda place: b"\x80\x02" + pickles.nested(DEEP) + b"."),
        "description of text": _description(lambda place: b"\x80\x02X" + struct.pack("<I", (1 << 32) - 1) + b"a."),
        "description frames": _description(lambda place: b"\x80\x04\x95" + struct.pack("<Q", 1 << 62) + b"."),
    }  # fmt: skip
    for name, change in changes.items():
        yield Row(KIND, f"shards {name}", "consolidate", _sharded(change))
    yield from cache_rows()


CACHE = {
    "tokens": 1 << 62,
    "tokens -1": -1,
    "dtype": "object",
    "text_bytes": "x",
    "documents": 1 << 70,
    "none": None,
    "checksum": 3,
}


def cache_rows() -> Iterator[Row]:
    """Token caches with a right checksum of a header that lies, and with tokens beyond the vocabulary."""
    for name, value in CACHE.items():

        def lying(place, name=name, value=value):
            config = place.config()
            path = next((place.work / "cache").iterdir()) / "train.tokens"
            raw = path.read_bytes()
            length = struct.unpack_from("<I", raw, 12)[0]
            metadata = json.loads(raw[16 : 16 + length])
            metadata[name.split()[0] if name != "none" else "tokens"] = value
            body = json.dumps(metadata).encode()
            room = raw.index(b"\0", 16 + length) and 4096
            header = raw[:12] + struct.pack("<I", len(body)) + body.ljust(room - 48, b"\0")
            path.write_bytes(header + hashlib.sha256(header).digest() + raw[room:])
            return Call(["fit", "-c", config])

        yield Row(KIND, f"cache {name}", "fit", lying, EITHER, ("train.tokens",))
