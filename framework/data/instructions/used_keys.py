"""Checks that a chat template writes what a row says: templates drop keys that they do not know without a word."""

import json
from collections.abc import Sequence
from typing import Any

from orthotrain.data.instructions.examples import Example
from orthotrain.data.instructions.messages import Message
from orthotrain.data.instructions.row_faults import RowFault
from orthotrain.data.instructions.turns import ChatTurns

_LINKS = {("tool", "tool_call_id"), ("tool", "name")}
"""Role and key of values that only say which call a result belongs to; the results are in the order of the calls."""


class UsedKeys:
    """Compares what a template writes with and without each key of a message.

    It does so once for each combination of keys and each length of a list.

    Args:
        turns: Renders conversations.
    """

    def __init__(self, turns: ChatTurns) -> None:
        self._turns = turns
        self._known: set[tuple[Any, ...]] = set()
        self._arguments_as_text: bool | None = None

    def messages(self, example: Example) -> list[Message]:
        """Return the messages as the template needs them.

        Most templates write the arguments of a tool call as JSON. Others copy them, and need JSON text.

        Raises:
            RowFault: The template would drop a key; the message names it.
        """
        messages = list(example.messages)
        called = next((index for index, message in enumerate(messages) if message.get("tool_calls")), None)
        if called is not None:
            if self._arguments_as_text is None:
                self._arguments_as_text = self._copies_arguments(example, messages[: called + 1])
            if self._arguments_as_text:
                messages = [_with_text_arguments(message) for message in messages]
        self._check(example, messages)
        return messages

    def _copies_arguments(self, example: Example, messages: list[Message]) -> bool | None:
        calls = [call.get("function", call) for call in messages[-1]["tool_calls"]]
        given = [str(call["arguments"]) for call in calls if call["arguments"]]
        try:
            (rendered,) = self._turns.render([(messages, False)], example)
        except RowFault:
            as_text = [*messages[:-1], _with_text_arguments(messages[-1])]
            self._turns.render([(as_text, False)], example)
            return True
        return any(text in rendered.text for text in given) if given else None

    def _check(self, example: Example, messages: list[Message]) -> None:
        for index, message in enumerate(messages):
            keys = [key for key, value in message.items() if key != "role" and value not in ("", None)]
            end = next(place for place in range(index, len(messages)) if messages[place]["role"] == "assistant") + 1
            for key in keys:
                known = (message["role"], key, _length(message[key]), *sorted(keys))
                if known in self._known or (message["role"], key) in _LINKS:
                    continue
                for part, value in _changes(key, message[key]):
                    other = {name: value if name == key else kept for name, kept in message.items()}
                    if value is None:
                        del other[key]
                    changed = [*messages[:index], other, *messages[index + 1 : end]]
                    if self._same(example, messages[:end], changed, example.tools):
                        what = f"{part}{key!r} of message {index + 1} (role {message['role']!r})"
                        raise RowFault(_dropped(example, what, key))
                self._known.add(known)
        end = next(place for place, message in enumerate(messages) if message["role"] == "assistant") + 1
        if example.tools and ("tools", len(example.tools)) not in self._known:
            for part, value in _changes("tools", list(example.tools)):
                if self._same(example, messages[:end], messages[:end], value or ()):
                    raise RowFault(_dropped(example, f"{part}'tools'", "tools"))
            self._known.add(("tools", len(example.tools)))

    def _same(self, example: Example, messages: Sequence[Message], others: Sequence[Message], tools: Any) -> bool:
        """Tell whether the template writes the same text for other messages and tools."""
        (text,) = self._turns.render([(messages, False)], example)
        try:
            return text == self._turns.render([(others, False)], example, tools)[0]
        except RowFault:
            return False


def _length(value: Any) -> int | None:
    return len(value) if isinstance(value, list) else None


def _changes(key: str, value: Any) -> list[tuple[str, Any]]:
    """Return what to compare a value with: the name of the part that is left out, and the value without it.

    Content is changed at both ends. A list is left out as a whole, without its first item and without its last one:
    some templates write one item of a list, or a few.
    """
    if key == "content":
        return [("", f"a{value}z")]
    if not isinstance(value, list) or len(value) < 2:
        return [("", None)]
    return [("", None), (f"item {len(value)} of ", value[:-1]), ("item 1 of ", value[1:])]


def _dropped(example: Example, what: str, key: str) -> str:
    advice = "take a tokenizer whose template writes it"
    if key != "content":
        advice += f", or set ignored_keys to [{key}] to train without it"
    return f"{example.where}: the chat template does not write {what}; {advice}"


def _with_text_arguments(message: Message) -> Message:
    if not (calls := message.get("tool_calls")):
        return message

    def as_text(call: dict[str, Any]) -> dict[str, Any]:
        if "function" in call:
            return {**call, "function": as_text(call["function"])}
        return {**call, "arguments": json.dumps(call["arguments"], ensure_ascii=False)}

    return {**message, "tool_calls": [as_text(call) for call in calls]}
