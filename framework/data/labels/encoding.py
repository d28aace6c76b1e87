"""From labeled rows to tokens: texts cut to a length, and labels of words on the first token of each word."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerFast

from orthotrain.console.progress import Progress
from orthotrain.data.labels.labeled_rows import LabeledRows
from orthotrain.data.labels.rows import LabeledRow
from orthotrain.data.tokenizer_checks import encoding_with, max_characters
from orthotrain.errors import ConfigurationError

OnTooLong = Literal["drop", "truncate", "error"]


@dataclass
class LabelCounts:
    """How many rows were used, truncated and dropped, and how many words have no token.

    Attributes:
        used: Rows used.
        truncated: Rows used whose end was cut off.
        dropped: Rows that were too long.
        words: Labels of words that are lost, because the word was cut off or has no token.
    """

    used: int = 0
    truncated: int = 0
    dropped: int = 0
    words: int = 0

    def summary(self, max_length: int) -> str:
        """Return all numbers in one line."""
        words = f"; {self.words:,} labels of words lost, as the word has no token" if self.words else ""
        return (
            f"{self.used:,} rows used, {self.truncated:,} of them truncated to max_length {max_length}, "
            f"{self.dropped:,} dropped{words}"
        )


class LabelEncoder:
    """Tokenizes rows with the special tokens of the tokenizer.

    Args:
        tokenizer: The tokenizer of the model.
        max_length: Most tokens of a row.
        on_too_long: What to do with longer rows.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, max_length: int, on_too_long: OnTooLong) -> None:
        self.tokenizer, self.max_length, self.on_too_long = tokenizer, max_length, on_too_long
        self.counts = LabelCounts()
        special = tokenizer.num_special_tokens_to_add(pair=True)
        if max_length <= special:
            raise ConfigurationError(
                f"max_length {max_length}: the tokenizer adds up to {special} special tokens to a row; set more"
            )

    def add(self, row: LabeledRow, rows: LabeledRows) -> None:
        """Tokenize a row and add it to ``rows``, unless it is dropped.

        Raises:
            ConfigurationError: The row has no token, or it is too long and ``on_too_long`` is ``error``.
        """
        most = max_characters(self.max_length)
        texts = [text[:most] for text in (row.text, row.pair) if text is not None]
        with encoding_with(self.tokenizer):
            # spelled out, because transformers' own call warns about lengths and moves texts into batches
            found: Any = self.tokenizer(*texts, truncation=True, max_length=self.max_length).encodings[0]
        if not found.ids:
            raise ConfigurationError(f"{row.where}: the text has no token; give it text or remove the row")
        if found.overflowing or len(row.text) > most or len(row.pair or "") > most:
            if self.on_too_long == "error":
                raise ConfigurationError(
                    f"{row.where}: longer than max_length {self.max_length} tokens; raise max_length, remove the row, "
                    "or set on_too_long to drop or truncate"
                )
            if self.on_too_long == "drop":
                self.counts.dropped += 1
                return
            self.counts.truncated += 1
        self.counts.used += 1
        rows.append(found.ids, found.type_ids, self._on_tokens(row, found) if row.words else row.labels, row.where)

    def _on_tokens(self, row: LabeledRow, found: Any) -> list[str | float | None]:
        """Return the label of each token: that of the word that begins in it, None for all others."""
        labels: list[str | float | None] = [None] * len(found.ids)
        words: Iterator[tuple[Any, Any]] = iter(zip(row.words, row.labels, strict=True))
        end_of_words: tuple[None, None] = (None, None)
        word, label = next(words, end_of_words)
        for place, ((start, end), special) in enumerate(zip(found.offsets, found.special_tokens_mask, strict=True)):
            if special:
                continue
            while word is not None and word[1] <= start:  # the word has no token
                word, label = next(words, end_of_words)
                self.counts.words += 1
            if word is not None and start < word[1] and word[0] < end:
                labels[place] = label
                word, label = next(words, end_of_words)
        self.counts.words += (word is not None) + sum(1 for _ in words)
        return labels


def encode_rows(rows: Iterable[tuple[LabeledRow, str]], encoder: LabelEncoder) -> dict[str, LabeledRows]:
    """Tokenize rows into their splits.

    Args:
        rows: Each row with the split that it belongs to.
        encoder: Tokenizes rows, and counts them.

    Raises:
        ConfigurationError: A row cannot be used, or no row is left.
    """
    splits: dict[str, LabeledRows] = {}
    with Progress("tokenizing", None, "rows") as bar:
        for row, split in rows:
            encoder.add(row, splits.setdefault(split, LabeledRows()))
            bar.advance()
    if not encoder.counts.used:
        raise ConfigurationError(
            f"no row is left: {encoder.counts.summary(encoder.max_length)}; raise max_length or set on_too_long to "
            "truncate"
        )
    return splits
