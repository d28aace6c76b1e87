"""The prompts of the command line: texts, and the lines of files."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orthotrain.errors import ConfigurationError
from orthotrain.files.paths import check_regular_file, local_path

MOST_BYTES = 64 << 20
"""Largest file of prompts."""

_READ = (".txt", ".jsonl")
_FILES = (*_READ, ".json", ".csv", ".parquet", ".gz")
"""Suffixes that make a word the name of a file, also if there is no such file."""


@dataclass(frozen=True)
class PromptRow:
    """A row of a file of prompts.

    Args:
        value: The row: an object, or a list of messages.
        where: File and line, for messages.
    """

    value: Any
    where: str = "a prompt"


Prompt = str | list[dict[str, Any]] | PromptRow
"""A text, the messages of a conversation, or a row as of the training data."""


def read_prompts(given: Iterable[str]) -> Iterator[Prompt]:
    """Yield the prompts of the command line.

    Args:
        given: Texts, and names of files: ``.txt`` with a prompt a line, ``.jsonl`` with a text, or a row as of the
            training data without its response (``{"prompt": text}``, ``{"messages": [...], "tools": [...]}``) a line.
            The name of any file that exists is no text.

    Raises:
        ConfigurationError: A file cannot be read, has another suffix, or holds no prompt; or a line is not JSON.
    """
    for text in given:
        if not _names_file(text):
            yield text
            continue
        path, where = local_path(text, "--prompts"), f"file of prompts {text!r}"
        check_regular_file(path, "file of prompts")
        if (suffix := path.suffix.lower()) not in _READ:
            raise ConfigurationError(f"{where}: prompts are read from .txt and .jsonl; write one of them")
        if path.stat().st_size > MOST_BYTES:
            raise ConfigurationError(f"{where}: is larger than {MOST_BYTES >> 20} MiB; split it")
        try:
            lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines also splits inside a text
        except UnicodeDecodeError as error:
            raise ConfigurationError(f"{where}: is not UTF-8") from error
        if not any(map(str.strip, lines)):
            raise ConfigurationError(f"{where}: holds no prompt; write one a line")
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield line if suffix == ".txt" else _row(line, f"{where}, line {number}")


def _names_file(text: str) -> bool:
    if not text or len(text) > 4096 or "\n" in text or "\0" in text:
        return False
    try:
        if Path(text).expanduser().is_file():
            return True
    except (OSError, RuntimeError, ValueError):  # too long for a path, no such user
        return False
    return Path(text).suffix.lower() in _FILES and not any(map(str.isspace, text))


def _row(line: str, where: str) -> Prompt:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"{where}: is not JSON") from error
    if isinstance(row, dict) and row.keys() == {"prompt"} and isinstance(row["prompt"], str):
        return row["prompt"]
    return row if isinstance(row, str) else PromptRow(row, where)
