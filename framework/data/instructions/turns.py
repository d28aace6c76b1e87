"""Where the responses are in the texts that a chat template writes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from orthotrain.data.instructions.examples import Example
from orthotrain.data.instructions.row_faults import RowFault
from orthotrain.data.instructions.template_renderer import (
    LimitError,
    Rendered,
    Request,
    TemplateError,
    TemplateRenderer,
)
from orthotrain.data.tokenizer_checks import encoding_with
from orthotrain.errors import ConfigurationError

Span = tuple[int, int]
"""First character of a response, and the character after its end."""


@dataclass
class Conversation:
    """A text that the chat template writes, and the responses in it.

    Attributes:
        text: The text of all messages up to the last response.
        responses: The responses that count in the loss.
        turn: Index of the message of the last response.
        marked: Whether the template itself marks the responses, by ``{% generation %}`` blocks.
    """

    text: str
    responses: list[Span]
    turn: int
    marked: bool


class ChatTurns:
    """Renders conversations with a tokenizer's chat template, and finds the responses in the text.

    A response is what the template marks by a ``{% generation %}`` block. In a template without these blocks, a
    response is the text after the generation prompt; if the finished text has another generation prompt, the response
    begins at the first token that differs.

    A template may write earlier messages in another way when later messages follow. The conversation then becomes
    several texts, so that each response comes after the text that inference gives to the network.

    Args:
        tokenizer: The tokenizer with the chat template.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        self._special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        self._renderer = TemplateRenderer(tokenizer)
        self._has_warned = False

    def __call__(self, example: Example, messages: Sequence[dict[str, Any]]) -> list[Conversation]:
        """Return the texts of an example.

        Args:
            example: The row.
            messages: The messages of the row as the template gets them.

        Raises:
            RowFault: The template refuses the messages, or a response cannot be found in the text.
        """
        both = [((messages[:turn], True), (messages[: turn + 1], False)) for turn in example.turns]
        rendered = self.render([request for pair in both for request in pair], example)
        found: list[Conversation] = []
        for turn, (prompt, _), answered in zip(example.turns, rendered[::2], rendered[1::2], strict=True):
            text, spans = answered.text, self._marked(prompt, answered, messages[turn]["content"])
            marked = spans is not None
            if spans is None:
                text, start = self._split(example, messages[:turn], prompt, answered.text)
                spans = [(start, len(text))]
            kept = self._shared(found[-1].text, text) if found else None
            if kept is None:
                found.append(Conversation(text, spans, turn, marked))
            else:
                earlier = [(start, min(end, kept)) for start, end in found[-1].responses]
                found[-1] = Conversation(text, earlier + spans, turn, marked)
        return found

    def render(
        self, requests: Sequence[Request], example: Example, tools: Sequence[Any] | None = None
    ) -> list[Rendered]:
        """Render conversations of a row.

        Raises:
            RowFault: The template refuses a conversation.
            ConfigurationError: The template needs too much memory or time.
        """
        try:
            return self._renderer(requests, example.tools if tools is None else tools)
        except TemplateError as error:
            owner = f" of tokenizer {name!r}" if (name := self._tokenizer.name_or_path) else ""
            kind = ConfigurationError if isinstance(error, LimitError) else RowFault
            raise kind(
                f"{example.where}: the chat template{owner} refuses the messages ({error}); change the messages or the "
                "tokenizer"
            ) from error

    def _marked(self, prompt: str, answered: Rendered, content: str) -> list[Span] | None:
        """Return the blocks of the last response; None if the template does not mark it."""
        if answered.responses is None:
            return None
        history = _shared_length(prompt, answered.text)
        spans = [(start, end) for start, end in answered.responses if end > max(history, start)]
        written = " ".join(answered.text[start:end] for start, end in spans)
        return spans if spans and all(word in written for word in content.split()[-1:]) else None

    def _split(
        self, example: Example, history: Sequence[dict[str, Any]], prompt: str, answered: str
    ) -> tuple[str, int]:
        """Return the text that ends with the last response, and the first character of this response.

        A template that changes the messages before the last one still writes the generation prompt before the response:
        the response then moves behind the prompt that inference gives.
        """
        if answered.startswith(prompt):
            return answered, len(prompt)
        (before,) = self.render([(history, False)], example)
        (asked, _), (plain, _), (whole, offsets) = map(self._encode, (prompt, before.text, answered))
        same = _shared_length(asked, whole)
        if _shared_length(asked, plain) <= same < len(whole):
            self._warn_of_prompt(self._backend.decode(asked[same:], skip_special_tokens=False))
            return answered, offsets[same][0]
        added = prompt.removeprefix(before.text)
        if added and added != prompt and added in answered:
            return prompt + answered[answered.rindex(added) + len(added) :], len(prompt)
        raise RowFault(
            f"{example.where}: the chat template cannot be split before message {len(history) + 1}, because it changes "
            "the messages before it; give rows of prompt and response, or a tokenizer whose template only appends or "
            "has generation blocks"
        )

    def _warn_of_prompt(self, end: str) -> None:
        """Warn once of a generation prompt that ends otherwise than the prompts of the rows."""
        if not self._has_warned:
            self._has_warned = True
            rank_zero_warn(
                f"the chat template ends a prompt for generation by {end!r}, which finished conversations do not have: "
                "the network learns to answer without it"
            )

    def _shared(self, earlier: str, later: str) -> int | None:
        """Return how much of a text the next text keeps; None if it changes more than the tokens behind the end.

        A template may close the last turn by ``<|end|><|endoftext|>``, and earlier turns by ``<|end|>`` alone.
        """
        if later.startswith(earlier):
            return len(earlier)
        (tokens, offsets), (others, _) = self._encode(earlier), self._encode(later)
        same = _shared_length(tokens, others)
        kept = [token for token in tokens[:same] if not self._is_space(token)]
        left = [token for token in tokens[same:] if not self._is_space(token)]
        closed = bool(kept) and kept[-1] in self._special and self._special.issuperset(left)
        return offsets[same][0] if closed else None

    def _is_space(self, token: int) -> bool:
        return self._backend.decode([token], skip_special_tokens=False).isspace()

    def _encode(self, text: str) -> tuple[list[int], list[Span]]:
        with encoding_with(self._tokenizer):
            encoding = self._backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets


def _shared_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Return how many items two sequences share at their beginning."""
    pairs = zip(first, second, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
