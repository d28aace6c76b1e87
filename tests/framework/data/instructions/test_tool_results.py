"""Each call gets its own result, also where the template writes no ids."""

import pytest

from orthotrain.data.instructions.examples import Columns, parse_row
from orthotrain.errors import ConfigurationError


def call(number, name="f"):
    return {"id": number, "type": "function", "function": {"name": name, "arguments": {}}}


def result(content, **link):
    return {"role": "tool", "content": content, **link}


def contents(*turns, ignored=()):
    """The results of a row, in the order in which the template gets them."""
    messages = [{"role": "user", "content": "q"}]
    for calls, results in turns:
        messages += [{"role": "assistant", "content": None, "tool_calls": calls}, *results]
    row = {"messages": [*messages, {"role": "assistant", "content": "y"}]}
    example = parse_row(row, "row", Columns(ignored=ignored))
    return [message["content"] for message in example.messages if message["role"] == "tool"]


AB = [call("A", "f"), call("B", "g")]


def test_results_come_in_the_order_of_their_calls():
    swapped = [result("b", tool_call_id="B"), result("a", tool_call_id="A")]
    assert contents((AB, swapped)) == ["a", "b"]
    assert contents((AB, swapped), (AB, swapped)) == ["a", "b"] * 2, "ids may come again in later turns"
    assert contents((AB[:1], []), (AB[1:], swapped)) == ["a", "b"], "calls of two messages"
    assert contents((AB, [result("b", name="g"), result("a", name="f")])) == ["a", "b"]
    assert contents((AB, [result("b"), result("a")])) == ["b", "a"], "nothing says which call they belong to"
    names = [call(None, name) for name in "fgf"]
    assert contents((names, [result(str(place), name=name) for place, name in enumerate("fgf")])) == ["0", "1", "2"]
    assert contents((AB, swapped[1:])) == ["a"], "a call at the end may have no result"


def test_a_result_of_no_call_and_a_call_without_a_result_are_refused():
    other = [result("a", tool_call_id="A"), result("c", tool_call_id="C")]
    with pytest.raises(ConfigurationError, match=r"^row, 'messages', message 3: .* tool_call_id 'C' .* have \['B'\]"):
        contents((AB, other))
    assert contents((AB, other), ignored=("tool_call_id",)) == ["a", "c"]
    with pytest.raises(ConfigurationError, match="tool_call_id 'A' belongs to no call"):
        contents((AB, other[:1] * 2))
    with pytest.raises(ConfigurationError, match="the call 'A' has no result, but a call after it has one"):
        contents((AB, [result("b", tool_call_id="B")]))
