"""Examples of instruction data: conversations, parsed from rows and checked, and the tokens made from them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orthotrain.data.row_files import check_text
from orthotrain.errors import ConfigurationError

ROLES = ("system", "user", "assistant")

Messages = tuple[tuple[str, str], ...]
"""Pairs of role and content."""


@dataclass(frozen=True)
class Columns:
    """Keys of a row.

    Attributes:
        prompt: Key of the prompt.
        response: Key of the response.
        messages: Key of the chat messages; they are used if a row has both forms.
    """

    prompt: str = "prompt"
    response: str = "response"
    messages: str = "messages"


@dataclass(frozen=True)
class Example:
    """One conversation that ends with the assistant.

    Attributes:
        where: File and row, for messages.
        messages: Pairs of role and content.
        is_chat: Whether the row holds messages, and not a pair of prompt and response.
    """

    where: str
    messages: Messages
    is_chat: bool

    @property
    def key(self) -> str:
        """The content, which decides the split of the row."""
        return json.dumps(self.messages, ensure_ascii=False)

    @property
    def reference(self) -> str:
        """The last response."""
        return self.messages[-1][1]


@dataclass(frozen=True)
class EncodedExample:
    """Tokens of a conversation; the last one is the end-of-text token of the last response.

    Attributes:
        tokens: Length N.
        targets: Length N; whether a token belongs to a response and is to be predicted.
        prompt_length: Tokens before the last response.
    """

    tokens: list[int]
    targets: list[bool]
    prompt_length: int


def check_template(prompt_template: str) -> str:
    """Return a template that contains ``{prompt}``.

    Raises:
        ConfigurationError: The template does not contain it.
    """
    if "{prompt}" not in prompt_template:
        raise ConfigurationError(
            f"prompt_template {prompt_template!r}: has no place for the prompt; write {{prompt}} where it goes"
        )
    return prompt_template


def parse_row(row: Any, where: str, columns: Columns) -> Example:
    """Turn a row into an example.

    Args:
        row: The row of a file or a dataset.
        where: File and row, for messages.
        columns: Keys of the row.

    Raises:
        ConfigurationError: Not an object, missing keys, not text, empty, or messages in a wrong order.
    """
    if not isinstance(row, Mapping):
        raise ConfigurationError(f"{where}: expected an object, found {type(row).__name__}; give one object a row")
    if row.get(columns.messages) is not None:
        return Example(where, _messages(row[columns.messages], f"{where}, {columns.messages!r}"), is_chat=True)
    if columns.prompt not in row or columns.response not in row:
        raise ConfigurationError(
            f"{where}: has neither {columns.prompt!r} with {columns.response!r} nor {columns.messages!r}; its keys are "
            f"{sorted(map(str, row))}; set prompt_column and response_column, or messages_column"
        )
    pair = zip(("user", "assistant"), (columns.prompt, columns.response), strict=True)
    return Example(where, tuple((role, _text(row[key], f"{where}, {key!r}")) for role, key in pair), is_chat=False)


def _text(value: Any, where: str) -> str:
    if not check_text(value, where).strip():
        raise ConfigurationError(f"{where}: is empty; give it some text or remove the row")
    return value


def _messages(value: Any, where: str) -> Messages:
    if not isinstance(value, list | tuple) or not value:
        found = "an empty list" if value in ([], ()) else type(value).__name__
        raise ConfigurationError(f"{where}: must be a list of messages, found {found}")
    messages = tuple(_message(message, f"{where}, message {number}") for number, message in enumerate(value, start=1))
    roles = [role for role, _ in messages]
    if roles[-1] != "assistant":
        raise ConfigurationError(f"{where}: ends with role {roles[-1]!r}; the last message must be the assistant's")
    if next((role for role in roles if role != "system"), "") != "user":
        raise ConfigurationError(f"{where}: the assistant speaks first; a message of role 'user' must come before")
    return messages


def _message(message: Any, where: str) -> tuple[str, str]:
    if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
        found = sorted(map(str, message)) if isinstance(message, Mapping) else type(message).__name__
        raise ConfigurationError(f"{where}: must be an object with 'role' and 'content', found {found}")
    if message["role"] not in ROLES:
        raise ConfigurationError(f"{where}: unknown role {message['role']!r}; known: {', '.join(ROLES)}")
    return message["role"], _text(message["content"], f"{where}, 'content'")
