"""Sources of instruction data: docstrings of the standard library, local files, Hugging Face datasets; as examples."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from orthotrain.data.instructions.examples import Columns, Example, parse_row
from orthotrain.data.instructions.stdlib_docstrings import STDLIB_DOCSTRINGS, docstring_examples
from orthotrain.data.json_rows import MAX_ROW_BYTES
from orthotrain.data.row_files import file_rows, holds_rows
from orthotrain.data.sources import SourceKind, with_columns
from orthotrain.errors import ConfigurationError

_ROWS = SourceKind(STDLIB_DOCSTRINGS, ".jsonl .json .parquet .arrow .jsonl.gz .json.gz", holds_rows)
_KNOWN_KEYS = (
    *("completion", "instruction", "input", "output", "conversations", "conversation", "system", "system_prompt"),
    *("tools", "functions", "history", "chat_template_kwargs"),
)
"""Keys of rows that `parse_row` may read beside those of `Columns`; other columns of a file are not read."""


def read_examples(source: str | list[str], columns: Columns) -> Iterator[Example]:
    """Yield the examples of a source, in an order that does not depend on the machine.

    Args:
        source: ``python-stdlib-docstrings``, a file, folder or glob of .jsonl .json (.gz) .parquet .arrow, a folder
            of ``save_to_disk``, a Hugging Face dataset ``org/name[:config][@split]`` (split ``train`` by default), or
            a list of these.
        columns: Keys of a row.

    Raises:
        ConfigurationError: No such file, an unknown format, a file without rows, or a row that cannot be used.
    """
    wanted = (columns.prompt, columns.response, columns.messages, *_KNOWN_KEYS)
    for name in _ROWS.names(source):
        if name == STDLIB_DOCSTRINGS:
            yield from docstring_examples()
        elif (files := _ROWS.find_files(name)) is None:
            rows = with_columns(_ROWS.load_dataset(name), wanted)
            yield from _examples(enumerate(rows, start=1), f"dataset {name!r}", columns)
        else:
            for path in sorted(path for path, _ in files):
                yield from _examples(file_rows(path, wanted), str(path), columns)


def _examples(rows: Iterable[tuple[int, Any]], where: str, columns: Columns) -> Iterator[Example]:
    empty = True
    for number, row in rows:
        empty = False
        yield parse_row(row, f"{where}, row {number}", columns)
    if empty:
        raise ConfigurationError(f"{where}: holds no row; give it some or leave it out")


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
