"""How many bytes of text each token of a tokenizer stands for."""

import json
import re
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerFast

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_SPACE = "\u2581"
"""The character that stands for a space in the tokens of sentencepiece."""


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Return the UTF-8 bytes of each token, int64 of shape ``(V,)``; special tokens have none.

    The tokens of a byte-level tokenizer spell bytes, and the tokens of sentencepiece spell text or one byte
    (``<0x0A>``), so that the bytes of the tokens of a text add up to the bytes of the text. A tokenizer that changes
    the text (lower case, no spaces between words) makes tokens with fewer bytes than the text has.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    steps = json.dumps([content[part] for part in ("normalizer", "pre_tokenizer", "decoder")], ensure_ascii=False)
    model = content["model"]
    added = tokenizer.added_tokens_decoder
    special = {number for number, token in added.items() if token.special} | set(tokenizer.all_special_ids)
    vocabulary = tokenizer.get_vocab()
    table = torch.zeros(max(vocabulary.values()) + 1, dtype=torch.int64)
    for token, number in vocabulary.items():
        if number in added:
            table[number] = 0 if number in special else _length(token)
        elif number not in special:
            table[number] = _spelled(token, model, '"ByteLevel"' in steps, _SPACE in steps)
    return table


def _spelled(token: str, model: dict[str, Any], byte_level: bool, marks_spaces: bool) -> int:
    """Return the bytes of a token of the vocabulary, whose characters are spelled in one of three ways."""
    token = token.removeprefix(model.get("continuing_subword_prefix") or "")
    if suffix := model.get("end_of_word_suffix"):
        token = token.replace(suffix, "\u0120" if byte_level else " ")
    if byte_level and _BYTES.issuperset(token):
        return len(token)
    if model.get("byte_fallback") and _BYTE.fullmatch(token):
        return 1
    return _length(token.replace(_SPACE, " ") if marks_spaces else token)


def _length(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


_BYTES = frozenset(pre_tokenizers.ByteLevel.alphabet())
"""The characters that spell the 256 bytes; ``Ġ`` spells a space."""
