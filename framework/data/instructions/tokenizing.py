"""From examples to rows of tokens, and the numbers of rows that were used, truncated and dropped."""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

from orthotrain.console.progress import Progress
from orthotrain.data.instructions.examples import EncodedExample, Example
from orthotrain.data.instructions.layouts import Encoder, Layout, Limit
from orthotrain.data.instructions.row_faults import RowFault, RowFaults
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
        empty: Rows left out because an answer is empty, or because no message counts in the loss.
        split: Rows of which each response is a row of its own, because the template changes earlier messages.
        longest: The largest length for each limit.
    """

    limits: tuple[Limit, ...]
    used: int = 0
    too_long: int = 0
    not_tokenized: int = 0
    truncated: Counter[str] = field(default_factory=Counter)
    special: int = 0
    empty: int = 0
    split: int = 0
    longest: tuple[int, ...] = ()
    example_of_special: str = field(default="", repr=False)

    @property
    def dropped(self) -> int:
        """Rows dropped for any reason."""
        return self.too_long + self.special + self.empty

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
        if self.empty:
            parts.append(f"{self.empty:,} left out as they have an empty answer")
        if self.split:
            parts.append(
                f"{self.split:,} conversations became several rows, as the chat template changes earlier messages"
            )
        return "; ".join(parts)


def tokenize_rows(
    examples: Iterable[Example],
    encoder: Encoder,
    split_of: Callable[[Example], str],
    layout: Layout,
    on_too_long: OnTooLong,
    total: int | None = None,
    faults: RowFaults | None = None,
) -> tuple[dict[str, TokenRows], RowCounts]:
    """Tokenize examples into splits.

    Args:
        examples: The rows.
        encoder: Tokenizes an example.
        split_of: Returns the split of an example.
        layout: Limits and stores the rows.
        on_too_long: What to do with rows that exceed a limit: ``drop``, ``truncate`` (their end is lost) or ``error``.
        total: The number of examples for the progress bar, if it is known.
        faults: Collects the faults of rows; the reader of the rows may have it too.

    Returns:
        The rows of each split, and the counts of all rows.

    Raises:
        ConfigurationError: A row cannot be used, or is too long and ``on_too_long`` is ``error``; or no row is left.
    """
    splits: dict[str, TokenRows] = {}
    counts = RowCounts(layout.limits)
    faults = RowFaults() if faults is None else faults
    special = [re.escape(str(token)) for token in encoder.tokenizer.added_tokens_decoder.values() if token.special]
    special_tokens = re.compile("|".join(special) or r"\Z.")  # without special tokens, a pattern that never matches
    with Progress("tokenizing", total, "rows") as bar:
        for example in examples:
            rows: list[EncodedExample] = []
            if example.is_empty:
                counts.empty += 1
            elif found := next(filter(None, map(special_tokens.search, example.texts())), None):
                counts.special += 1
                counts.example_of_special = counts.example_of_special or f"{found[0]!r} in {example.where}"
            else:
                with faults.collect(example.where):
                    rows = _tokenize(example, encoder, layout, on_too_long, counts)
            bar.advance(tokens=sum(len(row.tokens) for row in rows))
            if rows:
                counts.used += len(rows)
                split = splits.setdefault(split_of(example), layout.rows())
                for row in rows:
                    split.append(row, row.reference)
    faults.refuse()
    if not counts.used:
        raise ConfigurationError(
            f"no row is left: {counts.summary()}; raise {layout.limits[0].argument} or change the rows"
        )
    return splits, counts


def _tokenize(
    example: Example, encoder: Encoder, layout: Layout, on_too_long: OnTooLong, counts: RowCounts
) -> list[EncodedExample]:
    """Return the rows of an example without those that are too long."""
    characters = sum(map(len, example.texts()))
    most = max_characters(sum(limit.tokens for limit in layout.limits))
    if characters > most or characters * len(example.messages) > _MAX_WORK:
        if on_too_long == "error":
            raise _too_long(example, f"{characters:,} characters", layout.limits[0])
        counts.too_long += 1
        counts.not_tokenized += 1
        return []
    encoded = encoder(example)
    counts.split += len(encoded) > 1
    rows = [_limited(row, example, layout, on_too_long, counts) for row in encoded]
    return [row for row in rows if row is not None]


def _limited(
    row: EncodedExample, example: Example, layout: Layout, on_too_long: OnTooLong, counts: RowCounts
) -> EncodedExample | None:
    """Return a row cut to the limits, and None if it is dropped."""
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


def _too_long(example: Example, length: str, limit: Limit) -> RowFault:
    return RowFault(
        f"{example.where}: {length}, longer than {limit.argument} {limit.tokens}; raise {limit.argument}, "
        "remove the row, or set on_too_long to drop or truncate"
    )
