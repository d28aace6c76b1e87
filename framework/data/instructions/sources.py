"""Sources of instruction data: docstrings of the standard library, local files, Hugging Face datasets; as examples."""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from orthotrain.data.instructions.examples import Columns, Example, keys_of_rows, parse_row
from orthotrain.data.instructions.row_faults import RowFaults
from orthotrain.data.instructions.stdlib_docstrings import STDLIB_DOCSTRINGS, docstring_examples
from orthotrain.data.json_rows import MAX_ROW_BYTES
from orthotrain.data.row_files import file_rows, holds_rows
from orthotrain.data.sources import SourceKind, with_columns
from orthotrain.errors import ConfigurationError

_ROWS = SourceKind(STDLIB_DOCSTRINGS, ".jsonl .json .parquet .arrow .jsonl.gz .json.gz", holds_rows)


def read_examples(source: str | list[str], columns: Columns, faults: RowFaults | None = None) -> Iterator[Example]:
    """Yield the examples of a source, in an order that does not depend on the machine.

    Args:
        source: ``python-stdlib-docstrings``, a file, folder or glob of .jsonl .json (.gz) .parquet .arrow, a folder
            of ``save_to_disk``, a Hugging Face dataset ``org/name[:config][@split]`` (split ``train`` by default), or
            a list of these.
        columns: Keys of a row.
        faults: Collects the faults of rows, which are left out. Without it, the first fault is raised.

    Raises:
        ConfigurationError: No such file, an unknown format, a file without rows, or a row that cannot be used.
    """
    wanted = keys_of_rows(columns)
    for name in _ROWS.names(source):
        if name == STDLIB_DOCSTRINGS:
            yield from docstring_examples()
        elif (files := _ROWS.find_files(name)) is None:
            rows = with_columns(_ROWS.load_dataset(name), wanted)
            numbered = ((number, _typed_row(row)) for number, row in enumerate(rows, start=1))
            yield from _examples(numbered, f"dataset {name!r}", columns, faults)
        else:
            for path in sorted(path for path, _ in files):
                typed = path.suffix.lower() in (".parquet", ".arrow")
                rows = ((number, _typed_row(row) if typed else row) for number, row in file_rows(path, wanted))
                yield from _examples(rows, str(path), columns, faults)


def _examples(
    rows: Iterable[tuple[int, Any]], where: str, columns: Columns, faults: RowFaults | None
) -> Iterator[Example]:
    empty = True
    for number, row in rows:
        empty = False
        place = f"{where}, row {number}"
        example = None
        with faults.collect(place) if faults is not None else contextlib.nullcontext():
            example = parse_row(row, place, columns)
        if example is not None:
            yield example
    if empty:
        raise ConfigurationError(f"{where}: holds no row; give it some or leave it out")


def _without_nulls(value: Any) -> Any:
    """Return the value of a typed column without keys that have no value, also inside lists and objects.

    A column of Parquet gives each object the keys of all objects of the column.
    """
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _typed_row(row: dict[str, Any]) -> dict[str, Any]:
    return {key: _without_nulls(value) for key, value in row.items()}


def count_rows(source: str | list[str]) -> int | None:
    """Return the number of rows of a source; ``None`` if counting would take as long as reading.

    Raises:
        ConfigurationError: No such file, or an unknown format.
    """
    counts: list[int | None] = []
    for name in _ROWS.names(source):
        files = None if name == STDLIB_DOCSTRINGS else _ROWS.find_files(name)
        counts += [None] if files is None else [_count_file(path) for path, _ in files]
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def _count_file(path: Path) -> int | None:
    try:
        if path.suffix.lower() == ".parquet":
            import pyarrow.parquet

            return pyarrow.parquet.read_metadata(path).num_rows
        if path.suffix.lower() == ".jsonl":
            with path.open("rb") as file:
                return sum(bool(line.strip()) for line in iter(lambda: file.readline(MAX_ROW_BYTES), b""))
    except (OSError, ValueError):  # a damaged file: reading its rows tells the user
        pass
    return None
