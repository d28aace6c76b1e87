"""Prompts for a network that was trained on instruction data: a row without its answer, read as a row of training."""

from collections.abc import Mapping
from typing import Any

from orthotrain.data.instructions.examples import CHATS, PAIRS, Columns, Example, parse_row
from orthotrain.data.instructions.row_faults import RowFault

_ANSWER = "-"


def parse_prompt(row: Any, where: str, columns: Columns) -> Example:
    """Turn a row that the assistant has yet to answer into an example, whose last message is a placeholder.

    Args:
        row: An object as for :func:`~orthotrain.data.instructions.examples.parse_row`, whose response is not read; or a
            list of messages.
        where: File and row, for messages.
        columns: Keys of the rows of training. A row may also have the default keys.

    Raises:
        RowFault: As for ``parse_row``, or the conversation ends with the assistant.
    """
    row = {"messages": row} if isinstance(row, list) else row
    if not isinstance(row, Mapping):
        raise _no_prompt(where)
    if columns.prompt not in row and columns.messages not in row:
        columns = Columns(ignored=columns.ignored)
    named = (columns.prompt, columns.response)
    pairs = PAIRS if named == ("prompt", "response") else ()
    chat = next((key for key in (columns.messages, *CHATS) if row.get(key) is not None), None)
    if chat is not None:
        taken = {key for pair in (named, *pairs) for key in pair}
        row = {**{key: value for key, value in row.items() if key not in taken}, chat: _answered(row[chat])}
    else:
        prompt, response = next((pair for pair in (named, *pairs) if row.get(pair[0]) is not None), (None, ""))
        if prompt is None:
            raise _no_prompt(where)
        chats = isinstance(row[prompt], list)
        row = {**row, response: _answered([]) if chats else _ANSWER}
    example = parse_row(row, where, columns)
    if example.messages[-2]["role"] == "assistant":
        raise RowFault(f"{where}: the conversation ends with the assistant; remove its last message, or add the user's")
    return example


def _answered(messages: Any) -> Any:
    if not isinstance(messages, list):
        return messages  # parse_row says what is wrong with it
    return [*messages, {"role": "assistant", "content": _ANSWER}]


def _no_prompt(where: str) -> RowFault:
    return RowFault(f'{where}: has no prompt; write {{"prompt": text}}, or {{"messages": [...]}}')
