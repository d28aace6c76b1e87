"""Layouts of a row: the tokens that the network reads, the tokens that it predicts, and the limits of both."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

from orthotrain.data.instructions.causal import CausalEncoder
from orthotrain.data.instructions.examples import EncodedExample
from orthotrain.data.instructions.seq2seq import Seq2SeqEncoder, Seq2SeqRows
from orthotrain.data.instructions.token_rows import TokenRows
from orthotrain.errors import ConfigurationError, check_choice

LayoutName = Literal["causal", "seq2seq"]
Encoder = CausalEncoder | Seq2SeqEncoder


@dataclass(frozen=True)
class Limit:
    """Most tokens of a part of a row.

    Attributes:
        argument: The argument that sets the limit.
        tokens: The limit.
        unit: What is counted.
    """

    argument: str
    tokens: int
    unit: str


class Layout(ABC):
    """How a conversation becomes a row of tokens, and how a row that is too long is cut.

    Attributes:
        limits: The limits of a row.
        encoder: The class that tokenizes examples, built from a tokenizer and a prompt template.
        rows: The class that stores rows in this layout.
    """

    limits: tuple[Limit, ...]
    encoder: ClassVar[type[CausalEncoder] | type[Seq2SeqEncoder]]
    rows: ClassVar[type[TokenRows]]

    @abstractmethod
    def lengths(self, row: EncodedExample) -> tuple[int, ...]:
        """Return the lengths of a row to compare with ``limits``."""

    @abstractmethod
    def truncated(self, row: EncodedExample) -> EncodedExample:
        """Return a row cut to the limits; without targets if nothing to predict is left."""


class CausalLayout(Layout):
    """Prompt and response in one sequence, each token predicted from the tokens before it.

    Args:
        max_length: Most inputs of a row.
    """

    encoder = CausalEncoder
    rows = TokenRows

    def __init__(self, max_length: int) -> None:
        self.limits = (Limit("max_length", max_length, "tokens"),)

    def lengths(self, row: EncodedExample) -> tuple[int, ...]:
        """Return the number of inputs: the last token is a label only."""
        return (len(row.tokens) - 1,)

    def truncated(self, row: EncodedExample) -> EncodedExample:
        """Return a row without its end; its prompt length is 0 if the prompt was cut."""
        max_length = self.limits[0].tokens
        kept = slice(max_length + 1)
        whole_prompt = row.prompt_length <= max_length
        prompt_length = row.prompt_length if whole_prompt else 0
        return EncodedExample(row.tokens[kept], row.targets[kept], prompt_length, row.reference)


class Seq2SeqLayout(Layout):
    """The prompt for an encoder and the response for a decoder, tokenized, limited and padded apart.

    Args:
        max_length: Most tokens of a prompt, with its special tokens.
        max_response_length: Most tokens of a response, with its special tokens.
    """

    encoder = Seq2SeqEncoder
    rows = Seq2SeqRows

    def __init__(self, max_length: int, max_response_length: int) -> None:
        self.limits = (
            Limit("max_length", max_length, "prompt tokens"),
            Limit("max_response_length", max_response_length, "response tokens"),
        )

    def lengths(self, row: EncodedExample) -> tuple[int, ...]:
        """Return the numbers of tokens of the prompt and of the response."""
        return row.prompt_length, len(row.tokens) - row.prompt_length

    def truncated(self, row: EncodedExample) -> EncodedExample:
        """Return a row whose prompt keeps its last token; a response that is cut has no end-of-text token to learn."""
        max_length, max_response_length = (limit.tokens for limit in self.limits)
        source, target = row.tokens[: row.prompt_length], row.tokens[row.prompt_length :][:max_response_length]
        if len(source) > max_length:
            source = [*source[: max_length - 1], source[-1]]
        targets = [False] * len(source) + [True] * len(target)
        return EncodedExample(source + target, targets, len(source), row.reference)


def make_layout(name: LayoutName, max_length: int, max_response_length: int | None, packing: bool) -> Layout:
    """Return the layout with a name.

    Args:
        name: ``causal`` or ``seq2seq``.
        max_length: Most tokens of a row, or of a prompt.
        max_response_length: Most tokens of a response; None means ``max_length``. ``causal`` has no such limit.
        packing: Whether several rows will share a sequence, which ``seq2seq`` refuses.

    Raises:
        ConfigurationError: An unknown name, or an argument that the layout does not have.
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
            "packing True: layout 'seq2seq' has no packing, because attention from the decoder to the encoder would "
            "cross rows; set packing to false"
        )
    if max_response_length is not None and max_response_length < 2:
        raise ConfigurationError(f"max_response_length {max_response_length}: must be at least 2")
    return Seq2SeqLayout(max_length, max_length if max_response_length is None else max_response_length)
