"""Rows of CSV and TSV files, and the sources of labeled rows."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

from orthotrain.data.column_files import stored_features
from orthotrain.data.instructions.stdlib_docstrings import documented_functions
from orthotrain.data.json_rows import MAX_ROW_BYTES, too_long
from orthotrain.data.labels.class_names import feature_names
from orthotrain.data.labels.rows import LabelColumns
from orthotrain.data.row_files import file_rows, holds_rows, open_file, reading, suffix_of
from orthotrain.data.sources import SourceKind, with_columns
from orthotrain.errors import ConfigurationError

STDLIB_PACKAGES = "python-stdlib-packages"
PACKAGES = ("asyncio", "email", "http", "importlib", "tkinter", "unittest", "xml")
"""Packages of the standard library that label the functions of the built-in source."""

_SEPARATORS = {".csv": ",", ".tsv": "\t"}


class TableRow(NamedTuple):
    """A row as it was read.

    Attributes:
        where: Place of the row, for messages.
        row: The row; an object, if the file is right.
        classes: Names of the classes of the dataset, if it has them.
        group: See `LabeledRow`.
    """

    where: str
    row: Any
    classes: tuple[str, ...] | None = None
    group: str | None = None


def table_rows(source: str | list[str], columns: LabelColumns) -> Iterator[TableRow]:
    """Yield the rows of a source, in an order that does not depend on the machine.

    Args:
        source: ``python-stdlib-packages``, a file, folder or glob of .csv .tsv .jsonl .json .parquet .arrow (.gz), a
            folder of ``save_to_disk``, a Hugging Face dataset ``org/name[:config][@split]``, or a list of these.
        columns: The columns of the rows; other columns are not read from files that can be read by columns.

    Raises:
        ConfigurationError: No such file, an unknown format, a damaged file, or a file without rows.
    """
    for name in _TABLES.names(source):
        if name == STDLIB_PACKAGES:
            yield from _stdlib_rows()
        elif (files := _TABLES.find_files(name)) is None:
            dataset = with_columns(_TABLES.load_dataset(name), columns.names)
            features = getattr(dataset, "features", None)
            own = feature_names(features.to_dict() if features else None, columns.label)
            yield from _numbered(enumerate(dataset, start=1), f"dataset {name!r}", own)
        else:
            for path in sorted(path for path, _ in files):
                rows = (
                    _csv_rows(path, columns.names) if suffix_of(path) in _SEPARATORS else file_rows(path, columns.names)
                )
                features = stored_features(path) if suffix_of(path) in (".parquet", ".arrow") else None
                yield from _numbered(rows, str(path), feature_names(features, columns.label))


def _is_table(path: Path) -> bool:
    return holds_rows(path) or suffix_of(path) in _SEPARATORS


_TABLES = SourceKind(STDLIB_PACKAGES, ".csv .tsv .jsonl .json .parquet .arrow (.gz)", _is_table)


def _numbered(rows: Any, where: str, classes: tuple[str, ...] | None = None) -> Iterator[TableRow]:
    empty = True
    for number, row in rows:
        empty = False
        yield TableRow(f"{where}, row {number}", row, classes)
    if empty:
        raise ConfigurationError(f"{where}: holds no row; give it some or leave it out")


def _csv_rows(path: Path, columns: list[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the rows of a file whose first line names the columns, each with its number, counted from 1.

    Quotes of a .tsv are characters of the text, as in the files of GLUE.
    """
    suffix = suffix_of(path)
    quoting: Literal[0, 3] = csv.QUOTE_NONE if suffix == ".tsv" else csv.QUOTE_MINIMAL
    remedy = (
        "a .tsv knows no quotes; write values with tabs or line ends to a .csv"
        if suffix == ".tsv"
        else "put quotes around a value that holds the separator"
    )
    with reading(path), open_file(path) as file:
        lines = _lines(file, str(path))
        table = csv.DictReader(lines, delimiter=_SEPARATORS[suffix], quoting=quoting, strict=True)
        try:
            names = list(table.fieldnames or ())
            if twice := [name for name in columns if names.count(name) > 1]:
                raise ConfigurationError(f"{path}: two columns have the name {twice[0]!r}; rename or remove one")
            for number, row in enumerate(table, start=1):
                if None in row or None in row.values():
                    raise ConfigurationError(
                        f"{path}, row {number} (line {table.line_num}): does not have {len(names)} values, as the "
                        f"first line has; {remedy}"
                    )
                yield number, row
        except csv.Error as error:
            raise ConfigurationError(
                f"{path}, line {table.reader.line_num}: not valid {suffix[1:]} ({error})"
            ) from error


def _lines(file: BinaryIO, where: str) -> Iterator[str]:
    number = 0
    while line := file.readline(MAX_ROW_BYTES + 1):
        number += 1
        if len(line) > MAX_ROW_BYTES:
            raise too_long(where, number)
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ConfigurationError(f"{where}, line {number}: not UTF-8 text ({error.reason})") from error


def _stdlib_rows() -> Iterator[TableRow]:
    """Yield functions of some packages of the standard library, without their docstrings, with the package as label."""
    for function in documented_functions():
        package = function.file.split("/")[0]
        if package in PACKAGES:
            where = f"{STDLIB_PACKAGES}, {function.file}, {function.name}"
            yield TableRow(where, {"text": function.source, "label": package}, group=function.group)
