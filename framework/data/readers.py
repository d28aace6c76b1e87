"""File formats: from one file on disk to its documents, a bounded piece of text at a time."""

import codecs
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from orthotrain.errors import ConfigurationError

TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".py")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".json", ".parquet")
"""What can be read; all but ``.parquet`` also with ``.gz`` behind."""

PIECE_BYTES = 256 << 10
"""Longer texts come in pieces: tokenizing takes a hundred times their memory, and works on pieces in parallel."""

MAX_ROW_BYTES = 256 << 20


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


def suffix_of(path: Path) -> str:
    """The format's suffix, without ``.gz``: ``a.jsonl.gz`` gives ``.jsonl``."""
    name = path.name.lower()
    return Path(name.removesuffix(".gz")).suffix


def is_readable(path: Path) -> bool:
    """Whether the file's name says a format that `read_documents` knows."""
    suffix = suffix_of(path)
    return suffix in SUFFIXES and not (suffix == ".parquet" and path.name.lower().endswith(".gz"))


def read_documents(path: Path, name: str, text_column: str) -> Iterator[Document]:
    """Yield the documents of one file.

    Args:
        path: The file.
        name: The document's name when the file is one document.
        text_column: The key that holds the text in rows of jsonl, json and parquet.

    Yields:
        Non-empty documents; texts over 256 KiB come in pieces cut at line ends.

    Raises:
        ConfigurationError: Binary or undecodable content, bad JSON, a row without the text, a damaged archive.
    """
    suffix = suffix_of(path)
    try:
        if suffix == ".parquet":
            yield from _read_parquet(path, text_column)
            return
        with _open(path) as file:
            if suffix == ".jsonl":
                yield from _read_jsonl(file, path, text_column)
            elif suffix == ".json":
                yield from _read_json(file, path, text_column)
            else:
                yield from _read_text(file, path, name)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ConfigurationError(f"{path}: damaged gzip file ({error}); write it again or leave it out") from error
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read ({error.strerror or error})") from error


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb")) if path.name.lower().endswith(".gz") else path.open("rb")


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


def _read_jsonl(file: BinaryIO, path: Path, text_column: str) -> Iterator[Document]:
    number = 0
    while line := file.readline(MAX_ROW_BYTES + 1):
        number += 1
        if len(line) > MAX_ROW_BYTES:
            raise ConfigurationError(
                f"{path}, row {number}: longer than {MAX_ROW_BYTES:,} bytes; one JSON row per line"
            )
        if line.strip():
            yield from _row_document(_parse_json(line, f"{path}, row {number}"), text_column, str(path), number)


def _read_json(file: BinaryIO, path: Path, text_column: str) -> Iterator[Document]:
    parsed = _parse_json(file.read(), str(path))
    rows = parsed if isinstance(parsed, list) else [parsed]
    for number, row in enumerate(rows, start=1):
        yield from _row_document(row, text_column, str(path), number)


def _parse_json(raw: bytes, where: str) -> Any:
    try:
        return json.loads(raw)
    except RecursionError as error:
        raise ConfigurationError(f"{where}: JSON nested too deeply") from error
    except ValueError as error:
        raise ConfigurationError(f"{where}: not valid JSON ({error})") from error


def _read_parquet(path: Path, text_column: str) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            if text_column not in table.schema_arrow.names:
                raise missing_column(str(path), text_column, table.schema_arrow.names)
            number = 0
            for batch in table.iter_batches(batch_size=1024, columns=[text_column]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    yield from _row_document({text_column: text}, text_column, str(path), number)
    except pyarrow.ArrowException as error:
        raise ConfigurationError(f"{path}: not a readable parquet file ({str(error).splitlines()[0]})") from error


def missing_column(where: str, text_column: str, present: Any) -> ConfigurationError:
    """The error for a row or table without the text column."""
    return ConfigurationError(
        f"{where}: no column {text_column!r}; its columns are {sorted(map(str, present))}; set text_column"
    )


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
