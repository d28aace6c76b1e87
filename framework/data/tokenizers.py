"""Tokenizers: train a byte-level BPE, load an existing tokenizer, and tell two tokenizers apart."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import cached_file

from orthotrain.console.failures import is_panic
from orthotrain.console.limited_process import first_line
from orthotrain.data.tokenizer_checks import check_encoding, check_tokenizer_files
from orthotrain.errors import ConfigurationError
from orthotrain.files.paths import check_regular_file, local_path
from orthotrain.models.folder import check_there

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|padding|>"
MIN_VOCABULARY = 256 + 2 + 1
"""All bytes, the two special tokens and one merge."""
MAX_VOCABULARY = 1 << 22
"""Training reserves memory for all tokens before it begins; the largest vocabularies in use have 2^18 tokens."""

_KNOWN_PADDING = (PADDING, "[PAD]", "<pad>")
_KNOWN_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE. It is lossless for any text, and the same texts in the same order give the same result.

    Args:
        texts: The texts that the merges are learned from.
        vocab_size: Number of tokens, with the 256 bytes and two special tokens.

    Returns:
        A tokenizer with ``<|endoftext|>`` at the end and the beginning of a text, and ``<|padding|>`` as padding.

    Raises:
        ConfigurationError: The vocabulary is too small for the bytes, or the texts do not hold enough merges for it.
    """
    check_vocabulary_size(vocab_size)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if (attained := tokenizer.get_vocab_size()) != vocab_size:
        raise ConfigurationError(
            f"vocab_size {vocab_size}: the train text only yields {attained} tokens; set vocab_size to {attained} or "
            "less, or give more text"
        )
    return _with_special_tokens(tokenizer)


def _with_special_tokens(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT, pad_token=PADDING
    )


def load_trained_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """Load the file of a tokenizer that `train_tokenizer` made.

    Raises:
        ConfigurationError: The file holds no tokenizer.
    """
    check_regular_file(path, "tokenizer")
    try:
        return _with_special_tokens(Tokenizer.from_file(str(path)))
    except Exception as error:  # tokenizers raises bare Exception
        raise ConfigurationError(f"tokenizer {path}: not a readable tokenizer.json ({error!s:.120})") from error


def check_vocabulary_size(vocab_size: int) -> None:
    """Refuse a vocabulary that cannot be trained.

    Raises:
        ConfigurationError: Fewer tokens than bytes and special tokens, or so many that training reserves gigabytes.
    """
    if not MIN_VOCABULARY <= vocab_size <= MAX_VOCABULARY:
        raise ConfigurationError(
            f"vocab_size {vocab_size}: a byte-level BPE needs at least {MIN_VOCABULARY} tokens "
            f"(256 bytes, 2 special tokens, 1 merge) and at most {MAX_VOCABULARY:,}"
        )


def load_tokenizer(name: str, vocab_size: int | None = None, joins: bool = True) -> PreTrainedTokenizerFast:
    """Load a tokenizer and check that it fits the model.

    A ``tokenizer.json`` alone decides the tokens, with the settings of the ``tokenizer_config.json`` beside it. The
    tokenizer class that the settings name would rebuild parts of some tokenizers, and make other tokens.

    Args:
        name: A ``tokenizer.json``, a folder with one or with files that transformers converts, or a Hugging Face name.
        vocab_size: Rows of the model's embedding; ``None`` allows any number of tokens.
        joins: Whether documents are joined by an end-of-text token, which an encoder's tokenizer does not have.

    Raises:
        ConfigurationError: The tokenizer cannot be loaded, has no end-of-text token or no padding, has more tokens than
            ``vocab_size``, or needs very much memory, time or tokens for a short text; or the settings change the
            tokens of the ``tokenizer.json``.
    """
    check_there(name)
    path = local_path(name, "tokenizer")
    if path.exists():
        check_tokenizer_files(path)
    try:
        tokenizer, file = _load(name, path)
    except BaseException as error:  # tokenizers raises bare Exception and panics, the hub client many classes
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        raise ConfigurationError(
            f"tokenizer {name!r}: cannot be loaded ({first_line(error)}); give a tokenizer.json, a folder that holds "
            "one, or a Hugging Face model name"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ConfigurationError(f"tokenizer {name!r}: {type(tokenizer).__name__} has no tokenizer.json (fast) form")
    _complete_special_tokens(tokenizer, name, joins)
    if vocab_size is not None and (size := number_of_tokens(tokenizer)) > vocab_size:
        raise ConfigurationError(
            f"tokenizer {name!r}: {size} tokens do not fit vocab_size {vocab_size}; set vocab_size to at least {size}"
        )
    check_encoding(tokenizer, repr(name), file)
    return tokenizer


def _load(name: str, path: Path) -> tuple[Any, Path | None]:
    """Return a tokenizer and its tokenizer.json, if it has one."""
    if path.is_file() and not (path.name == "tokenizer.json" and (path.parent / "tokenizer_config.json").is_file()):
        return PreTrainedTokenizerFast(tokenizer_file=str(path)), None
    source = str(path.parent) if path.is_file() else str(path) if path.is_dir() else name
    try:
        file = cached_file(source, "tokenizer.json")
    except OSError:  # none there, or the hub cannot be reached, which the next call explains
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False), None
    return PreTrainedTokenizerFast.from_pretrained(source), Path(str(file))


def _complete_special_tokens(tokenizer: PreTrainedTokenizerFast, name: str, joins: bool) -> None:
    vocabulary = tokenizer.get_vocab()
    if not joins and tokenizer.pad_token_id is None:
        tokenizer.pad_token = next((token for token in _KNOWN_PADDING if token in vocabulary), None)
    if tokenizer.eos_token_id is None and (joins or tokenizer.pad_token_id is None):
        end = next((token for token in _KNOWN_ENDS if token in vocabulary), None)
        if end is None:
            raise ConfigurationError(
                f"tokenizer {name!r}: no end-of-text token to join documents with; set eos_token in its "
                f"tokenizer_config.json, or add one of {', '.join(_KNOWN_ENDS)}"
            )
        tokenizer.eos_token = end
    complete_padding(tokenizer)


def complete_padding(tokenizer: PreTrainedTokenizerFast) -> None:
    """Pad with the end-of-text token if the tokenizer has no token for padding. An export does not keep this token."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
        tokenizer.has_own_padding = False


def number_of_tokens(tokenizer: PreTrainedTokenizerFast) -> int:
    """Return the largest token plus one; there may be gaps between the vocabulary and added tokens."""
    return max(tokenizer.get_vocab().values()) + 1


def canonical_json(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the tokenizer's JSON with sorted keys, without the truncation and padding that calls leave in it."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["truncation"] = content["padding"] = None
    return json.dumps(content, sort_keys=True, separators=(",", ":"))


def fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the sha256 of `canonical_json`: equal only if both tokenizers turn every text into the same tokens."""
    return hashlib.sha256(canonical_json(tokenizer).encode()).hexdigest()
