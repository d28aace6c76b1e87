"""Rows of JSON text of any size: an array of rows, JSON Lines or one row, parsed in bounded memory."""

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from orthotrain.errors import ConfigurationError
from orthotrain.files.paths import json_failure

MAX_ROW_BYTES = 32 << 20
"""Longest row: parsing takes up to 25 times the bytes of a row, so this bounds the memory of a reader."""

_BLOCK_BYTES = 1 << 20
_SPACE = re.compile(r"[ \t\r\n]*")
_MAY_CONTINUE = re.compile(r"[-+.\w]*\Z")
_DECODER = json.JSONDecoder()


def json_rows(file: BinaryIO, where: str) -> Iterator[tuple[int, Any]]:
    """Yield the rows of a JSON file one by one, each with its number, counted from 1.

    A file that begins with ``[`` is one array, whose elements are the rows. Any other file is a sequence of rows, as in
    JSON Lines; a single object is a sequence of one.

    Args:
        file: The open file.
        where: The file, for messages.

    Raises:
        ConfigurationError: Text that is not UTF-8, not JSON, nested too deeply, a number of thousands of
            digits, or a row longer than 32 MiB.
    """
    text = _Scanner(file, where)
    if text.peek() == "[":
        yield from _array(text)
        return
    number = 0
    while text.peek():
        number += 1
        yield number, text.value(number)


def _array(text: "_Scanner") -> Iterator[tuple[int, Any]]:
    text.skip()
    number = 0
    separator = "" if text.peek() == "]" else ","
    while separator == ",":
        number += 1
        yield number, text.value(number)
        separator = text.peek()
        if separator == ",":
            text.skip()
        elif separator != "]":
            raise invalid_json(text.where, number, "',' or ']' is missing after it")
    text.skip()
    if text.peek():
        raise invalid_json(text.where, number, "text follows the array")


def too_long(where: str, number: int) -> ConfigurationError:
    """Return the error for a row that is longer than `MAX_ROW_BYTES`."""
    return ConfigurationError(f"{where}, row {number}: longer than {MAX_ROW_BYTES:,} bytes; give shorter rows")


def invalid_json(where: str, number: int, reason: Exception | str) -> ConfigurationError:
    """Return the error for a row that is not JSON."""
    if isinstance(reason, Exception):
        reason = "nested too deeply" if isinstance(reason, RecursionError) else json_failure(reason)
    return ConfigurationError(f"{where}, row {number}: not valid JSON ({reason:.200})")


class _Scanner:
    """Parses values from a window of the text. The window grows only as long as one row needs it."""

    def __init__(self, file: BinaryIO, where: str) -> None:
        self._file, self.where = file, where
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._held, self._start, self._ended = "", 0, False

    def peek(self) -> str:
        """Return the next character that is not white space; "" at the end."""
        while True:
            self._start = _SPACE.match(self._held, self._start).end()  # type: ignore[union-attr]
            if self._start < len(self._held):
                return self._held[self._start]
            if self._ended:
                return ""
            self._read(_BLOCK_BYTES)

    def skip(self) -> None:
        """Skip one character."""
        self._start += 1

    def value(self, number: int) -> Any:
        """Return the next JSON value, which is row ``number``."""
        self.peek()
        while True:
            try:
                found, end = _DECODER.raw_decode(self._held, self._start)
            except RecursionError as error:
                raise invalid_json(self.where, number, error) from error
            except ValueError as error:
                if len(self._held) - self._start <= MAX_ROW_BYTES and (self._ended or self._is_final(error)):
                    raise invalid_json(self.where, number, error) from error
            else:
                # a number at the end of the window may continue behind it
                if isinstance(found, dict | list | str) or self._ended or not _MAY_CONTINUE.match(self._held, end):
                    if end - self._start > MAX_ROW_BYTES:
                        raise too_long(self.where, number)
                    self._start = end
                    return found
            held = len(self._held) - self._start
            if held > MAX_ROW_BYTES:
                raise too_long(self.where, number)
            # double the window each time, so that a long row is not parsed too often
            self._read(min(max(held, _BLOCK_BYTES), MAX_ROW_BYTES + 1))

    def _is_final(self, error: ValueError) -> bool:
        """Return whether the error would stay with any text after the window."""
        if not isinstance(error, json.JSONDecodeError):
            return True
        # a cut value gives an error at the end of the window, or at the beginning of a string that does not end
        return len(self._held) - error.pos > 16 and not error.msg.startswith("Unterminated string")

    def _read(self, size: int) -> None:
        block = self._file.read(size)
        self._ended = len(block) < size
        try:
            text = self._decoder.decode(block, self._ended)
        except UnicodeDecodeError as error:
            raise ConfigurationError(f"{self.where}: not valid JSON (not UTF-8 text: {error.reason})") from error
        self._held, self._start = self._held[self._start :] + text, 0
