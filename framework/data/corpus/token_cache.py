"""The token cache: one file of tokens for each split, memory-mapped, checked before use, written atomically.

Layout: a header of exactly 4096 bytes, then the tokens as raw little-endian unsigned integers of 2 or 4 bytes::

    magic "ORTHOTOK" | u32 version | u32 length of metadata | metadata (JSON, ASCII) | zeros | sha256 of all before
    8 bytes            4 bytes       4 bytes                  up to 4048 bytes                 32 bytes
"""

import contextlib
import hashlib
import json
import os
import struct
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from orthotrain.console.failures import naming
from orthotrain.errors import ConfigurationError
from orthotrain.files.atomic_writes import discard, open_temporary_file, publish
from orthotrain.files.paths import check_regular_file

MAGIC = b"ORTHOTOK"
VERSION = 2
HEADER_BYTES = 4096
FULL_CHECK_BYTES = 1 << 30
_SAMPLES, _SAMPLE_BYTES = 64, 1 << 20
_BLOCK_TOKENS = 1 << 20
_PREFIX = struct.Struct("<8sII")
_DIGEST_BYTES = 32
_DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


class CorruptCacheError(ConfigurationError):
    """A token cache that is truncated, altered or not a token cache at all."""


@dataclass(frozen=True)
class Metadata:
    """The values in the header.

    Attributes:
        dtype: ``uint16`` or ``uint32``.
        tokens: Number of tokens.
        text_bytes: UTF-8 bytes of the text of the tokens.
        documents: Number of documents.
        tokenizer_fingerprint: Sha256 of the tokenizer that made the tokens.
        source_fingerprint: Fingerprint of the source and the settings that chose the text.
        checksum: Checksum of the tokens, see `checksum`.
        content: Blake2b of all tokens. Two corpora are equal if it is equal.
    """

    dtype: str
    tokens: int
    text_bytes: int
    documents: int
    tokenizer_fingerprint: str
    source_fingerprint: str
    checksum: str
    content: str


def checksum(data: Any) -> str:
    """Return the blake2b of the token bytes.

    Up to 1 GiB, every byte counts (about a second per GiB). Of a larger file, 64 blocks of 1 MiB count, spread evenly
    from the first byte to the last. Together with the size in the header they show a truncated, swapped or overwritten
    file at a constant cost, but not every flipped bit.

    Args:
        data: A bytes-like object.
    """
    view = memoryview(data).cast("B")
    digest = hashlib.blake2b(digest_size=32)
    if len(view) <= FULL_CHECK_BYTES:
        digest.update(view)
    else:
        for sample in range(_SAMPLES):
            start = sample * (len(view) - _SAMPLE_BYTES) // (_SAMPLES - 1)
            digest.update(view[start : start + _SAMPLE_BYTES])
    return digest.hexdigest()


def _corrupt(path: Path | str, problem: str) -> CorruptCacheError:
    return CorruptCacheError(f"token cache {path}: {problem}; delete it and it will be rebuilt")


def encode_header(metadata: Metadata) -> bytes:
    """Return the 4096 bytes before the tokens."""
    body = json.dumps(asdict(metadata)).encode("ascii")
    room = HEADER_BYTES - _PREFIX.size - _DIGEST_BYTES
    if len(body) > room:
        raise ValueError(f"metadata of {len(body)} bytes, the header has room for {room}")
    header = _PREFIX.pack(MAGIC, VERSION, len(body)) + body.ljust(room, b"\0")
    return header + hashlib.sha256(header).digest()


def decode_header(raw: bytes, path: Path | str) -> Metadata:
    """Parse and check a header.

    Args:
        raw: The first 4096 bytes of the file (fewer if the file is shorter).
        path: The file's name, for messages.

    Raises:
        CorruptCacheError: The bytes are not exactly as `encode_header` writes them.
    """
    if len(raw) < HEADER_BYTES:
        raise _corrupt(path, f"expected a header of {HEADER_BYTES} bytes, found {len(raw)} bytes (truncated)")
    magic, version, length = _PREFIX.unpack_from(raw)
    if magic != MAGIC:
        raise _corrupt(path, f"expected it to begin with {MAGIC!r}, found {magic!r} (not a token cache)")
    if version != VERSION:
        raise _corrupt(path, f"expected format version {VERSION}, found {version}")
    room = HEADER_BYTES - _PREFIX.size - _DIGEST_BYTES
    if length > room:
        raise _corrupt(path, f"expected at most {room} bytes of metadata, found {length}")
    if hashlib.sha256(raw[:-_DIGEST_BYTES]).digest() != raw[-_DIGEST_BYTES:]:
        raise _corrupt(path, "the header does not match its checksum (altered)")
    return _parse_metadata(raw[_PREFIX.size : _PREFIX.size + length], path)


def _parse_metadata(body: bytes, path: Path | str) -> Metadata:
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise _corrupt(path, "the metadata in its header is not JSON") from error
    types = {field.name: field.type for field in fields(Metadata)}
    if not isinstance(values, dict) or values.keys() != types.keys():
        raise _corrupt(path, f"expected the metadata {sorted(types)}, found {str(values)[:200]}")
    for name, kind in types.items():
        if type(values[name]) is not kind or (kind is int and values[name] < 0):
            raise _corrupt(path, f"metadata {name!r} is {str(values[name])[:80]!r}")
    if values["dtype"] not in _DTYPES:
        raise _corrupt(path, f"expected dtype uint16 or uint32, found {values['dtype'][:80]!r}")
    return Metadata(**values)


@dataclass(frozen=True)
class TokenCache:
    """Tokens of one split, memory-mapped.

    Attributes:
        path: The file.
        metadata: Its header.
        tokens: Read-only array of shape ``(metadata.tokens,)``.
    """

    path: Path
    metadata: Metadata
    tokens: np.ndarray

    @staticmethod
    def read_metadata(path: Path) -> Metadata:
        """Read the header and compare the file's size with it, without touching the tokens.

        Raises:
            CorruptCacheError: The header is damaged or the file is truncated or too long.
        """
        check_regular_file(path, "token cache")
        with path.open("rb") as file:
            metadata = decode_header(file.read(HEADER_BYTES), path)
            found = os.fstat(file.fileno()).st_size
        expected = HEADER_BYTES + metadata.tokens * _DTYPES[metadata.dtype].itemsize
        if found != expected:
            problem = "truncated" if found < expected else "too long"
            raise _corrupt(path, f"expected {expected:,} bytes, found {found:,} ({problem})")
        return metadata

    @classmethod
    def open(cls, path: Path | str, verify: bool = True) -> "TokenCache":
        """Map a cache into memory.

        Args:
            path: The file.
            verify: Compare the tokens with the checksum, see `checksum`.

        Raises:
            CorruptCacheError: The file is truncated, altered or no token cache.
        """
        path = Path(path)
        metadata = cls.read_metadata(path)
        dtype = _DTYPES[metadata.dtype]
        if metadata.tokens == 0:  # an empty range cannot be mapped
            tokens = np.empty(0, dtype)
        else:
            tokens = np.memmap(path, dtype, mode="r", offset=HEADER_BYTES, shape=(metadata.tokens,))
        if verify and (found := checksum(tokens)) != metadata.checksum:
            raise _corrupt(path, f"expected checksum {metadata.checksum[:16]}, found {found[:16]} (altered)")
        return cls(path, metadata, tokens)

    def total(self, values: np.ndarray) -> int:
        """Return the sum of a value of each token, from an array of shape ``(V,)``, over all tokens."""
        blocks = range(0, len(self.tokens), _BLOCK_TOKENS)
        return sum(int(values[self.tokens[start : start + _BLOCK_TOKENS]].sum()) for start in blocks)

    def __reduce__(self) -> tuple:
        """Pickle the path: a worker process maps the file again, and both share the tokens in the page cache."""
        return TokenCache.open, (self.path, False)


class TokenCacheWriter:
    """Writes a cache to a temporary file and renames the file when it is whole.

    Use it as a context manager: an exception removes the temporary file and leaves an older cache alone.

    Args:
        path: The cache.
        vocab_size: Largest token plus one; decides between 2 and 4 bytes for a token.
    """

    def __init__(self, path: Path, vocab_size: int) -> None:
        self.path = path
        self.dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
        self.tokens = self.text_bytes = self.documents = 0
        self._content = hashlib.blake2b(digest_size=32)
        self._file = open_temporary_file(path)
        self._temporary = Path(self._file.name)
        self._file.seek(HEADER_BYTES)

    def append(self, tokens: list[int], text_bytes: int, documents: int = 1) -> None:
        """Add the tokens of ``text_bytes`` bytes of text."""
        packed = np.asarray(tokens, _DTYPES[self.dtype]).tobytes()
        with naming(self.path):
            self._file.write(packed)
        self._content.update(packed)
        self.tokens += len(tokens)
        self.text_bytes += text_bytes
        self.documents += documents

    def commit(self, tokenizer_fingerprint: str, source_fingerprint: str) -> None:
        """Write the header, flush to disk and move the file into place."""
        with naming(self.path):
            self._file.flush()
            mapped = np.memmap(self._temporary, np.uint8, mode="r", offset=HEADER_BYTES) if self.tokens else b""
            counts = (self.dtype, self.tokens, self.text_bytes, self.documents)
            digests = (tokenizer_fingerprint, source_fingerprint, checksum(mapped), self._content.hexdigest())
            self._file.seek(0)
            self._file.write(encode_header(Metadata(*counts, *digests)))
            self._file.close()
            publish(self._temporary, self.path)

    def __enter__(self) -> "TokenCacheWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        with contextlib.suppress(OSError):  # the rest of the buffer does not fit on a full disk
            self._file.close()
        discard(self._temporary)
