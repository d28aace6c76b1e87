"""Files of columns (Parquet, Arrow): the rows of the columns that are needed, in bounded memory."""

import json
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from orthotrain.console.limited_process import first_line
from orthotrain.errors import ConfigurationError
from orthotrain.files.paths import check_regular_file

MAX_EXPANSION = 100
"""Most times that a gzip file or a Parquet column may expand: text and JSON seldom expand more than 20 times."""
FREE_EXPANSION_BYTES = 16 << 20
"""Below this size, any expansion is allowed."""

_BATCH_ROWS, _BATCH_BYTES = 1024, 1 << 30
_RECORD_BATCH, _DICTIONARY_BATCH = 3, 2


def parquet_rows(path: Path, wanted: Sequence[str] | None) -> Iterator[dict[str, Any]]:
    """Yield the rows of a Parquet file.

    Args:
        path: The file.
        wanted: Columns to read; ``None`` reads all. The other columns of the file are ``None`` in each row.

    Raises:
        ConfigurationError: A damaged file, a value that Python cannot hold, or a column that expands too much.
    """
    import pyarrow
    import pyarrow.parquet

    check_regular_file(path, "source")
    try:
        # read page by page: a row group may be larger than memory
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as table:
            names = table.schema_arrow.names
            columns = _chosen(names, wanted)
            batches = table.iter_batches(batch_size=_batch_rows(table.metadata, path, columns), columns=columns)
            yield from _bounded_rows(batches, path, names)
    except pyarrow.ArrowException as error:
        raise ConfigurationError(f"{path}: not a readable parquet file ({first_line(error)})") from error


def arrow_rows(path: Path, wanted: Sequence[str] | None) -> Iterator[dict[str, Any]]:
    """Yield the rows of an Arrow file (of ``save_to_disk``, or Feather without compression), as `parquet_rows` does.

    Raises:
        ConfigurationError: A damaged or compressed file, or a value that Python cannot hold.
    """
    import pyarrow
    import pyarrow.ipc

    check_regular_file(path, "source")
    try:
        with pyarrow.memory_map(str(path)) as file:
            start = 8 if file.read(6) == b"ARROW1" else 0
            _check_uncompressed(file, start, path)
            file.seek(start)
            names = pyarrow.ipc.open_stream(file).schema.names
            fields = [names.index(name) for name in _chosen(names, wanted)]
            file.seek(start)
            options = pyarrow.ipc.IpcReadOptions(included_fields=sorted(fields))
            yield from _bounded_rows(_pieces(pyarrow.ipc.open_stream(file, options=options), path), path, names)
    except ConfigurationError:
        raise
    except (pyarrow.ArrowException, struct.error, ValueError, IndexError) as error:  # of a damaged header
        raise ConfigurationError(f"{path}: not a readable arrow file ({first_line(error)})") from error


def stored_features(path: Path) -> dict[str, Any]:
    """Return the features of integer columns that ``datasets`` wrote into a file; none for other or damaged files."""
    import pyarrow
    import pyarrow.ipc
    import pyarrow.parquet

    try:
        if path.name.lower().endswith(".parquet"):
            schema = pyarrow.parquet.read_schema(path)
        else:
            with pyarrow.memory_map(str(path)) as file:
                file.seek(8 if file.read(6) == b"ARROW1" else 0)
                schema = pyarrow.ipc.open_stream(file).schema
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        # a program that changes a column may keep its features
        return {name: features[name] for name in schema.names if "int" in str(schema.field(name).type)}
    except (pyarrow.ArrowException, OSError, LookupError, TypeError, ValueError, RecursionError):
        return {}  # who reads the rows names the fault


def _chosen(names: list[str], wanted: Sequence[str] | None) -> list[str]:
    """Return the columns to read. If a file has none of the wanted columns, all are read, for the message."""
    return [name for name in names if wanted is None or name in wanted] or names


def _pieces(batches: Iterable[Any], path: Path) -> Iterator[Any]:
    for batch in batches:
        for field in batch.schema:
            if not _is_plain(field.type):
                raise ConfigurationError(
                    f"{path}: column {field.name!r} has type {field.type}, which is not read from Arrow files; write "
                    "the file as Parquet"
                )
        batch.validate(full=True)
        rows = max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(1, batch.nbytes)))
        yield from (batch.slice(start, rows) for start in range(0, batch.num_rows, rows))


def _is_plain(kind: Any) -> bool:
    """Return whether values of a type do not share memory, so that few bytes cannot be many values."""
    shared = ("dictionary", "run_end_encoded", "list_view", "large_list_view", "string_view", "binary_view")
    return not str(kind).startswith(shared) and all(_is_plain(kind.field(n).type) for n in range(kind.num_fields))


def _check_uncompressed(file: Any, start: int, path: Path) -> None:
    """Refuse compressed batches, which may expand without bound; ``datasets`` writes none."""
    import pyarrow.ipc

    file.seek(start)
    for message in pyarrow.ipc.MessageReader.open_stream(file):
        table = bytes(message.metadata)
        root = struct.unpack_from("<I", table)[0]
        kind = table[_field(table, root, 1)]
        if kind not in (_RECORD_BATCH, _DICTIONARY_BATCH):
            continue
        batch = _target(table, _field(table, root, 2))
        if kind == _DICTIONARY_BATCH:
            batch = _target(table, _field(table, batch, 1))
        if _field(table, batch, 3):
            raise ConfigurationError(f"{path}: a compressed Arrow file is not read; write it as Parquet")


def _field(table: bytes, start: int, index: int) -> int:
    """Return the position of a field of a flatbuffers table (Message.fbs of Arrow); 0 if the field is not there."""
    places = start - struct.unpack_from("<i", table, start)[0]
    if 4 + 2 * index >= struct.unpack_from("<H", table, places)[0]:
        return 0
    offset = struct.unpack_from("<H", table, places + 4 + 2 * index)[0]
    return start + offset if offset else 0


def _target(table: bytes, position: int) -> int:
    return position + struct.unpack_from("<I", table, position)[0]


def _bounded_rows(batches: Iterable[Any], path: Path, names: list[str]) -> Iterator[dict[str, Any]]:
    expanded, size, first = 0, path.stat().st_size, 1
    for batch in batches:
        expanded += batch.nbytes + batch.num_rows  # nulls may take no bytes
        if expanded > max(FREE_EXPANSION_BYTES, MAX_EXPANSION * size):  # a dictionary stores a repeated value once
            raise ConfigurationError(
                f"{path}: expands to more than {MAX_EXPANSION} times its size, because it repeats long values; "
                "write it without a dictionary if you trust it"
            )
        columns = [_values(batch.column(name), f"{path}, column {name!r}", first) for name in batch.schema.names]
        for row in zip(*columns, strict=True):
            yield {**dict.fromkeys(names), **dict(zip(batch.schema.names, row, strict=True))}
        first += batch.num_rows


def _values(column: Any, where: str, first: int) -> list[Any]:
    """Return the values of a column. Bytes are text, and text that is not UTF-8 stays bytes, for `check_text`."""
    import pyarrow

    try:
        return [_text(value) if isinstance(value, bytes) else value for value in column.to_pylist()]
    except (ValueError, OverflowError, KeyError, pyarrow.ArrowException) as error:
        if isinstance(error, UnicodeDecodeError) and column.type in (pyarrow.string(), pyarrow.large_string()):
            return _values(column.cast(pyarrow.large_binary()), where, first)
        raise ConfigurationError(
            f"{where}, rows {first} to {first + len(column) - 1}: has a value that Python cannot hold "
            f"({first_line(error)}); correct the value or drop the column"
        ) from error


def _text(value: bytes) -> str | bytes:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value


def _batch_rows(metadata: Any, path: Path, columns: list[str]) -> int:
    """Return how many rows to read at once: one value may fill its column, and a dictionary repeats values."""
    largest = 1
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        chunks = [group.column(index) for index in range(group.num_columns)]
        wanted = [chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] in columns]
        for chunk in wanted:
            size, packed = chunk.total_uncompressed_size, chunk.total_compressed_size
            if size > max(FREE_EXPANSION_BYTES, MAX_EXPANSION * packed):
                raise ConfigurationError(
                    f"{path}, row group {number + 1}: column {chunk.path_in_schema!r} expands to more than "
                    f"{MAX_EXPANSION} times its size ({size:,} bytes from {packed:,}); write it without compression "
                    "if you trust it"
                )
        largest = max(largest, sum(chunk.total_uncompressed_size for chunk in wanted))
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES // largest))
