"""Results of tools in the order of their calls: most templates write no ids, so the order says which call is meant."""

from typing import Any

from orthotrain.data.instructions.messages import Message
from orthotrain.data.instructions.row_faults import RowFault

_ID, _NAME = "tool_call_id", "name"


def order_results(messages: list[Message], where: str) -> list[Message]:
    """Return the messages with each run of tool results in the order of the calls before it.

    ``tool_call_id`` says which call a result belongs to; in results without ids, ``name`` does. Results that have
    neither stay as they are.

    Args:
        messages: The messages of a row.
        where: File, row and key, for messages of errors.

    Raises:
        RowFault: A result belongs to no call, or a call before another call with a result has none.
    """
    if not any(message.get("tool_calls") for message in messages):
        return messages
    ordered: list[Message] = []
    calls: list[dict[str, Any]] = []
    run: list[Message] = []
    for index, message in enumerate(messages):
        if message["role"] == "tool":
            run.append(message)
            if index + 1 == len(messages) or messages[index + 1]["role"] != "tool":
                ordered += _in_order(run, calls, f"{where}, message {index + 2 - len(run)}")
                calls, run = calls[len(run) :], []
            continue
        calls = [*calls, *message.get("tool_calls", [])] if message["role"] == "assistant" else []
        ordered.append(message)
    return ordered


def _in_order(run: list[Message], calls: list[dict[str, Any]], where: str) -> list[Message]:
    key = next((key for key in (_ID, _NAME) if any(key in result for result in run)), None)
    if key is None:
        return run
    known = [call.get("id") if key == _ID else call.get("function", call)["name"] for call in calls]
    free, places = list(range(len(calls))), []
    for result in run:
        link = result.get(key)
        if (place := next((place for place in free if link is None or known[place] == link), None)) is None:
            raise RowFault(
                f"{where}: the result with {key} {link!r} belongs to no call; the calls before it that have no "
                f"result yet have {[known[place] for place in free]!r:.200}; correct the "
                f"row, or name {key} in ignored_keys"
            )
        free.remove(place)
        places.append(place)
    if sorted(places) != list(range(len(run))):
        missing = known[next(place for place in free if place < max(places))]
        raise RowFault(
            f"{where}: the call {missing!r} has no result, but a call after it has one; add it or remove the row"
        )
    return [result for _, result in sorted(zip(places, run, strict=True), key=lambda pair: pair[0])]
