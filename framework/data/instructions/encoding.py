"""From examples to rows of tokens, and the account of those that did not make it."""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

from transformers import PreTrainedTokenizerFast

from orthotrain.console.progress import Progress
from orthotrain.data.instructions.layouts import Encoder, Layout, Limit
from orthotrain.data.instructions.rows import Example
from orthotrain.data.instructions.token_rows import TokenRows
from orthotrain.errors import ConfigurationError

OnTooLong = Literal["drop", "truncate", "error"]

LONGEST_TOKEN = 64
"""Characters of a token in a row that is as long as allowed: more, on average, than those of any real text."""
_LEAST, _MOST = 1 << 20, 8 << 20
_MOST_WORK = 128 << 20


def most_characters(tokens: int) -> int:
    """Return how many characters are tokenized for a limit of so many tokens: tokenizing takes 100 bytes for each."""
    return min(max(_LEAST, LONGEST_TOKEN * tokens), _MOST)


def _far_too_long(example: Example, limits: tuple[Limit, ...]) -> int | None:
    """The characters of a row that no limit can hold, or that are too much work; None for any other row."""
    characters = sum(len(content) for _, content in example.messages)
    work = characters * len(example.messages)  # each response is rendered and tokenized with all before it
    too_long = characters > most_characters(sum(limit.tokens for limit in limits)) or work > _MOST_WORK
    return characters if too_long else None


@dataclass
class Account:
    """What became of the rows of a source.

    Attributes:
        limits: The limits of the layout.
        used: Rows used.
        too_long: Rows dropped because they exceed a limit, or truncated before their response.
        far_too_long: Those of them that were not tokenized, since they have far more characters than a limit can hold.
        truncated: Limit -> rows used that lost what exceeded it.
        special: Rows dropped because their text spells a special token.
        longest: The largest length for each limit.
    """

    limits: tuple[Limit, ...]
    used: int = 0
    too_long: int = 0
    far_too_long: int = 0
    truncated: Counter[str] = field(default_factory=Counter)
    special: int = 0
    longest: tuple[int, ...] = ()
    example_of_special: str = field(default="", repr=False)

    @property
    def dropped(self) -> int:
        """Rows dropped for any reason."""
        return self.too_long + self.special

    def measure(self, lengths: tuple[int, ...]) -> list[tuple[int, Limit]]:
        """Take note of a row's lengths and return those that exceed their limit, with it."""
        self.longest = tuple(map(max, zip(self.longest, lengths, strict=True))) if self.longest else lengths
        return [(n, limit) for n, limit in zip(lengths, self.limits, strict=True) if n > limit.tokens]

    def line(self) -> str:
        """All of it in one line."""
        units = (limit.unit for limit in self.limits)
        longest = " and ".join(f"{n:,} {unit}" for n, unit in zip(self.longest, units, strict=False)) or "no tokens"
        parts = [f"{self.used:,} rows used, {self.dropped:,} dropped; the longest has {longest}"]
        limits = [f"{limit.argument} {limit.tokens}" for limit in self.limits]
        if self.too_long:
            far = f", {self.far_too_long:,} of them so long that they were not tokenized" if self.far_too_long else ""
            parts.append(f"{self.too_long:,} dropped as too long for {' or '.join(limits)}{far}")
        for text, limit in zip(limits, self.limits, strict=True):
            if count := self.truncated[limit.argument]:
                parts.append(f"{count:,} truncated to {text}")
        if self.special:
            parts.append(f"{self.special:,} dropped as their text spells a special token ({self.example_of_special})")
        return "; ".join(parts)


def encode_rows(
    examples: Iterable[Example],
    encoder: Encoder,
    split_of: Callable[[Example], str],
    layout: Layout,
    on_too_long: OnTooLong,
    total: int | None = None,
) -> tuple[dict[str, TokenRows], Account]:
    """Tokenize examples into splits.

    Args:
        examples: The rows.
        encoder: Tokenizes one.
        split_of: Names the split of one.
        layout: Limits and stores the rows.
        on_too_long: What becomes of rows that exceed a limit: ``drop``, ``truncate`` (their end is lost) or ``error``.
        total: How many there are, where that is known, for the progress that is shown.

    Returns:
        The rows of each split, and the account of all.

    Raises:
        ConfigurationError: A row is too long and that is an error, or no row is left.
    """
    splits: dict[str, TokenRows] = {}
    account = Account(layout.limits)
    special_tokens = SpecialTokens(encoder.tokenizer)
    with Progress("tokenizing", total, "rows") as bar:
        for example in examples:
            if (token := special_tokens.spelled_in(example)) is not None:
                account.special += 1
                account.example_of_special = account.example_of_special or f"{token!r} in {example.where}"
                bar.advance()
                continue
            if (characters := _far_too_long(example, account.limits)) is not None:
                if on_too_long == "error":
                    raise _too_long(example, f"{characters:,} characters", account.limits[0])
                account.too_long += 1
                account.far_too_long += 1
                bar.advance()
                continue
            row = encoder(example)
            bar.advance(tokens=len(row.tokens))
            if excess := account.measure(layout.lengths(row)):
                if on_too_long == "error":
                    length, limit = excess[0]
                    raise _too_long(example, f"{length} {limit.unit}", limit)
                row = layout.truncated(row)
                if on_too_long == "drop" or not any(row.targets):
                    account.too_long += 1
                    continue
                account.truncated.update(limit.argument for _, limit in excess)
            account.used += 1
            splits.setdefault(split_of(example), layout.rows()).append(row, example.reference)
    if not account.used:
        raise ConfigurationError(
            f"no row is left: {account.line()}; raise {layout.limits[0].argument} or change the rows"
        )
    return splits, account


def _too_long(example: Example, length: str, limit: Limit) -> ConfigurationError:
    return ConfigurationError(
        f"{example.where}: {length}, longer than {limit.argument} {limit.tokens}; raise {limit.argument}, "
        "remove the row, or set on_too_long to drop or truncate"
    )


class SpecialTokens:
    """Finds the special tokens of a tokenizer, such as ``</s>``, in the text of examples.

    Args:
        tokenizer: Whose tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        special = [re.escape(str(token)) for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._pattern = re.compile("|".join(special)) if special else None

    def spelled_in(self, example: Example) -> str | None:
        """The first special token that a message spells, or None."""
        for _, content in example.messages:
            if self._pattern is not None and (match := self._pattern.search(content)):
                return match[0]
        return None
