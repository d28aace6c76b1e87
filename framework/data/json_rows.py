"""Rows out of JSON text of any size: an array of rows, JSON Lines or one row, parsed in bounded memory."""

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
_MAY_GO_ON = re.compile(r"[-+.\w]*\Z")
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
            raise text.invalid(number, "',' or ']' is missing after it")
    text.skip()
    if text.peek():
        raise text.invalid(number, "text follows the array")


def too_long(where: str, number: int) -> ConfigurationError:
    """The error for a row that is longer than a reader holds."""
    return ConfigurationError(f"{where}, row {number}: longer than {MAX_ROW_BYTES:,} bytes; give shorter rows")


class _Scanner:
    """A window on the text that is longer only while one row needs it."""

    def __init__(self, file: BinaryIO, where: str) -> None:
        self._file, self._where = file, where
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._held, self._at, self._ended = "", 0, False

    def peek(self) -> str:
        """The next character that is no white space; "" at the end."""
        while True:
            self._at = _SPACE.match(self._held, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._held):
                return self._held[self._at]
            if self._ended:
                return ""
            self._read(_BLOCK_BYTES)

    def skip(self) -> None:
        """Go past one character."""
        self._at += 1

    def value(self, number: int) -> Any:
        """The next JSON value."""
        self.peek()
        while True:
            try:
                found, end = _DECODER.raw_decode(self._held, self._at)
                # a number at the end of the window may have more digits behind it
                if isinstance(found, dict | list | str) or self._ended or not _MAY_GO_ON.match(self._held, end):
                    if end - self._at > MAX_ROW_BYTES:
                        raise too_long(self._where, number)
                    self._at = end
                    return found
            except RecursionError as error:
                raise ConfigurationError(f"{self._where}, row {number}: not valid JSON (nested too deeply)") from error
            except ConfigurationError:
                raise
            except ValueError as error:
                if len(self._held) - self._at <= MAX_ROW_BYTES and (self._ended or self._is_final(error)):
                    raise self.invalid(number, json_failure(error)) from error
            held = len(self._held) - self._at
            if held > MAX_ROW_BYTES:
                raise too_long(self._where, number)
            # twice as much each time, so that a long row is not parsed too often
            self._read(min(max(held, _BLOCK_BYTES), MAX_ROW_BYTES + 1))

    def _is_final(self, error: ValueError) -> bool:
        """Whether no text behind the window could make this error go away."""
        if not isinstance(error, json.JSONDecodeError):
            return True
        # what is cut off shows at its end, or at the beginning of the string that does not end
        return len(self._held) - error.pos > 16 and not error.msg.startswith("Unterminated string")

    def invalid(self, number: int, reason: str) -> ConfigurationError:
        """The error for text that is not JSON."""
        return ConfigurationError(f"{self._where}, row {number}: not valid JSON ({reason:.200})")

    def _read(self, size: int) -> None:
        block = self._file.read(size)
        self._ended = len(block) < size
        try:
            text = self._decoder.decode(block, self._ended)
        except UnicodeDecodeError as error:
            raise ConfigurationError(f"{self._where}: not valid JSON (not UTF-8 text: {error.reason})") from error
        self._held, self._at = self._held[self._at :] + text, 0
