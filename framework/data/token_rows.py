"""Tokenized rows of instruction data in memory, and the account of those that did not make it."""

from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from orthotrain.data.chat import EncodedExample, ExampleEncoder
from orthotrain.data.instruction_rows import Example
from orthotrain.errors import ConfigurationError

IGNORED = -100
"""The label of a token that does not count."""

OnTooLong = Literal["drop", "truncate", "error"]


class TokenRows:
    """Rows of tokens in flat arrays: about 5 bytes a token, whatever the number of rows."""

    def __init__(self) -> None:
        self._tokens, self._targets = array("i"), array("b")
        self._starts, self._prompt_lengths = array("q", [0]), array("i")
        self.references: list[str] = []
        """The last response of each row."""

    def append(self, row: EncodedExample, reference: str) -> None:
        """Add a row."""
        self._tokens.extend(row.tokens)
        self._targets.extend(row.targets)
        self._starts.append(len(self._tokens))
        self._prompt_lengths.append(row.prompt_length)
        self.references.append(reference)

    def __len__(self) -> int:
        return len(self.references)

    @property
    def lengths(self) -> np.ndarray:
        """Inputs of each row, int64: one fewer than its tokens."""
        return np.diff(np.frombuffer(self._starts, np.int64)) - 1

    @property
    def prompt_lengths(self) -> np.ndarray:
        """Tokens before the last response of each row; 0 where truncation cut into them."""
        return np.array(self._prompt_lengths)

    def inputs_and_labels(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """A row's inputs and labels, int64 of shape ``(length,)``.

        ``labels[t]`` is the token after ``inputs[t]``, or -100 where that does not belong to a response.
        """
        span = slice(self._starts[row], self._starts[row + 1])
        tokens = np.array(self._tokens[span], np.int64)
        labels = np.where(np.array(self._targets[span], bool), tokens, IGNORED)
        return tokens[:-1], labels[1:]

    def prompt(self, row: int) -> list[int]:
        """The tokens before the last response; none where truncation cut into them."""
        start = self._starts[row]
        return self._tokens[start : start + self._prompt_lengths[row]].tolist()


@dataclass
class Account:
    """What became of the rows of a source.

    Attributes:
        used: Rows used.
        too_long: Rows dropped because they are longer than ``max_length``, or truncated before their response.
        truncated: Rows used that lost their end.
        special: Rows dropped because their text spells a special token.
        longest: Inputs of the longest row.
    """

    used: int = 0
    too_long: int = 0
    truncated: int = 0
    special: int = 0
    longest: int = 0
    example_of_special: str = field(default="", repr=False)

    @property
    def dropped(self) -> int:
        """Rows dropped for any reason."""
        return self.too_long + self.special

    def line(self, max_length: int) -> str:
        """All of it in one line."""
        parts = [f"{self.used:,} rows used, {self.dropped:,} dropped; the longest has {self.longest:,} tokens"]
        if self.too_long:
            parts.append(f"{self.too_long:,} dropped as too long for max_length {max_length}")
        if self.truncated:
            parts.append(f"{self.truncated:,} truncated to max_length {max_length}")
        if self.special:
            parts.append(f"{self.special:,} dropped as their text spells a special token ({self.example_of_special})")
        return "; ".join(parts)


def encode_rows(
    examples: Iterable[Example],
    encoder: ExampleEncoder,
    split_of: Callable[[Example], str],
    max_length: int,
    on_too_long: OnTooLong,
) -> tuple[dict[str, TokenRows], Account]:
    """Tokenize examples into splits.

    Args:
        examples: The rows.
        encoder: Tokenizes one.
        split_of: Names the split of one.
        max_length: Most inputs of a row.
        on_too_long: What becomes of longer rows: ``drop``, ``truncate`` (their end is lost) or ``error``.

    Returns:
        The rows of each split, and the account of all.

    Raises:
        ConfigurationError: A row is too long and that is an error, or no row is left.
    """
    splits: dict[str, TokenRows] = {}
    account = Account()
    for example in examples:
        if (token := encoder.special_token_in(example)) is not None:
            account.special += 1
            account.example_of_special = account.example_of_special or f"{token!r} in {example.where}"
            continue
        row = encoder(example)
        length = len(row.tokens) - 1
        account.longest = max(account.longest, length)
        if length > max_length:
            if on_too_long == "error":
                raise ConfigurationError(
                    f"{example.where}: {length} tokens, longer than max_length {max_length}; raise max_length, remove "
                    "the row, or set on_too_long to drop or truncate"
                )
            row = _truncated(row, max_length)
            if on_too_long == "drop" or not any(row.targets):
                account.too_long += 1
                continue
            account.truncated += 1
        account.used += 1
        splits.setdefault(split_of(example), TokenRows()).append(row, example.reference)
    if not account.used:
        raise ConfigurationError(f"no row is left: {account.line(max_length)}; raise max_length or change the rows")
    return splits, account


def _truncated(row: EncodedExample, max_length: int) -> EncodedExample:
    kept = slice(max_length + 1)
    whole_prompt = row.prompt_length <= max_length
    return EncodedExample(row.tokens[kept], row.targets[kept], row.prompt_length if whole_prompt else 0)
