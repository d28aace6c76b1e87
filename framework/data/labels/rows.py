"""A labeled row of text: its columns, and the checks of its text and of its label."""

import ast
import contextlib
import json
import math
import re
from dataclasses import dataclass
from types import UnionType
from typing import Any, Literal

from orthotrain.data.instructions.row_faults import RowFault
from orthotrain.data.row_files import check_text
from orthotrain.errors import ConfigurationError

_WHOLE_FLOAT = re.compile(r"-?[0-9]{1,18}\.0+")

LabelTask = Literal["sequence_classification", "token_classification", "regression"]


@dataclass(frozen=True)
class LabelColumns:
    """Keys of a row.

    Attributes:
        text: Key of the text; of a list of words for ``token_classification``.
        pair: Key of a second text; None for single texts.
        label: Key of the label; of a list of labels for ``token_classification``.
    """

    text: str
    pair: str | None
    label: str

    @property
    def names(self) -> list[str]:
        """All keys."""
        return [name for name in (self.text, self.pair, self.label) if name is not None]


@dataclass(frozen=True)
class LabeledRow:
    """A row.

    Attributes:
        where: Place of the row, for messages.
        text: The text; of ``token_classification``, its words joined by spaces.
        pair: The second text.
        labels: Names of classes, one for a text or one for each word; a number for a regression.
        words: First and last character (exclusive) of each word in the text.
        group: The key of all rows that belong on one side of a split with this one; ``None`` if there are none.
    """

    where: str
    text: str
    pair: str | None
    labels: list[str] | list[float]
    words: list[tuple[int, int]]
    group: str | None = None

    @property
    def key(self) -> str:
        """The group or else the content, which decides the split of the row."""
        if self.group is not None:
            return self.group
        return "\0".join([self.text, self.pair or "", *map(str, self.labels)])


def parse_row(row: Any, where: str, columns: LabelColumns, task: LabelTask) -> LabeledRow:
    """Return a row after checks.

    Raises:
        RowFault: No object, or a label that does not fit the task; the message names the row and the column.
        ConfigurationError: A missing column, or a value that is no text.
    """
    if not isinstance(row, dict):
        raise RowFault(f"{where}: must be an object with columns, found {type(row).__name__}")
    for argument, column in (("text", columns.text), ("pair", columns.pair), ("label", columns.label)):
        if column is not None and column not in row:
            present = sorted(map(str, row))
            raise ConfigurationError(f"{where}: no column {column!r}; it has {present}; set {argument}_column")
    place = f"{where}, {columns.label!r}"
    if task == "token_classification":
        return _words_row(row, where, columns)
    text = check_text(row[columns.text], f"{where}, {columns.text!r}")
    pair = None if columns.pair is None else check_text(row[columns.pair], f"{where}, {columns.pair!r}")
    if task == "regression":
        return LabeledRow(where, text, pair, [_number(row[columns.label], place)], [])
    return LabeledRow(where, text, pair, [_class(row[columns.label], place)], [])


def _words_row(row: dict[str, Any], where: str, columns: LabelColumns) -> LabeledRow:
    words = _listed(row[columns.text], f"{where}, {columns.text!r}", str)
    labels = _listed(row[columns.label], f"{where}, {columns.label!r}", str | int | float)
    if len(words) != len(labels):
        raise RowFault(
            f"{where}: {len(words)} words in {columns.text!r} and {len(labels)} labels in {columns.label!r}; "
            "give one label for each word"
        )
    texts = [check_text(word, f"{where}, {columns.text!r}") for word in words]
    spans, start = [], 0
    for text in texts:
        spans.append((start, start + len(text)))
        start += len(text) + 1
    names = [_class(label, f"{where}, {columns.label!r}") for label in labels]
    return LabeledRow(where, " ".join(texts), None, names, spans)


def _listed(value: Any, place: str, kinds: type | UnionType) -> list[Any]:
    """Return a list of words or labels. Text is a list as JSON or Python writes it, or else is cut at white space."""
    if isinstance(value, str):
        value = _written_list(value.strip(), place, kinds) or value.split()
    if not isinstance(value, list) or not value:
        raise RowFault(f"{place}: must be a list, or text with spaces between its items")
    return value


def _written_list(text: str, place: str, kinds: type | UnionType) -> list[Any] | None:
    """Return the list that a text spells, as pandas writes lists to CSV; None for other text."""
    if not (text.startswith("[") and text.endswith("]")):
        return None
    found: Any = None
    for parse in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            found = parse(text)
            # Python joins 'a' 'b', which numpy writes for two words
            if isinstance(found, list) and (parse is json.loads or repr(found) == text):
                break
            found = None
    if found is not None and all(isinstance(item, kinds) for item in found):
        return found
    if kinds is not str or text[1:].lstrip()[:1] in ("'", '"'):
        raise RowFault(f'{place}: {text!r:.60} looks like a list, but is none of JSON; write ["a", "b"], or a b')
    return None  # a word such as [laughs]


def _class(value: Any, place: str) -> str:
    """Return the name of a class: text without the white space around it, or a whole number as text."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a column of integers with gaps is a column of floats in pandas
    if not isinstance(value, str | int) or not str(value).strip():
        raise RowFault(
            f"{place}: a class must be text or a whole number, found {value!r:.40}; numbers of any size need task: "
            "regression"
        )
    return check_text(class_text(str(value)), place)


def class_text(name: str) -> str:
    """Return the text of a class without white space around it, and a whole number without ``.0``."""
    name = name.strip()
    return str(int(name.partition(".")[0])) if _WHOLE_FLOAT.fullmatch(name) else name


def _number(value: Any, place: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise RowFault(f"{place}: must be a finite number, found {value!r:.40}")
    return number
