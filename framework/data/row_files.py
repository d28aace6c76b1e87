"""Files of rows (JSON Lines, JSON, Parquet, Arrow, compressed or not): read one row at a time."""

import codecs
import contextlib
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from orthotrain.data.column_files import FREE_EXPANSION_BYTES, MAX_EXPANSION, arrow_rows, parquet_rows
from orthotrain.data.json_rows import MAX_ROW_BYTES, invalid_json, json_rows, too_long
from orthotrain.errors import ConfigurationError
from orthotrain.files.paths import check_regular_file

ROW_SUFFIXES = (".jsonl", ".json", ".parquet", ".arrow")
_COLUMN_READERS = {".parquet": parquet_rows, ".arrow": arrow_rows}


def suffix_of(path: Path) -> str:
    """Return the suffix of the format, without ``.gz``: ``a.jsonl.gz`` gives ``.jsonl``."""
    name = path.name.lower()
    return Path(name.removesuffix(".gz")).suffix


def holds_rows(path: Path) -> bool:
    """Return whether the file's suffix is a format that `file_rows` reads."""
    return suffix_of(path) in ROW_SUFFIXES and not path.name.lower().endswith((".parquet.gz", ".arrow.gz"))


def file_rows(path: Path, columns: Sequence[str] | None = None) -> Iterator[tuple[int, Any]]:
    """Yield the rows of a file, each with its number, counted from 1. In JSON Lines, empty lines count too.

    A file named ``.json`` may hold an array of rows, JSON Lines or one row.

    Args:
        path: The file.
        columns: The columns to read from a Parquet or Arrow file; by default all. The others are ``None``.

    Raises:
        ConfigurationError: No regular file, a damaged file, bad JSON, a row longer than 32 MiB, or a gzip file or a
            Parquet column that expands to more than 100 times its size.
    """
    suffix = suffix_of(path)
    with reading(path):
        if suffix in _COLUMN_READERS:
            yield from enumerate(_COLUMN_READERS[suffix](path, columns), start=1)
            return
        with open_file(path) as file:
            yield from _lines(file, str(path)) if suffix == ".jsonl" else json_rows(file, str(path))


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn the errors of a damaged or unreadable file into one clear error."""
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ConfigurationError(f"{path}: damaged gzip file ({error}); write it again or leave it out") from error
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read ({error.strerror or error})") from error


def open_file(path: Path) -> BinaryIO:
    """Open a regular file, decompressed if its name ends with ``.gz``.

    Raises:
        ConfigurationError: No regular file. Reading raises it if the file expands to more than 100 times its size.
    """
    check_regular_file(path, "source")
    file = path.open("rb")
    return io.BufferedReader(_GzipReader(file, path), 1 << 20) if path.name.lower().endswith(".gz") else file


class _GzipReader(io.RawIOBase):
    """Decompresses a file until the text is more than `MAX_EXPANSION` times as large as the compressed bytes."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self._path = file, path
        self._text = gzip.GzipFile(fileobj=file, mode="rb")
        self._expanded = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        read = self._text.readinto(buffer)
        self._expanded += read
        if self._expanded > FREE_EXPANSION_BYTES and self._expanded > MAX_EXPANSION * self._file.tell():
            raise ConfigurationError(
                f"{self._path}: expands to more than {MAX_EXPANSION} times its size ({self._expanded:,} bytes from "
                f"{self._file.tell():,}), as damaged and hostile files do; decompress it if you trust it"
            )
        return read

    def close(self) -> None:
        if not self.closed:
            self._text.close()
            self._file.close()
        super().close()


def _lines(file: BinaryIO, where: str) -> Iterator[tuple[int, Any]]:
    number, begun = 0, False
    while line := file.readline(MAX_ROW_BYTES + 1):
        number += 1
        beginning = line.removeprefix(codecs.BOM_UTF8).lstrip()[:1]
        if beginning == b"[" and not begun:
            raise ConfigurationError(
                f"{where}, row {number}: begins with '[', as a JSON array does; write one row in each line, or let the "
                "name of the file end with .json instead of .jsonl"
            )
        if len(line) > MAX_ROW_BYTES:
            raise too_long(where, number)
        if beginning:
            begun = True
            try:
                yield number, json.loads(line)
            except (RecursionError, ValueError) as error:
                raise invalid_json(where, number, error) from error


def missing_column(where: str, column: str, present: Any) -> ConfigurationError:
    """Return the error for a row or a table without the text column."""
    return ConfigurationError(
        f"{where}: no column {column!r}; its columns are {sorted(map(str, present))}; set text_column"
    )


def check_text(value: Any, where: str) -> str:
    """Return a value of a row that is text.

    Args:
        value: The value. Bytes are text in UTF-8.
        where: File, row and key, for messages.

    Raises:
        ConfigurationError: The value is no string, or UTF-8 cannot store it.
    """
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise ConfigurationError(
                f"{where}: is not UTF-8 text (byte {error.start}: {error.reason}); convert it, or remove the row"
            ) from error
    if not isinstance(value, str):
        raise ConfigurationError(
            f"{where}: must be a string, found {type(value).__name__}; make it text or name another column"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ConfigurationError(
            f"{where}: holds a lone surrogate at character {error.start}, which UTF-8 cannot store; remove it"
        ) from error
    return value
