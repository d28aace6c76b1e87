"""Examples of instruction data: conversations, parsed from rows and checked, and the tokens made from them."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from orthotrain.data.instructions.messages import Message, check_order, is_empty, parse_messages, text_of
from orthotrain.data.instructions.row_faults import RowFault
from orthotrain.data.instructions.tool_results import order_results
from orthotrain.errors import ConfigurationError

ALPACA_INPUT = "\n\n### Input:\n"
"""The text between ``instruction`` and ``input`` of a row, as in the prompts of Alpaca."""

PAIRS = (("prompt", "completion"), ("instruction", "output"), ("instruction", "response"))
"""Keys of prompt and response that are known beside those that the user names."""
CHATS = ("conversations", "conversation")
_SYSTEM = ("system", "system_prompt")
_REFUSED = {"functions": "write them as 'tools'", "history": "write its rounds as 'messages'"}
_REFUSED["chat_template_kwargs"] = "a row cannot change the chat template"
_INPUTS = ("input", "context")
"""Keys whose text follows the ``instruction`` of a pair."""
_REFUSED_IN_PAIRS = {key: "write it into the prompt" for key in ("instruction", *_INPUTS)}


@dataclass(frozen=True)
class Columns:
    """Keys of a row.

    Attributes:
        prompt: Key of the prompt.
        response: Key of the response.
        messages: Key of the chat messages; they are used if a row has both forms.
        ignored: Keys of rows and messages to leave out.
    """

    prompt: str = "prompt"
    response: str = "response"
    messages: str = "messages"
    ignored: tuple[str, ...] = ()


def keys_of_rows(columns: Columns) -> tuple[str, ...]:
    """Return all keys that `parse_row` reads; a file's other columns need not be read."""
    pairs = (key for pair in PAIRS for key in pair)
    named = (columns.prompt, columns.response, columns.messages)
    return (*named, *pairs, *CHATS, *_SYSTEM, *_REFUSED, *_INPUTS, "tools")


@dataclass(frozen=True)
class Example:
    """One conversation that ends with the assistant.

    Attributes:
        where: File and row, for messages.
        messages: Objects with ``role``, ``content`` (text) and the other keys that the chat template gets.
        is_chat: Whether the row holds messages, and not a pair of prompt and response.
        tools: The tools that the chat template gets.
        untrained: Indices of the assistant's messages that do not count in the loss.
        group: The key of all examples that belong on one side of a split with this one; ``None`` if there are none.
    """

    where: str
    messages: tuple[Message, ...]
    is_chat: bool
    tools: tuple[Any, ...] = ()
    untrained: frozenset[int] = frozenset()
    group: str | None = None

    @property
    def key(self) -> str:
        """The group or else the content, which decides the split of the row."""
        if self.group is not None:
            return self.group
        content: list[Any] = [[message["role"], message["content"]] for message in self.messages]
        if self.tools or any(message.keys() != {"role", "content"} for message in self.messages):
            content = [*self.messages, *self.tools]
        return json.dumps(content, ensure_ascii=False)

    @property
    def turns(self) -> list[int]:
        """Indices of the assistant's messages that count in the loss."""
        return [
            index
            for index, message in enumerate(self.messages)
            if message["role"] == "assistant" and index not in self.untrained
        ]

    @property
    def is_empty(self) -> bool:
        """Whether a message of the assistant has neither text nor tool calls, or no message counts in the loss."""
        return not self.turns or any(is_empty(m) for m in self.messages if m["role"] == "assistant")

    def texts(self) -> Iterator[str]:
        """Yield all texts of the messages and the tools, also those inside tool calls."""
        pending: list[Any] = [value for message in self.messages for key, value in message.items() if key != "role"]
        pending += self.tools
        while pending:
            value = pending.pop()
            if isinstance(value, str):
                yield value
            elif isinstance(value, Mapping):
                pending += [*value.keys(), *value.values()]
            elif isinstance(value, list | tuple):
                pending += value


@dataclass(frozen=True)
class EncodedExample:
    """Tokens of a conversation; the last one is the end-of-text token of the last response.

    Attributes:
        tokens: Length N.
        targets: Length N; whether a token belongs to a response and is to be predicted.
        prompt_length: Tokens before the last response.
        reference: The last response.
    """

    tokens: list[int]
    targets: list[bool]
    prompt_length: int
    reference: str = ""


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


def check_pair(example: Example, reader: str) -> None:
    """Refuse an example that is more than a prompt and a response.

    Args:
        example: A row that is no chat.
        reader: The option that takes only a prompt and a response.

    Raises:
        RowFault: The row has tools or a system message.
    """
    extra = "'tools'" if example.tools else "'system'" if len(example.messages) > 2 else None
    if extra is not None:
        raise RowFault(
            f"{example.where}: {reader} does not write {extra}; train with a chat template, or name the key in "
            "ignored_keys"
        )


def parse_row(row: Any, where: str, columns: Columns) -> Example:
    """Turn a row into an example.

    A row has messages (OpenAI, or ShareGPT's ``conversations``), or a prompt and a response under the keys of
    ``columns``, ``prompt`` and ``completion``, Alpaca's ``instruction``, ``input`` and ``output``, or Dolly's
    ``instruction``, ``context`` and ``response``. ``tools`` and ``system`` belong to the conversation. Keys that would
    belong to it but are not used, such as ``history``, are refused; other keys of a row are not read.

    Args:
        row: The row of a file or a dataset.
        where: File and row, for messages.
        columns: Keys of the row.

    Raises:
        RowFault: Not an object, missing keys, not text, empty, or messages in a wrong order.
    """
    if not isinstance(row, Mapping):
        raise RowFault(f"{where}: expected an object, found {type(row).__name__}; give one object a row")
    row = {key: value for key, value in row.items() if key not in columns.ignored}
    prompt, response = _pair(row, columns)
    chats = (columns.messages,) if prompt == columns.prompt else (columns.messages, *CHATS)
    chat = next((key for key in chats if row.get(key) is not None), None)
    if chat is not None:
        messages, untrained = parse_messages(row[chat], f"{where}, {chat!r}", columns.ignored)
    elif prompt is None:
        raise RowFault(
            f"{where}: has neither {columns.prompt!r} with {columns.response!r} nor {columns.messages!r}; its keys are "
            f"{sorted(map(str, row))}; set prompt_column and response_column, or messages_column"
        )
    elif isinstance(row[prompt], list) and isinstance(row.get(response), list):
        chat = response
        before, _ = parse_messages(row[prompt], f"{where}, {prompt!r}", columns.ignored)
        after, untrained = parse_messages(row[response], f"{where}, {response!r}", columns.ignored)
        untrained = {len(before) + index for index in untrained}
        untrained |= {index for index, message in enumerate(before) if message["role"] == "assistant"}
        messages = before + after
    else:
        messages, untrained = _pair_messages(row, where, prompt, response), set()
    _refuse_unused(row, where, chat, prompt, response)
    for key in _SYSTEM:
        if system := row.get(key):
            messages, untrained = _with_system(messages, untrained, text_of(system, f"{where}, {key!r}"), where)
    place = where if chat is None else f"{where}, {chat!r}"
    check_order(messages, place)
    messages = order_results(messages, place)
    return Example(where, tuple(messages), chat is not None, _tools(row.get("tools"), where), frozenset(untrained))


def _pair(row: Mapping, columns: Columns) -> tuple[str | None, str]:
    """Return the keys of prompt and response, and None if a key is missing."""
    named = (columns.prompt, columns.response)
    known = (named, *PAIRS) if named == ("prompt", "response") else (named,)
    return next(((prompt, response) for prompt, response in known if {prompt, response} <= set(row)), (None, ""))


def _pair_messages(row: Mapping, where: str, prompt: str, response: str) -> list[Message]:
    text = text_of(row[prompt], f"{where}, {prompt!r}")
    if not text.strip():
        raise RowFault(f"{where}, {prompt!r}: is empty; give it some text or remove the row")
    for key in _inputs(row, prompt, response):
        more = text_of(row[key], f"{where}, {key!r}")
        text += ALPACA_INPUT + more if more.strip() else ""
    answer = text_of("" if row[response] is None else row[response], f"{where}, {response!r}")
    return [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]


def _inputs(row: Mapping, prompt: str | None, response: str) -> list[str]:
    """Return the keys of the texts that follow the prompt of a pair."""
    return [key for key in _INPUTS if prompt == "instruction" and key != response and row.get(key)]


def _refuse_unused(row: Mapping, where: str, chat: str | None, prompt: str | None, response: str) -> None:
    used, refused = {chat}, _REFUSED
    if chat in (None, response):
        used |= {prompt, response, *([] if chat else _inputs(row, prompt, response))}
        refused = _REFUSED | _REFUSED_IN_PAIRS
    for key, advice in refused.items():
        value = row.get(key)
        if key not in used and (value.strip() if isinstance(value, str) else value):
            raise RowFault(f"{where}: {key!r} is not used; {advice}, or name it in ignored_keys")


def _with_system(
    messages: list[Message], untrained: set[int], system: str, where: str
) -> tuple[list[Message], set[int]]:
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages], {index + 1 for index in untrained}
    if messages[0]["content"] != system:
        raise RowFault(f"{where}: 'system' differs from its message of role 'system'; remove one of them")
    return messages, untrained


def _tools(tools: Any, where: str) -> tuple[Any, ...]:
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise RowFault(f"{where}, 'tools': is text that is not JSON") from error
    if not tools or (isinstance(tools, str) and not tools.strip()):
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RowFault(f"{where}, 'tools': must be a list of objects, each the description of a tool")
    return tuple(tools)
