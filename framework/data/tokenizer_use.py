"""Encoding with a tokenizer of a file, whose rules may multiply a text, compute without end or panic."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from orthotrain.console.failures import is_panic
from orthotrain.console.limited_process import LimitExceeded, call_limited, first_line
from orthotrain.errors import ConfigurationError

SAMPLE = (
    "The quick brown fox jumps over the lazy dog, and THE FIVE BOXING WIZARDS JUMP QUICKLY!\n"
    "x = [0, 12, 345]; y = {'a_b': 6.78e-9}  # 100% (of it) @home & away? <yes> \"no\" ~ ^ | $ \\ ` /\n\n"
    "\tzzzzzzzzzzzzzzzzzzzzzzzz été Straße привет 漢字 🎉\n"
)
"""Text with every letter and digit, white space, punctuation and a few characters beyond ASCII."""
MOST_TOKENS = 64
"""Most tokens for a character of a text, and for an empty text: a byte-level tokenizer makes at most 4 of one."""
_MEMORY_BYTES, _SECONDS = 512 << 20, 10.0


@contextlib.contextmanager
def encoding_with(tokenizer: Any) -> Iterator[None]:
    """Name the tokenizer where it fails to encode a text.

    Args:
        tokenizer: A tokenizer of transformers.

    Raises:
        ConfigurationError: In the place of the panics and the bare ``Exception`` of the tokenizers library.
    """
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and not is_panic(error):
            raise
        named = f" {name!r}" if (name := getattr(tokenizer, "name_or_path", "")) else ""
        raise ConfigurationError(
            f"tokenizer{named}: cannot encode a text ({first_line(error)}); take another tokenizer, or mend the "
            "patterns and the vocabulary in its tokenizer.json"
        ) from error


def check_encoding(tokenizer: Any, where: str) -> None:
    """Encode an empty text and a short one, in a process of bounded memory and time.

    A tokenizer that cannot encode the text for another reason (a vocabulary without its characters) passes: other texts
    may be fine, and those that are not are refused by `encoding_with`.

    Args:
        tokenizer: A tokenizer of transformers.
        where: Its name, for messages.

    Raises:
        ConfigurationError: The tokenizer goes beyond a limit, panics, or makes very many tokens of a short text.
    """
    backend = tokenizer.backend_tokenizer

    def lengths() -> list[int] | str:
        # what a library in Rust prints when it panics or gets no memory would stand before our own line
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        backend.no_truncation()
        backend.no_padding()
        try:
            return [len(backend.encode(text, add_special_tokens=True).ids) for text in ("", SAMPLE)]
        except BaseException as error:
            if is_panic(error):
                return first_line(error)
            raise

    try:
        found = call_limited(lengths, _MEMORY_BYTES, _SECONDS)
    except LimitExceeded as error:
        raise ConfigurationError(
            f"tokenizer {where}: cannot encode a text of {len(SAMPLE)} characters: {error}"
        ) from error
    except RuntimeError:
        return
    if isinstance(found, str):
        raise ConfigurationError(f"tokenizer {where}: cannot encode a text of {len(SAMPLE)} characters: {found}")
    for count, text in zip(found, ("", SAMPLE), strict=True):
        if count > MOST_TOKENS * max(1, len(text)):
            raise ConfigurationError(
                f"tokenizer {where}: makes {count:,} tokens of a text of {len(text)} characters, more than "
                f"{MOST_TOKENS} for each; take another tokenizer"
            )
