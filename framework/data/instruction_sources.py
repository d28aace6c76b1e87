"""Sources of instruction data: the standard library's docstrings, local files, Hugging Face datasets; as examples."""

import glob
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from orthotrain.data.docstrings import STDLIB_DOCSTRINGS, docstring_examples
from orthotrain.data.instruction_rows import Columns, Example, parse_row
from orthotrain.data.readers import suffix_of
from orthotrain.errors import ConfigurationError

ROW_SUFFIXES = (".jsonl", ".json", ".parquet")
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
                yield from _examples(_file_rows(path), str(path), columns)
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
                return sum(not line.isspace() for line in file)
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
    path = Path(name).expanduser()
    if path.is_dir():
        paths = sorted(file for file in path.rglob("*") if file.is_file() and _holds_rows(file))
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
        paths = sorted(match for match in map(Path, glob.glob(str(path), recursive=True)) if match.is_file())
        if not paths:
            raise ConfigurationError(f"source {name!r}: the glob matches no file (looked in {Path.cwd()}); {_WORKS}")
    for file in paths:
        if not _holds_rows(file):
            raise ConfigurationError(f"source {str(file)!r}: unknown format {file.suffix!r}; known: {_FORMATS}")
    return paths


def _holds_rows(path: Path) -> bool:
    suffix = suffix_of(path)
    return suffix in ROW_SUFFIXES and not (suffix == ".parquet" and path.suffix.lower() == ".gz")


def _file_rows(path: Path) -> Iterator[tuple[int, Any]]:
    suffix = suffix_of(path)
    try:
        if suffix == ".parquet":
            yield from _parquet_rows(path)
            return
        with _open(path) as file:
            if suffix == ".jsonl":
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield number, _parse_json(line, f"{path}, row {number}")
            else:
                parsed = _parse_json(file.read(), str(path))
                yield from enumerate(parsed if isinstance(parsed, list) else [parsed], start=1)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ConfigurationError(f"{path}: damaged gzip file ({error}); write it again or leave it out") from error
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read ({error.strerror or error})") from error


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb")) if path.suffix.lower() == ".gz" else path.open("rb")


def _parse_json(raw: bytes, where: str) -> Any:
    if not raw.strip():
        raise ConfigurationError(f"{where}: holds no row; give it some or leave it out")
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"{where}: not valid JSON ({error})") from error


def _parquet_rows(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            batches = table.iter_batches(batch_size=1024)
            yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)
    except pyarrow.ArrowException as error:
        raise ConfigurationError(f"{path}: not a readable parquet file ({str(error).splitlines()[0]})") from error


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
