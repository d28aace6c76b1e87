"""Tokenizers: train a byte-level BPE, load an existing one, tell two apart, and carry one inside a checkpoint."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from orthotrain.console.failures import is_panic
from orthotrain.data.identity import check_data_state
from orthotrain.data.tokenizer_use import check_encoding
from orthotrain.errors import ConfigurationError
from orthotrain.files.paths import check_folder_files, check_regular_file, local_path, read_json
from orthotrain.models.folder import check_there

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|padding|>"
SMALLEST_VOCABULARY = 256 + 2 + 1
"""Every byte, the two special tokens and one merge."""

LARGEST_VOCABULARY = 1 << 22
"""Most tokens: training reserves memory for all of them before it begins, and the largest in use have 2^18."""
_LARGEST_NUMBER = 1 << 31
MOST_EXTRA_TOKENS = 1 << 22
"""Largest number in a tokenizer's settings, some of which are counts of tokens to make."""
MOST_GROWTH = 1000
"""How many times as long as it was a text may become before it is cut into tokens."""
_SPECIAL_NAMES = frozenset({"eos_token", "bos_token", "pad_token", "unk_token"})

_KNOWN_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE: lossless for any text, the same result for the same texts in the same order.

    Args:
        texts: What to learn the merges from.
        vocab_size: Tokens in all, the 256 bytes and two special tokens included.

    Returns:
        A tokenizer with ``<|endoftext|>`` as end and beginning and ``<|padding|>`` as padding.

    Raises:
        ConfigurationError: The vocabulary is too small for bytes, or the texts do not hold enough merges for it.
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
    """Load what `train_tokenizer` made and ``tokenizer.save`` wrote.

    Raises:
        ConfigurationError: The file is not a tokenizer.
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
    if not SMALLEST_VOCABULARY <= vocab_size <= LARGEST_VOCABULARY:
        raise ConfigurationError(
            f"vocab_size {vocab_size}: a byte-level BPE needs at least {SMALLEST_VOCABULARY} "
            f"(256 bytes, 2 special tokens, 1 merge) and at most {LARGEST_VOCABULARY:,}"
        )


def load_tokenizer(name: str, vocab_size: int) -> PreTrainedTokenizerFast:
    """Load a tokenizer and see that it fits the model.

    Args:
        name: A ``tokenizer.json``, a folder with one, or a Hugging Face model name.
        vocab_size: Rows of the model's embedding.

    Raises:
        ConfigurationError: It cannot be loaded, has no end-of-text token, has more tokens than ``vocab_size``, or
            needs very much memory, time or tokens for a short text.
    """
    check_there(name)
    path = local_path(name, "tokenizer")
    if path.exists():
        _check_files(path)
    try:
        if path.is_file():
            tokenizer: Any = PreTrainedTokenizerFast(tokenizer_file=str(path))
        else:
            source = str(path) if path.is_dir() else name
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except BaseException as error:  # tokenizers raises bare Exception and panics, the hub client many types
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigurationError(
            f"tokenizer {name!r}: cannot be loaded ({reason}); give a tokenizer.json, a folder that holds one, or a "
            "Hugging Face model name"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ConfigurationError(f"tokenizer {name!r}: {type(tokenizer).__name__} has no tokenizer.json (fast) form")
    _settle_special_tokens(tokenizer, name)
    if (size := tokens_in(tokenizer)) > vocab_size:
        raise ConfigurationError(
            f"tokenizer {name!r}: {size} tokens do not fit vocab_size {vocab_size}; set vocab_size to at least {size}"
        )
    check_encoding(tokenizer, repr(name))
    return tokenizer


def _check_files(path: Path) -> None:
    """Refuse a tokenizer's files that are no regular ones, or whose numbers ask for loops and lists without bound."""
    if path.is_dir():
        check_folder_files(path, "tokenizer folder")
        files = sorted(path.glob("*token*.json"))
    else:
        files = [path]
    for file in files:
        content = read_json(file, "tokenizer")
        if file.name == "tokenizer.json" or file == path:
            check_tokenizer_json(content, str(file))
            continue
        pending = [("", content)]
        while pending:
            name, value = pending.pop()
            if isinstance(value, dict):
                pending += value.items()
            elif isinstance(value, list):
                pending += [(name, item) for item in value]
            elif type(value) is int and value > MOST_EXTRA_TOKENS and not name.endswith("max_length"):
                raise ConfigurationError(f"tokenizer {str(file)!r}: {name} is {value}, more than {MOST_EXTRA_TOKENS:,}")


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
    growth, pending = 1, [content.get("normalizer"), content.get("pre_tokenizer"), content.get("decoder")]
    while pending:
        step = pending.pop()
        if isinstance(step, dict):
            replacement = step.get("content")
            growth *= max(1, len(replacement)) if isinstance(replacement, str) else 1
            pending += step.values()
        elif isinstance(step, list):
            pending += step
    if growth > MOST_GROWTH:
        raise ConfigurationError(f"tokenizer {where}: its replacements make a text up to {growth} times as long")
    added = content.get("added_tokens")
    ids = [token.get("id") for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    model = content.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    ids += vocabulary.values() if isinstance(vocabulary, dict) else []
    largest = max((number for number in ids if type(number) is int), default=0)
    if largest >= _LARGEST_NUMBER:
        raise ConfigurationError(f"tokenizer {where}: token {largest} does not fit 31 bits")


def tokens_in(tokenizer: PreTrainedTokenizerFast) -> int:
    """Largest token plus one; added tokens need not follow the vocabulary without a gap."""
    return max(tokenizer.get_vocab().values()) + 1


def _settle_special_tokens(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    if tokenizer.eos_token_id is None:
        vocabulary = tokenizer.get_vocab()
        end = next((token for token in _KNOWN_ENDS if token in vocabulary), None)
        if end is None:
            raise ConfigurationError(
                f"tokenizer {name!r}: no end-of-text token to join documents with; set eos_token in its "
                f"tokenizer_config.json, or add one of {', '.join(_KNOWN_ENDS)}"
            )
        tokenizer.eos_token = end
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token


def canonical_json(tokenizer: PreTrainedTokenizerFast) -> str:
    """The tokenizer's JSON with sorted keys, without the truncation and padding that calls leave behind in it."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["truncation"] = content["padding"] = None
    return json.dumps(content, sort_keys=True, separators=(",", ":"))


def fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """Sha256 of `canonical_json`: equal exactly when the two turn text into the same tokens."""
    return hashlib.sha256(canonical_json(tokenizer).encode()).hexdigest()


def tokenizer_state(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """A tokenizer as plain values, for a checkpoint. Inverse of `tokenizer_from_state`."""
    names = ("eos_token", "bos_token", "pad_token", "unk_token")
    special = {name: str(token) for name in names if (token := getattr(tokenizer, name)) is not None}
    template = tokenizer.chat_template
    return {
        "tokenizer": canonical_json(tokenizer),
        "tokenizer_fingerprint": fingerprint(tokenizer),
        "special_tokens": special,
        "chat_template": template if isinstance(template, str) else None,
    }


def tokenizer_from_state(state: dict[str, Any]) -> PreTrainedTokenizerFast:
    """Rebuild the tokenizer that a checkpoint carries.

    Args:
        state: ``TextData.state_dict()``, in a checkpoint under the key ``TextData``.

    Raises:
        ConfigurationError: The state holds no tokenizer, not the one its fingerprint names, or one that needs very
            much memory, time or tokens for a short text.
    """
    try:
        check_data_state(state)
        check_tokenizer_json(json.loads(state["tokenizer"]), "of the checkpoint")
        backend = Tokenizer.from_str(state["tokenizer"])
        vocabulary = backend.get_vocab()
        for name, token in state["special_tokens"].items():
            if name not in _SPECIAL_NAMES or token not in vocabulary:
                raise ConfigurationError(f"special token {name!s:.40} {token!s:.40} is none of its own")
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **state["special_tokens"])
        expected = state["tokenizer_fingerprint"]
    except BaseException as error:  # tokenizers raises bare Exception, and panics
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        raise ConfigurationError(f"the checkpoint's data state holds no readable tokenizer ({error!r:.200})") from error
    if (found := fingerprint(tokenizer)) != expected:
        raise ConfigurationError(
            f"the checkpoint's tokenizer has sha {found[:12]}, its state says {str(expected)[:12]}"
        )
    check_encoding(tokenizer, "of the checkpoint")
    tokenizer.chat_template = state.get("chat_template")
    return tokenizer


def tokenizer_difference(state: dict[str, Any], tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> str | None:
    """Say how a checkpoint's tokenizer differs from this run's: with another one its embedding means other tokens.

    Args:
        state: ``TextData.state_dict()`` from the checkpoint.
        tokenizer: This run's tokenizer.
        vocab_size: This run's vocabulary.

    Returns:
        The difference and what to do about it; None where there is none.
    """
    saved, found = str(state.get("tokenizer_fingerprint")), fingerprint(tokenizer)
    if saved == found:
        return None
    settings = state.get("settings", {})
    inputs = ", ".join(f"{name} {settings.get(name)!r:.200}" for name in ("source", "vocab_size", "seed"))
    return (
        f"the tokenizer of this run (vocab {vocab_size}, sha {found[:12]}) differs from the checkpoint's (vocab "
        f"{state.get('vocab_size')!s:.20}, sha {saved[:12]}): set tokenizer to the one exported with the checkpoint, "
        f"or use what it was trained from: {inputs}"
    )
