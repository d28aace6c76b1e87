"""Checks of tokenizers from files, whose rules may multiply a text, compute without end, or panic."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from orthotrain.console.failures import is_panic
from orthotrain.console.limited_process import LimitExceeded, call_limited, first_line
from orthotrain.errors import ConfigurationError
from orthotrain.files.paths import check_folder_files, read_json

SAMPLE = (
    "The quick brown fox jumps over the lazy dog, and THE FIVE BOXING WIZARDS JUMP QUICKLY!\n"
    "x = [0, 12, 345]; y = {'a_b': 6.78e-9}  # 100% (of it) @home & away? <yes> \"no\" ~ ^ | $ \\ ` /\n\n"
    "\tzzzzzzzzzzzzzzzzzzzzzzzz été Straße привет 漢字 🎉\n"
)
"""Text with all letters and digits, white space, punctuation and a few characters beyond ASCII."""
MAX_TOKENS = 64
"""Most tokens for one character of a text, and for an empty text: a byte-level tokenizer makes at most 4 tokens."""
MAX_GROWTH = 1000
"""Most times that the replacements of a tokenizer may lengthen a text before it is cut into tokens."""
MAX_TOKEN = 1 << 31
"""The tokens of a tokenizer are smaller."""
MAX_SETTING = 1 << 22
"""Largest number in the settings of a tokenizer, because some of the numbers are counts of tokens to make."""

_CHARACTERS_PER_TOKEN = 64
_MIN_CHARACTERS, _MAX_CHARACTERS = 1 << 20, 8 << 20
_MEMORY_BYTES, _SECONDS = 512 << 20, 10.0


def max_characters(tokens: int) -> int:
    """Return the most characters to tokenize for a limit of tokens: tokenizing takes 100 bytes for each character.

    A text of ``tokens`` tokens has fewer than 64 characters in a token on average.
    """
    return min(max(_MIN_CHARACTERS, _CHARACTERS_PER_TOKEN * tokens), _MAX_CHARACTERS)


@contextlib.contextmanager
def encoding_with(tokenizer: Any) -> Iterator[None]:
    """Name the tokenizer if it fails to encode a text.

    Args:
        tokenizer: A tokenizer of transformers.

    Raises:
        ConfigurationError: In place of the panics and the bare ``Exception`` of the tokenizers library.
    """
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and not is_panic(error):
            raise
        named = f" {name!r}" if (name := getattr(tokenizer, "name_or_path", "")) else ""
        raise ConfigurationError(
            f"tokenizer{named}: cannot encode a text ({first_line(error)}); take another tokenizer, or correct the "
            "patterns and the vocabulary in its tokenizer.json"
        ) from error


def check_encoding(tokenizer: Any, where: str, file: Path | None = None) -> None:
    """Encode an empty text and a short text, in a process of bounded memory and time.

    A tokenizer that cannot encode the text for another reason (its characters are not in the vocabulary) passes: other
    texts may be fine, and `encoding_with` refuses texts that are not.

    Args:
        tokenizer: A tokenizer of transformers.
        where: Its name, for messages.
        file: The tokenizer.json that the tokenizer was loaded from, which alone must give the same tokens.

    Raises:
        ConfigurationError: The tokenizer exceeds a limit, panics, makes very many tokens from a short text, or makes
            other tokens than the file.
    """
    backend = tokenizer.backend_tokenizer
    plain = None if file is None else Tokenizer.from_file(str(file))

    def lengths() -> list[int] | str | None:
        # a library in Rust prints lines of its own when it panics or gets no memory
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        backend.no_truncation()
        backend.no_padding()
        try:
            if plain is not None and _tokens(backend) != _tokens(plain):
                return None
            return [len(backend.encode(text, add_special_tokens=True).ids) for text in ("", SAMPLE)]
        except BaseException as error:
            if is_panic(error):
                return first_line(error)
            raise

    try:
        found = call_limited(lengths, _MEMORY_BYTES, _SECONDS)
    except LimitExceeded as error:
        found = str(error)
    except RuntimeError:
        return
    if found is None:
        raise ConfigurationError(
            f"tokenizer {where}: the settings in its tokenizer_config.json change the tokens of its tokenizer.json; "
            "correct the settings, or give a copy of the tokenizer.json in another folder"
        )
    if isinstance(found, str):
        raise ConfigurationError(f"tokenizer {where}: cannot encode a text of {len(SAMPLE)} characters: {found}")
    for count, text in zip(found, ("", SAMPLE), strict=True):
        if count > MAX_TOKENS * max(1, len(text)):
            raise ConfigurationError(
                f"tokenizer {where}: makes {count:,} tokens from a text of {len(text)} characters, more than "
                f"{MAX_TOKENS} for each; take another tokenizer"
            )


def _tokens(backend: Tokenizer) -> list[int]:
    return backend.encode(SAMPLE, add_special_tokens=False).ids


def check_tokenizer_files(path: Path) -> None:
    """Refuse the files of a tokenizer if their numbers ask for loops and lists without bound.

    Args:
        path: A tokenizer.json, or a folder with one.

    Raises:
        ConfigurationError: A file is no regular file or no JSON, or a number in it is too large.
    """
    if path.is_dir():
        check_folder_files(path, "tokenizer folder")
    for file in sorted(path.glob("*token*.json")) if path.is_dir() else [path]:
        content = read_json(file, "tokenizer")
        if file.name == "tokenizer.json" or file == path:
            check_tokenizer_json(content, str(file))
            continue
        for name, value in _entries(content):
            if type(value) is int and value > MAX_SETTING and not name.endswith("max_length"):
                raise ConfigurationError(f"tokenizer {str(file)!r}: {name} is {value}, more than {MAX_SETTING:,}")


def check_tokenizer_json(content: Any, where: str) -> None:
    """Refuse the content of a tokenizer.json that would take memory without bound, or that no tokenizer has.

    Args:
        content: The parsed file.
        where: The file, for messages.

    Raises:
        ConfigurationError: Not an object, a token beyond 2^31, or replacements that multiply the length of a text.
    """
    if not isinstance(content, dict):
        raise ConfigurationError(f"tokenizer {where}: not a tokenizer.json (a {type(content).__name__}, no object)")
    growth = 1
    for name, value in _entries([content.get(part) for part in ("normalizer", "pre_tokenizer", "decoder")]):
        growth *= max(1, len(value)) if name == "content" and isinstance(value, str) else 1
    if growth > MAX_GROWTH:
        raise ConfigurationError(f"tokenizer {where}: its replacements make a text up to {growth} times as long")
    added, model = content.get("added_tokens"), content.get("model")
    ids = [token.get("id") for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    ids += vocabulary.values() if isinstance(vocabulary, dict) else []
    largest = max((number for number in ids if type(number) is int), default=0)
    if largest >= MAX_TOKEN:
        raise ConfigurationError(f"tokenizer {where}: token {largest} does not fit 31 bits")


def _entries(content: Any) -> Iterator[tuple[str, Any]]:
    """Yield the name and the value of each entry of nested objects and lists; items of a list have its name."""
    pending = [("", content)]
    while pending:
        name, value = pending.pop()
        yield name, value
        if isinstance(value, dict):
            pending += value.items()
        elif isinstance(value, list):
            pending += [(name, item) for item in value]
