"""Documents of files and rows, a bounded piece of text at a time."""

import codecs
import hashlib
from codecs import BOM_UTF8
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from orthotrain.data.row_files import (
    ROW_SUFFIXES,
    check_text,
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
"""Formats that can be read; all but ``.parquet`` and ``.arrow`` also with ``.gz`` at the end."""

PIECE_BYTES = 256 << 10
"""Longer texts come in pieces: tokenizing takes a hundred times their memory, and pieces are tokenized in parallel."""


@dataclass(frozen=True)
class Document:
    """A text, or one piece of a text too long to hold at once.

    Attributes:
        name: Name of the file, relative and with ``/``; ``None`` for rows, which have no name.
        text: The characters.
        complete: Whether the document ends here; ``False`` means that its next piece follows.
        group: The key of all documents that belong on one side of a split with this one; ``None`` if there are none.
    """

    name: str | None
    text: str
    complete: bool = True
    group: str | None = None

    @property
    def key(self) -> str:
        """The key that decides the document's split: the same for each of its pieces, and on every machine."""
        if self.group is not None:
            return self.group
        return self.text if self.name is None else self.name


def is_readable(path: Path) -> bool:
    """Return whether the file's suffix is a format that `read_documents` knows."""
    return suffix_of(path) in TEXT_SUFFIXES or holds_rows(path)


def _ignore(where: str) -> None:
    """Take notice of a row without text, and do nothing."""


def read_documents(
    path: Path, name: str, text_column: str, without_text: Callable[[str], None] = _ignore
) -> Iterator[Document]:
    """Yield the documents of one file.

    Args:
        path: The file.
        name: The document's name when the file is one document.
        text_column: The key that holds the text in rows of jsonl, json, parquet and arrow.
        without_text: Called with the place of each row whose text is null; such a row is left out.

    Yields:
        Non-empty documents; texts over 256 KiB come in pieces cut at line ends.

    Raises:
        ConfigurationError: Binary or undecodable content, a row without the text, or a file that `file_rows` refuses.
    """
    if suffix_of(path) in ROW_SUFFIXES:
        yield from row_documents(file_rows(path, [text_column]), text_column, str(path), without_text)
        return
    with reading(path), open_file(path) as file:
        yield from _read_text(file, path, name)


def _read_text(file: BinaryIO, path: Path, name: str) -> Iterator[Document]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, held = 0, ""
    if file.peek(len(BOM_UTF8)).startswith(BOM_UTF8):  # type: ignore[attr-defined]
        offset = len(file.read(len(BOM_UTF8)))
    empty = not file.peek(1)  # type: ignore[attr-defined]
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
    if not empty:
        yield Document(name, held)


def _decode(decoder: Any, block: bytes, path: Path, offset: int, final: bool = False) -> str:
    pending = len(decoder.getstate()[0])
    try:
        return decoder.decode(block, final)
    except UnicodeDecodeError as error:
        raise ConfigurationError(
            f"{path}: not UTF-8 text (byte {offset - pending + error.start}: {error.reason}); convert it to UTF-8"
        ) from error


def row_documents(
    rows: Iterable[tuple[int, Any]], text_column: str, where: str, without_text: Callable[[str], None] = _ignore
) -> Iterator[Document]:
    """Yield the documents of the rows of a file or a Hugging Face dataset.

    Args:
        rows: Pairs of number and row.
        text_column: The key that holds the text.
        where: The name of the file or the dataset, for messages.
        without_text: Called with the place of each row whose text is null; such a row is left out.

    Raises:
        ConfigurationError: A row without the key, or whose value is no text.
    """
    for number, row in rows:
        if not isinstance(row, dict):
            raise ConfigurationError(
                f"{where}, row {number}: expected an object with {text_column!r}, found {type(row).__name__}"
            )
        if text_column not in row:
            raise missing_column(f"{where}, row {number}", text_column, row)
        if row[text_column] is None:
            without_text(f"{where}, row {number}")
            continue
        text = check_text(row[text_column], f"{where}, row {number}, {text_column!r}")
        if len(text) > PIECE_BYTES:
            name = f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
            for end in range(PIECE_BYTES, len(text) + PIECE_BYTES, PIECE_BYTES):
                yield Document(name, text[end - PIECE_BYTES : end], complete=end >= len(text))
        elif text:
            yield Document(None, text)
