"""Rows of instruction data: what a row may look like, and the one line that says why it cannot be used."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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
        messages: Key of the chat messages; they win where a row has both forms.
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
        is_chat: Whether the row came as messages; a pair of prompt and response did not.
    """

    where: str
    messages: Messages
    is_chat: bool

    @property
    def key(self) -> str:
        """The content, which alone decides the row's split."""
        return json.dumps(self.messages, ensure_ascii=False)

    @property
    def reference(self) -> str:
        """The last response."""
        return self.messages[-1][1]


def parse_row(row: Any, where: str, columns: Columns) -> Example:
    """Turn a row into an example.

    Args:
        row: What the file or dataset holds.
        where: File and row, for messages.
        columns: The row's keys.

    Raises:
        ConfigurationError: Not an object, keys missing, not text, empty, or messages in an order that cannot be learnt.
    """
    if not isinstance(row, Mapping):
        raise ConfigurationError(f"{where}: expected an object, found {type(row).__name__}; give one object a row")
    if row.get(columns.messages) is not None:
        return Example(where, _messages(row[columns.messages], f"{where}, {columns.messages!r}"), is_chat=True)
    if columns.prompt not in row or columns.response not in row:
        raise ConfigurationError(
            f"{where}: neither {columns.prompt!r} with {columns.response!r} nor {columns.messages!r}; its keys are "
            f"{sorted(map(str, row))}; set prompt_column and response_column, or messages_column"
        )
    pair = zip(("user", "assistant"), (columns.prompt, columns.response), strict=True)
    return Example(where, tuple((role, _text(row[key], f"{where}, {key!r}")) for role, key in pair), is_chat=False)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise ConfigurationError(f"{where}: must be a string, found {type(value).__name__}; make it text or remove it")
    if not value.strip():
        raise ConfigurationError(f"{where}: is empty; give it some text or remove the row")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ConfigurationError(
            f"{where}: holds a lone surrogate at character {error.start}, which UTF-8 cannot store; remove it"
        ) from error
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
