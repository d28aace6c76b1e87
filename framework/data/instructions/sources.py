"""Sources of instruction data: the standard library's docstrings, local files, Hugging Face datasets; as examples."""

import glob
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orthotrain.data.corpus.sources import files_in, glob_files
from orthotrain.data.instructions.docstrings import STDLIB_DOCSTRINGS, docstring_examples
from orthotrain.data.instructions.rows import Columns, Example, parse_row
from orthotrain.data.json_rows import MAX_ROW_BYTES
from orthotrain.data.row_files import ROW_SUFFIXES, file_rows, holds_rows, suffix_of
from orthotrain.errors import ConfigurationError
from orthotrain.files.paths import check_regular_file, local_path

_FORMATS = ".jsonl .json .parquet .jsonl.gz .json.gz"
_HUB_NAME = re.compile(r"(?P<path>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?(@(?P<split>[\w.\[\]:%+-]+))?")
_WORKS = f"give {STDLIB_DOCSTRINGS!r}, a file, folder or glob of {_FORMATS}, or a dataset 'org/name[:config][@split]'"


def read_examples(source: str | list[str], columns: Columns) -> Iterator[Example]:
    """Read every example of a source, in an order that does not depend on the machine.

    Args:
        source: ``python-stdlib-docstrings``, a file, folder or glob of .jsonl .json (.gz) .parquet, a Hugging Face
            dataset ``org/name[:config][@split]`` (split ``train`` unless given), or a list of these.
        columns: Keys of a row.

    Raises:
        ConfigurationError: Nothing there, a format that is not known, a file without rows, a row that cannot be used.
    """
    names = [source] if isinstance(source, str) else list(source)
    if not names:
        raise ConfigurationError(f"source is an empty list; {_WORKS}")
    for name in names:
        if name == STDLIB_DOCSTRINGS:
            yield from docstring_examples()
        elif paths := find_files(name):
            for path in paths:
                yield from _examples(file_rows(path), str(path), columns)
        else:
            yield from _examples(_hub_rows(name), f"dataset {name!r}", columns)


def count_rows(source: str | list[str]) -> int | None:
    """Return how many rows a source has, None where only reading all of it would tell.

    Args:
        source: As for :func:`read_examples`.

    Raises:
        ConfigurationError: As :func:`find_files`.
    """
    names = [source] if isinstance(source, str) else source
    files = [path for name in names for path in (() if name == STDLIB_DOCSTRINGS else find_files(name) or (None,))]
    counts = [None if path is None else _rows_in(path) for path in files]
    known = [count for count in counts if count is not None]
    return sum(known) if counts and len(known) == len(counts) and STDLIB_DOCSTRINGS not in names else None


def _rows_in(path: Path) -> int | None:
    """Count the rows of a file where that takes much less time than reading them; a damaged one is read and refused."""
    try:
        if path.suffix.lower() == ".parquet":
            import pyarrow.parquet

            return pyarrow.parquet.read_metadata(path).num_rows
        if path.suffix.lower() == ".jsonl":
            with path.open("rb") as file:
                return sum(bool(line.strip()) for line in iter(lambda: file.readline(MAX_ROW_BYTES), b""))
    except (OSError, ValueError):
        pass
    return None


def _examples(rows: Iterator[tuple[int, Any]], where: str, columns: Columns) -> Iterator[Example]:
    empty = True
    for number, row in rows:
        empty = False
        yield parse_row(row, f"{where}, row {number}", columns)
    if empty:
        raise ConfigurationError(f"{where}: holds no row; give it some or leave it out")


def find_files(name: str) -> list[Path]:
    """The files that a source names; none where it can only be a Hugging Face dataset.

    Raises:
        ConfigurationError: Nothing there, or a format that is not known.
    """
    path = local_path(name, "source")
    if path.is_dir():
        paths = sorted(file for file, _ in files_in(path, set()) if holds_rows(file))
        if not paths:
            raise ConfigurationError(f"source {name!r}: the folder holds no file of a known format: {_FORMATS}")
        return paths
    if path.exists():
        paths = [path]
    elif _HUB_NAME.fullmatch(name) and suffix_of(path) not in ROW_SUFFIXES:
        return []
    elif not glob.has_magic(name):
        raise ConfigurationError(f"source {name!r}: no such file or folder (looked in {Path.cwd()}); {_WORKS}")
    else:
        paths = glob_files(str(path))
        if not paths:
            raise ConfigurationError(f"source {name!r}: the glob matches no file (looked in {Path.cwd()}); {_WORKS}")
    for file in paths:
        if not holds_rows(file):
            raise ConfigurationError(f"source {str(file)!r}: unknown format {file.suffix!r}; known: {_FORMATS}")
        check_regular_file(file, "source")
    return paths


def _hub_rows(name: str) -> Iterator[tuple[int, Any]]:
    import datasets

    match = _HUB_NAME.fullmatch(name)
    assert match is not None
    try:
        rows = datasets.load_dataset(match["path"], match["config"], split=match["split"] or "train")
    except Exception as error:  # the hub client raises many unrelated types; each is the same problem to the user
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigurationError(
            f"source {name!r}: no such file or folder, and it cannot be loaded as a Hugging Face dataset ({reason}); "
            f"{_WORKS}"
        ) from error
    yield from enumerate(rows, start=1)
