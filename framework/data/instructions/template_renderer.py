"""Chat templates rendered in a process of bounded memory and time, because they are programs of a file's author."""

import re
import weakref
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from orthotrain.console.limited_process import end, first_line, limit_seconds, receive, start

MEMORY_BYTES = 512 << 20
"""Memory of the process beyond the memory of its parent."""
SECONDS, SECONDS_PER_ROW, SECONDS_PER_CHARACTER = 20.0, 0.01, 2e-6
"""Processor time of the process: a constant, and a share for each row and character, many times the usual time."""
MAX_CHARACTERS = 16 << 20
"""Longest text that a template may write."""

Request = tuple[Sequence[dict[str, Any]], bool]
"""A conversation, and whether the text ends with the generation prompt."""

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class Rendered(NamedTuple):
    """The text of a conversation, and where its template marks responses.

    Attributes:
        text: The text.
        responses: First and last character (exclusive) of each ``{% generation %}`` block that was written; None for a
            template without such blocks.
    """

    text: str
    responses: list[tuple[int, int]] | None


class TemplateError(Exception):
    """A template refuses a conversation, or exceeds a limit; the message is one line."""


class LimitError(TemplateError):
    """A template needs more memory or time than it gets."""


class TemplateRenderer:
    """Renders conversations with a tokenizer's chat template, in a forked process that its limits can end.

    A template may loop forever, or double a string until no memory is left; the sandbox of transformers limits neither.
    The process starts at the first call, only renders, and ends with this object.

    Args:
        tokenizer: The tokenizer with the chat template.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._stop: weakref.finalize | None = None
        self._seconds = SECONDS

    def __call__(self, requests: Sequence[Request], tools: Sequence[Any] = ()) -> list[Rendered]:
        """Render the conversations of a row.

        Args:
            requests: The conversations.
            tools: The tools that the template gets with each conversation.

        Raises:
            TemplateError: The template refuses a conversation; `LimitError` if it exceeds a limit.
        """
        if self._stop is None:
            tokenizer = self._tokenizer  # a reference to self would keep this object, and with it the process, alive
            self._child = start(lambda connection: _serve(connection, tokenizer), MEMORY_BYTES)
            self._stop = weakref.finalize(self, end, *self._child)
        _, connection = self._child
        characters = sum(len(str(message)) for messages, _ in requests for message in messages)
        self._seconds += SECONDS_PER_ROW + SECONDS_PER_CHARACTER * characters
        try:
            connection.send((list(requests), list(tools), self._seconds))
            fine, answer = receive(connection)
        except (EOFError, OSError):
            cause, self._stop = self._stop(), None
            raise LimitError(cause) from None
        if not fine:
            raise TemplateError(answer)
        return answer


def _serve(connection: Connection, tokenizer: Any) -> None:
    while True:
        try:
            requests, tools, seconds = connection.recv()
        except EOFError:
            return
        limit_seconds(seconds)
        try:
            answer: tuple[bool, Any] = (
                True,
                [_render(tokenizer, chat, prompt, tools) for chat, prompt in requests],
            )
        except MemoryError:
            answer = False, f"it needs more than {MEMORY_BYTES >> 20} MiB of memory"
        except Exception as error:  # templates are programs: they raise errors of jinja2 and of their own
            answer = False, first_line(error)
        connection.send(answer)


def _render(
    tokenizer: Any, messages: Sequence[dict[str, Any]], add_generation_prompt: bool, tools: list[Any]
) -> Rendered:
    from transformers.utils.chat_template_utils import render_jinja_template

    template = tokenizer.get_chat_template(None, tools or None)
    marked = bool(_GENERATION.search(template))
    written: Any = render_jinja_template(
        [list(messages)],
        tools=tools or None,
        chat_template=template,
        return_assistant_tokens_mask=marked,
        add_generation_prompt=add_generation_prompt,
        **tokenizer.special_tokens_map,
    )
    (text,), spans = written
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"it writes {len(text):,} characters, more than {MAX_CHARACTERS:,}")
    return Rendered(str(text), [(int(start), int(end)) for start, end in spans[0]] if marked else None)
