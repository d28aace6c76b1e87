"""File formats: from one file on disk to its documents, a bounded piece of text at a time."""

import codecs
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from orthotrain.data.row_files import (
    ROW_SUFFIXES,
    file_rows,
    holds_rows,
    missing_column,
    open_file,
    reading,
    suffix_of,
)
from orthotrain.errors import ConfigurationError

TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".py")
SUFFIXES = (*TEXT_SUFFIXES, *ROW_SUFFIXES)
"""What can be read; all but ``.parquet`` also with ``.gz`` behind."""

PIECE_BYTES = 256 << 10
"""Longer texts come in pieces: tokenizing takes a hundred times their memory, and works on pieces in parallel."""


@dataclass(frozen=True)
class Document:
    """A text, or one piece of a text too long to hold at once.

    Attributes:
        name: Where it came from, relative and with ``/``; ``None`` for rows, which are known by their content.
        text: The characters.
        complete: Whether the document ends here; ``False`` says that its next piece follows.
    """

    name: str | None
    text: str
    complete: bool = True

    @property
    def key(self) -> str:
        """What decides the document's split: the same for every piece of it, and on every machine."""
        return self.text if self.name is None else self.name


def is_readable(path: Path) -> bool:
    """Whether the file's name says a format that `read_documents` knows."""
    return suffix_of(path) in TEXT_SUFFIXES or holds_rows(path)


def read_documents(path: Path, name: str, text_column: str) -> Iterator[Document]:
    """Yield the documents of one file.

    Args:
        path: The file.
        name: The document's name when the file is one document.
        text_column: The key that holds the text in rows of jsonl, json and parquet.

    Yields:
        Non-empty documents; texts over 256 KiB come in pieces cut at line ends.

    Raises:
        ConfigurationError: Binary or undecodable content, a row without the text, and what `file_rows` refuses.
    """
    if suffix_of(path) in ROW_SUFFIXES:
        for number, row in file_rows(path, text_column):
            yield from _row_document(row, text_column, str(path), number)
        return
    with reading(path), open_file(path) as file:
        yield from _read_text(file, path, name)


def _read_text(file: BinaryIO, path: Path, name: str) -> Iterator[Document]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, held = 0, ""
    while block := file.read(PIECE_BYTES):
        if (nul := block.find(b"\0")) >= 0:
            raise ConfigurationError(
                f"{path}: binary file (a NUL byte at offset {offset + nul}); text sources must be UTF-8 text"
            )
        held += _decode(decoder, block, path, offset)
        offset += len(block)
        if len(block) == PIECE_BYTES and (cut := held.rfind("\n") + 1 or len(held)):
            yield Document(name, held[:cut], complete=False)
            held = held[cut:]
    held += _decode(decoder, b"", path, offset, final=True)
    if offset:
        yield Document(name, held)


def _decode(decoder: Any, block: bytes, path: Path, offset: int, final: bool = False) -> str:
    pending = len(decoder.getstate()[0])
    try:
        return decoder.decode(block, final)
    except UnicodeDecodeError as error:
        raise ConfigurationError(
            f"{path}: not UTF-8 text (byte {offset - pending + error.start}: {error.reason}); convert it to UTF-8"
        ) from error


def _row_document(row: Any, text_column: str, whole: str, number: int) -> Iterator[Document]:
    if not isinstance(row, dict):
        raise ConfigurationError(
            f"{whole}, row {number}: expected an object with {text_column!r}, found {type(row).__name__}"
        )
    if text_column not in row:
        raise missing_column(f"{whole}, row {number}", text_column, row)
    text = row[text_column]
    if not isinstance(text, str):
        raise ConfigurationError(
            f"{whole}, row {number}: {text_column!r} must be a string, found {type(text).__name__}; set text_column"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigurationError(
            f"{whole}, row {number}: {text_column!r} holds a lone surrogate at character {error.start}, which UTF-8 "
            "cannot store; remove it"
        ) from error
    if len(text) > PIECE_BYTES:
        name = f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
        for end in range(PIECE_BYTES, len(text) + PIECE_BYTES, PIECE_BYTES):
            yield Document(name, text[end - PIECE_BYTES : end], complete=end >= len(text))
    elif text:
        yield Document(None, text)


def row_documents(rows: Any, text_column: str, where: str) -> Iterator[Document]:
    """Yield the documents of an iterable of mappings, such as a Hugging Face dataset.

    Args:
        rows: Mappings.
        text_column: The key that holds the text.
        where: The name of the whole, for error messages.
    """
    for number, row in enumerate(rows, start=1):
        yield from _row_document(row, text_column, where, number)
