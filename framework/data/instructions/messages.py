"""Messages of a chat row: the forms of OpenAI and ShareGPT become the messages that a chat template takes."""

import json
from collections.abc import Mapping
from typing import Any

from orthotrain.data.instructions.row_faults import RowFault
from orthotrain.data.row_files import check_text
from orthotrain.errors import ConfigurationError

ROLES = ("system", "developer", "user", "assistant", "tool")

Message = dict[str, Any]
"""Keys of a message that a template reads: ``role``, ``content`` (text), and others such as ``tool_calls``."""

_SHAREGPT_ROLES = {
    **{role: role for role in ROLES},
    **{"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant"},
    **{"function_call": "assistant", "tool_call": "assistant", "observation": "tool", "function_response": "tool"},
}
_MAY_BE_EMPTY = ("system", "tool")


def parse_messages(value: Any, where: str, ignored: tuple[str, ...] = ()) -> tuple[list[Message], set[int]]:
    """Turn the messages of a row into messages of text.

    Args:
        value: A list of objects with ``role`` and ``content`` (OpenAI), or with ``from`` and ``value`` (ShareGPT).
        where: File, row and key, for messages of errors.
        ignored: Keys to leave out.

    Returns:
        The messages, and the indices of the assistant's messages with ``weight: 0``. A key without a value is left out.

    Raises:
        RowFault: No list of messages, an unknown role, content that is not text, or tool calls that are no calls.
    """
    if not isinstance(value, list | tuple) or not value:
        found = "an empty list" if value in ([], ()) else type(value).__name__
        raise RowFault(f"{where}: must be a list of messages, found {found}; give objects with 'role' and 'content'")
    messages, untrained = [], set()
    for index, given in enumerate(value):
        place = f"{where}, message {index + 1}"
        message = _plain(given, place, ignored)
        if not _weight(message.pop("weight", None), message["role"], place):
            untrained.add(index)
        messages.append(message)
    return messages, untrained


def check_order(messages: list[Message], where: str) -> None:
    """Refuse a conversation that the assistant does not end, or that begins with the assistant.

    Raises:
        RowFault: The message names the role.
    """
    roles = [message["role"] for message in messages]
    if roles[-1] != "assistant":
        raise RowFault(
            f"{where}: ends with role {roles[-1]!r}; the last message must be the assistant's; remove what "
            "follows it, or the row"
        )
    if next((role for role in roles if role not in ("system", "developer")), "") != "user":
        raise RowFault(
            f"{where}: the assistant speaks first; a message of role 'user' must come before; remove "
            "the message or the row, or put a question before it"
        )


def text_of(value: Any, where: str) -> str:
    """Return a value that must be text.

    Raises:
        RowFault: The value is no string, or UTF-8 cannot store it.
    """
    try:
        return check_text(value, where)
    except ConfigurationError as error:
        raise RowFault(str(error)) from error


def is_empty(message: Message) -> bool:
    """Tell whether a message has neither text nor tool calls."""
    return not message["content"].strip() and not message.get("tool_calls")


def _plain(given: Any, where: str, ignored: tuple[str, ...]) -> Message:
    if not isinstance(given, Mapping) or not ({"role", "from"} & set(given)):
        found = sorted(map(str, given)) if isinstance(given, Mapping) else type(given).__name__
        raise RowFault(f"{where}: must be an object with 'role' and 'content', found {found}")
    message = {str(key): value for key, value in given.items() if value not in (None, [], {}) and key not in ignored}
    if "role" not in message:
        message = _from_sharegpt(message, where)
    role = message["role"] = "tool" if message.get("role") == "function" else message.get("role")
    if "function_call" in message and "tool_calls" not in message:  # the older form of OpenAI
        message["tool_calls"] = [{"type": "function", "function": message.pop("function_call")}]
    if role not in ROLES:
        raise RowFault(f"{where}: unknown role {role!r}; write one of these: {', '.join(ROLES)}")
    if "tool_calls" in message:
        message["tool_calls"] = _tool_calls(message["tool_calls"], f"{where}, 'tool_calls'")
    content = message.get("content", "" if role == "assistant" or "content" in ignored else given.get("content"))
    message["content"] = _content(content, f"{where}, 'content'")
    if is_empty(message) and role not in (*_MAY_BE_EMPTY, "assistant"):
        raise RowFault(f"{where}, 'content': is empty; give it some text or remove the row")
    return message


def _from_sharegpt(message: Message, where: str) -> Message:
    speaker, value = message.pop("from", None), message.pop("value", "")
    if speaker not in _SHAREGPT_ROLES:
        raise RowFault(f"{where}: unknown role {speaker!r}; write one of these: {', '.join(_SHAREGPT_ROLES)}")
    said = {"content": value}
    if speaker in ("function_call", "tool_call"):
        try:
            calls = json.loads(value)
        except (TypeError, ValueError, RecursionError) as error:
            raise RowFault(f"{where}: the value of {speaker!r} is not JSON; write name and arguments") from error
        calls = calls if isinstance(calls, list) else [calls]
        said = {"content": "", "tool_calls": [{"type": "function", "function": call} for call in calls]}
    return {"role": _SHAREGPT_ROLES[speaker], **said, **message}


def _content(value: Any, where: str) -> str:
    """Return the text of a message; OpenAI also writes it as a list of parts."""
    if not isinstance(value, list):
        return text_of(value, where)
    for part in value:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise RowFault(f"{where}: has a part of type {kind!r}; only parts of type 'text' can be used")
    return text_of("".join(part["text"] for part in value), where)


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Return tool calls whose arguments are objects: OpenAI writes them as JSON text, templates write them as JSON."""
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise RowFault(f"{where}: must be a list of calls")
    parsed = []
    for number, call in enumerate(calls, start=1):
        function = call.get("function", call)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RowFault(f"{where}, call {number}: must have a function with 'name' and 'arguments'")
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError) as error:
                raise RowFault(f"{where}, call {number}: the arguments are not JSON ({arguments:.60})") from error
        if not isinstance(arguments, Mapping):
            raise RowFault(f"{where}, call {number}: the arguments must be an object, found {arguments!r:.60}")
        called = {**function, "arguments": dict(arguments)}
        parsed.append({**call, "function": called} if "function" in call else called)
    return parsed


def _weight(weight: Any, role: str, where: str) -> bool:
    """Return whether a message counts in the loss."""
    if weight is None or weight in (0, 1):
        if weight and role != "assistant":
            raise RowFault(f"{where}: has weight 1, but only the assistant's messages can be trained; remove the key")
        return weight is None or bool(weight) or role != "assistant"
    raise RowFault(f"{where}: has weight {weight!r}; give 0 (not in the loss) or 1")
