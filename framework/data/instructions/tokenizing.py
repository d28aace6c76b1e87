"""From examples to rows of tokens, and the numbers of rows that were used, truncated and dropped."""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

from orthotrain.console.progress import Progress
from orthotrain.data.instructions.examples import EncodedExample, Example
from orthotrain.data.instructions.layouts import Encoder, Layout, Limit
from orthotrain.data.instructions.token_rows import TokenRows
from orthotrain.data.tokenizer_checks import max_characters
from orthotrain.errors import ConfigurationError

OnTooLong = Literal["drop", "truncate", "error"]

_MAX_WORK = 128 << 20
"""Most characters times messages of a row: each response is rendered and tokenized with all messages before it."""


@dataclass
class RowCounts:
    """How many rows of a source were used, truncated and dropped.

    Attributes:
        limits: The limits of the layout.
        used: Rows used.
        too_long: Rows dropped because they exceed a limit, or because truncation leaves no response.
        not_tokenized: The rows of ``too_long`` that have far more characters than a limit can hold.
        truncated: Argument of a limit -> used rows that exceeded it and were cut.
        special: Rows dropped because their text contains a special token.
        longest: The largest length for each limit.
    """

    limits: tuple[Limit, ...]
    used: int = 0
    too_long: int = 0
    not_tokenized: int = 0
    truncated: Counter[str] = field(default_factory=Counter)
    special: int = 0
    longest: tuple[int, ...] = ()
    example_of_special: str = field(default="", repr=False)

    @property
    def dropped(self) -> int:
        """Rows dropped for any reason."""
        return self.too_long + self.special

    def measure(self, lengths: tuple[int, ...]) -> list[tuple[int, Limit]]:
        """Record the lengths of a row. Return each length that exceeds its limit, with the limit."""
        self.longest = tuple(map(max, zip(self.longest, lengths, strict=True))) if self.longest else lengths
        return [(n, limit) for n, limit in zip(lengths, self.limits, strict=True) if n > limit.tokens]

    def summary(self) -> str:
        """Return all numbers in one line."""
        units = (limit.unit for limit in self.limits)
        longest = " and ".join(f"{n:,} {unit}" for n, unit in zip(self.longest, units, strict=False)) or "no tokens"
        parts = [f"{self.used:,} rows used, {self.dropped:,} dropped; the longest has {longest}"]
        limits = [f"{limit.argument} {limit.tokens}" for limit in self.limits]
        if self.too_long:
            unread = f", {self.not_tokenized:,} of them not tokenized, because of their length"
            parts.append(
                f"{self.too_long:,} dropped as too long for {' or '.join(limits)}{unread if self.not_tokenized else ''}"
            )
        for text, limit in zip(limits, self.limits, strict=True):
            if count := self.truncated[limit.argument]:
                parts.append(f"{count:,} truncated to {text}")
        if self.special:
            parts.append(f"{self.special:,} dropped as their text contains a special token ({self.example_of_special})")
        return "; ".join(parts)


def tokenize_rows(
    examples: Iterable[Example],
    encoder: Encoder,
    split_of: Callable[[Example], str],
    layout: Layout,
    on_too_long: OnTooLong,
    total: int | None = None,
) -> tuple[dict[str, TokenRows], RowCounts]:
    """Tokenize examples into splits.

    Args:
        examples: The rows.
        encoder: Tokenizes an example.
        split_of: Returns the split of an example.
        layout: Limits and stores the rows.
        on_too_long: What to do with rows that exceed a limit: ``drop``, ``truncate`` (their end is lost) or ``error``.
        total: The number of examples for the progress bar, if it is known.

    Returns:
        The rows of each split, and the counts of all rows.

    Raises:
        ConfigurationError: A row is too long and ``on_too_long`` is ``error``, or no row is left.
    """
    splits: dict[str, TokenRows] = {}
    counts = RowCounts(layout.limits)
    special = [re.escape(str(token)) for token in encoder.tokenizer.added_tokens_decoder.values() if token.special]
    special_tokens = re.compile("|".join(special) or r"\Z.")  # without special tokens, a pattern that never matches
    with Progress("tokenizing", total, "rows") as bar:
        for example in examples:
            row = None
            if found := next(filter(None, (special_tokens.search(text) for _, text in example.messages)), None):
                counts.special += 1
                counts.example_of_special = counts.example_of_special or f"{found[0]!r} in {example.where}"
            else:
                row = _tokenize(example, encoder, layout, on_too_long, counts)
            bar.advance(tokens=0 if row is None else len(row.tokens))
            if row is not None:
                counts.used += 1
                splits.setdefault(split_of(example), layout.rows()).append(row, example.reference)
    if not counts.used:
        raise ConfigurationError(
            f"no row is left: {counts.summary()}; raise {layout.limits[0].argument} or change the rows"
        )
    return splits, counts


def _tokenize(
    example: Example, encoder: Encoder, layout: Layout, on_too_long: OnTooLong, counts: RowCounts
) -> EncodedExample | None:
    """Return the row of an example, and None if the row is too long and is dropped."""
    characters = sum(len(content) for _, content in example.messages)
    most = max_characters(sum(limit.tokens for limit in layout.limits))
    if characters > most or characters * len(example.messages) > _MAX_WORK:
        if on_too_long == "error":
            raise _too_long(example, f"{characters:,} characters", layout.limits[0])
        counts.too_long += 1
        counts.not_tokenized += 1
        return None
    row = encoder(example)
    if excess := counts.measure(layout.lengths(row)):
        if on_too_long == "error":
            length, limit = excess[0]
            raise _too_long(example, f"{length} {limit.unit}", limit)
        row = layout.truncated(row)
        if on_too_long == "drop" or not any(row.targets):
            counts.too_long += 1
            return None
        counts.truncated.update(limit.argument for _, limit in excess)
    return row


def _too_long(example: Example, length: str, limit: Limit) -> ConfigurationError:
    return ConfigurationError(
        f"{example.where}: {length}, longer than {limit.argument} {limit.tokens}; raise {limit.argument}, "
        "remove the row, or set on_too_long to drop or truncate"
    )
