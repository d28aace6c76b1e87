"""Special tokens that a text spells: they would be taken for the real ones."""

import re

from transformers import PreTrainedTokenizerFast

from orthotrain.data.instructions.rows import Example


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
