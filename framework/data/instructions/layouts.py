"""Layouts of a row: what of it the network reads, what it predicts, and how long both may be."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

from transformers import PreTrainedTokenizerFast

from orthotrain.data.instructions.chat import EncodedExample, ExampleEncoder
from orthotrain.data.instructions.rows import Example
from orthotrain.data.instructions.seq2seq import Seq2SeqEncoder, Seq2SeqRows
from orthotrain.data.instructions.token_rows import TokenRows
from orthotrain.errors import ConfigurationError, check_choice

LayoutName = Literal["causal", "seq2seq"]


class Encoder(Protocol):
    """Turns an example into tokens."""

    tokenizer: PreTrainedTokenizerFast

    def __call__(self, example: Example) -> EncodedExample:
        """Tokenize an example."""


@dataclass(frozen=True)
class Limit:
    """Most tokens of a part of a row.

    Attributes:
        argument: What sets it.
        tokens: The number.
        unit: What is counted.
    """

    argument: str
    tokens: int
    unit: str


class Layout(ABC):
    """How a conversation becomes a row of tokens, and how a row that is too long is cut.

    Attributes:
        limits: What is limited.
        rows: The storage of rows in this layout.
    """

    limits: tuple[Limit, ...]
    rows: ClassVar[type[TokenRows]]

    @abstractmethod
    def encoder(self, tokenizer: PreTrainedTokenizerFast, prompt_template: str | None) -> Encoder:
        """Return what tokenizes an example."""

    @abstractmethod
    def lengths(self, row: EncodedExample) -> tuple[int, ...]:
        """Return the length of a row to compare with each of ``limits``."""

    @abstractmethod
    def truncated(self, row: EncodedExample) -> EncodedExample:
        """Return a row cut to the limits; without targets if nothing to predict is left."""


class CausalLayout(Layout):
    """Prompt and response in one sequence, each token predicted from those before it.

    Args:
        max_length: Most inputs of a row.
    """

    rows = TokenRows

    def __init__(self, max_length: int) -> None:
        self.limits = (Limit("max_length", max_length, "tokens"),)

    def encoder(self, tokenizer: PreTrainedTokenizerFast, prompt_template: str | None) -> Encoder:
        """Return an `ExampleEncoder`."""
        return ExampleEncoder(tokenizer, prompt_template)

    def lengths(self, row: EncodedExample) -> tuple[int, ...]:
        """Return the number of inputs, one fewer than the tokens."""
        return (len(row.tokens) - 1,)

    def truncated(self, row: EncodedExample) -> EncodedExample:
        """Return a row without its end; its prompt length is 0 where that was cut into."""
        max_length = self.limits[0].tokens
        kept = slice(max_length + 1)
        whole_prompt = row.prompt_length <= max_length
        return EncodedExample(row.tokens[kept], row.targets[kept], row.prompt_length if whole_prompt else 0)


class Seq2SeqLayout(Layout):
    """The prompt for an encoder and the response for a decoder, tokenized, limited and padded apart.

    Args:
        max_length: Most tokens of a prompt, special ones included.
        max_response_length: Most tokens of a response, special ones included.
    """

    rows = Seq2SeqRows

    def __init__(self, max_length: int, max_response_length: int) -> None:
        self.limits = (
            Limit("max_length", max_length, "prompt tokens"),
            Limit("max_response_length", max_response_length, "response tokens"),
        )

    def encoder(self, tokenizer: PreTrainedTokenizerFast, prompt_template: str | None) -> Encoder:
        """Return a `Seq2SeqEncoder`."""
        return Seq2SeqEncoder(tokenizer, prompt_template)

    def lengths(self, row: EncodedExample) -> tuple[int, ...]:
        """Return the tokens of the prompt and of the response."""
        return row.prompt_length, len(row.tokens) - row.prompt_length

    def truncated(self, row: EncodedExample) -> EncodedExample:
        """Return a row whose prompt still ends with its last token; a response that is cut has no end to learn."""
        of_prompt, of_response = (limit.tokens for limit in self.limits)
        source, target = row.tokens[: row.prompt_length], row.tokens[row.prompt_length :][:of_response]
        if len(source) > of_prompt:
            source = [*source[: of_prompt - 1], source[-1]]
        return EncodedExample(source + target, [False] * len(source) + [True] * len(target), len(source))


def make_layout(name: LayoutName, max_length: int, max_response_length: int | None, packing: bool) -> Layout:
    """Return a layout by its name.

    Args:
        name: ``causal`` or ``seq2seq``.
        max_length: Most tokens of a row, or of a prompt.
        max_response_length: Most tokens of a response, None for ``max_length``; ``causal`` has no such limit.
        packing: Whether rows are to share a sequence, which ``seq2seq`` refuses.

    Raises:
        ConfigurationError: An unknown name, or what the layout does not have.
    """
    check_choice("layout", name, LayoutName)
    if name == "causal":
        if max_response_length is not None:
            raise ConfigurationError(
                f"max_response_length {max_response_length}: layout 'causal' limits prompt and response together; "
                "leave it unset and set max_length"
            )
        return CausalLayout(max_length)
    if packing:
        raise ConfigurationError(
            "packing True: layout 'seq2seq' has no packing, since attention from decoder to encoder would cross rows; "
            "set packing to false"
        )
    if max_response_length is not None and max_response_length < 2:
        raise ConfigurationError(f"max_response_length {max_response_length}: must be at least 2")
    return Seq2SeqLayout(max_length, max_length if max_response_length is None else max_response_length)
