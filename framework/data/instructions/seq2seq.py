"""Rows for encoder-decoders: the encoder reads the prompt, the decoder writes the response."""

import numpy as np
from transformers import PreTrainedTokenizerFast

from orthotrain.data.instructions.examples import EncodedExample, Example, check_pair, check_template
from orthotrain.data.instructions.row_faults import RowFault
from orthotrain.data.instructions.token_rows import TokenRows
from orthotrain.data.tokenizer_checks import encoding_with


class Seq2SeqEncoder:
    """Tokenizes a prompt and its response apart, each with the special tokens that the tokenizer puts around a text.

    Both end with the end-of-text token; the encoder adds it if the tokenizer does not write it. All tokens of the
    response are to be predicted, also a special token at its beginning (``<s>`` of BART, which its generation forces).

    Args:
        tokenizer: Turns text into tokens.
        prompt_template: Text around a prompt, which replaces ``{prompt}``; by default the prompt alone.

    Raises:
        ConfigurationError: ``prompt_template`` does not contain ``{prompt}``.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, prompt_template: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.prompt_template = check_template("{prompt}" if prompt_template is None else prompt_template)

    def __call__(self, example: Example) -> list[EncodedExample]:
        """Tokenize an example to one row.

        Raises:
            RowFault: The example holds chat messages, tools or a system message.
        """
        if example.is_chat:
            raise RowFault(
                f"{example.where}: has chat messages, but layout 'seq2seq' takes one prompt and one response; give "
                "rows of prompt and response, or set layout to 'causal'"
            )
        check_pair(example, "layout 'seq2seq'")
        prompt, response = (message["content"] for message in example.messages)
        source = self._closed(text=self.prompt_template.replace("{prompt}", prompt))
        target = self._closed(text_target=response)
        targets = [False] * len(source) + [True] * len(target)
        return [EncodedExample(source + target, targets, len(source), response)]

    def _closed(self, **text: str) -> list[int]:
        # without verbose=False, transformers warns of texts that are truncated later
        with encoding_with(self.tokenizer):
            tokens = list(self.tokenizer(**text, verbose=False)["input_ids"])
        end = self.tokenizer.eos_token_id
        return tokens if tokens[-1:] == [end] else [*tokens, end]


class Seq2SeqRows(TokenRows):
    """Rows whose prompt the encoder reads and whose response the decoder predicts."""

    prompt_padding = "right"

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, prompt and response, int64."""
        return super().lengths + 1

    def inputs_and_labels(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a row's prompt ``(S,)`` and response ``(T,)``, int64.

        The labels are not shifted: the network makes the decoder's inputs from them.
        """
        tokens, prompt_length = self.tokens(row), self._prompt_lengths[row]
        return tokens[:prompt_length], tokens[prompt_length:]
