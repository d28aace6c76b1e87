"""Chat rows as users have them: every key reaches the template or is refused, and weight 0 is not trained."""

import json
import logging

import pytest

from orthotrain.data import InstructionData
from orthotrain.data.instructions.causal import CausalEncoder
from orthotrain.data.instructions.examples import Columns, keys_of_rows, parse_row
from orthotrain.data.instructions.sources import read_examples
from orthotrain.data.tokenizers import train_tokenizer
from orthotrain.errors import ConfigurationError

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"city": "text"}}}]
TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}<{{ m.role }}>\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls %}<call>{{ call.function.name }} {{ ARGUMENTS }}</call>{% endfor %}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)
AS_JSON = TEMPLATE.replace("ARGUMENTS", "call.function.arguments | tojson")
AS_TEXT = TEMPLATE.replace("ARGUMENTS", "call.function.arguments")
PLAIN = AS_JSON.replace("m.tool_calls", "[]").replace("m.reasoning_content", "false").replace("if tools", "if false")
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
CONVERSATION = [
    {"role": "user", "content": "How is Paris?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None},
    {"role": "tool", "tool_call_id": "1", "content": "sun"},
    {"role": "assistant", "content": [{"type": "text", "text": "Sunny."}], "reasoning_content": "sun is good"},
]


@pytest.fixture(scope="module")
def encoder_of():
    """Returns the one encoder for a template."""
    known = {}

    def make(template):
        if template not in known:
            tokenizer = train_tokenizer(["how is the sun in Paris, the city?"] * 2, 270)
            tokenizer.chat_template = template
            known[template] = CausalEncoder(tokenizer)
        return known[template]

    return make


def trained(encoder, row):
    """The whole text of a row, and the text in the loss."""
    (encoded,) = encoder(parse_row(row, "row", Columns()))
    decode = encoder.tokenizer.decode
    return decode(encoded.tokens), decode([t for t, y in zip(encoded.tokens, encoded.targets, strict=True) if y])


@pytest.mark.parametrize("template", [AS_JSON, AS_TEXT], ids=["template writes JSON", "template copies text"])
def test_tools_calls_results_and_reasoning_are_trained(encoder_of, template):
    text, loss = trained(encoder_of(template), {"messages": CONVERSATION, "tools": TOOLS, "id": 7})
    call = '<call>weather {"city": "Paris"}</call><|endoftext|>'
    assert text.startswith(f"<tools>{json.dumps(TOOLS)}\n<user>\nHow is Paris?\n<assistant>\n{call}\n<tool>\nsun\n")
    assert loss == f"{call}<think>sun is good</think>Sunny.<|endoftext|>"


def test_weight_0_stays_in_the_text_and_out_of_the_loss(encoder_of):
    talk = [("user", "a", None), ("assistant", "wrong", 0), ("user", "b", 0), ("assistant", "right", 1)]
    messages = [{"role": role, "content": content, "weight": weight} for role, content, weight in talk]
    text, loss = trained(encoder_of(AS_JSON), {"messages": messages})
    assert "wrong" in text and loss == "right<|endoftext|>"


@pytest.mark.parametrize(
    ("row", "dropped"),
    [
        ({"messages": CONVERSATION}, "'tool_calls' of message 2 (role 'assistant')"),
        ({"messages": CONVERSATION[:1] + CONVERSATION[3:]}, "'reasoning_content' of message 2"),
        ({"messages": [CONVERSATION[0], {"role": "assistant", "content": "b"}], "tools": TOOLS}, "'tools'"),
    ],
)
def test_a_key_that_the_template_drops_is_refused_by_name(encoder_of, row, dropped):
    with pytest.raises(ConfigurationError, match=r"does not write .* ignored_keys to \[") as caught:
        trained(encoder_of(PLAIN), row)
    assert f"does not write {dropped}" in str(caught.value)


def test_content_beside_calls_and_of_roles_that_the_template_does_not_know_is_refused(encoder_of):
    either = AS_JSON.replace("{{ m.content }}", "{{ m.content if not m.tool_calls }}")
    both = [CONVERSATION[0], {"role": "assistant", "content": "I look.", "tool_calls": [CALL]}]
    with pytest.raises(ConfigurationError, match="does not write 'content' of message 2"):
        trained(encoder_of(either), {"messages": both})
    users = AS_JSON.replace("in messages", "in messages if m.role in ('user', 'assistant')")
    with pytest.raises(ConfigurationError, match=r"does not write 'content' of message 3 \(role 'tool'\)"):
        trained(encoder_of(users), {"messages": CONVERSATION})


@pytest.mark.parametrize(("part", "dropped"), [("[:1]", 2), ("[-1:]", 1), ("[:2]", 3)])
def test_an_item_of_a_list_that_the_template_drops_is_refused_by_its_number(encoder_of, part, dropped):
    encoder, count = encoder_of(AS_JSON.replace("m.tool_calls", f"(m.tool_calls or []){part}")), max(dropped, 2)
    calls = [{"function": {"name": f"weather{number}", "arguments": {}}} for number in range(count)]
    tools = [{"type": "function", "function": {"name": f"weather{number}"}} for number in range(count)]
    row = {"messages": [CONVERSATION[0], {"role": "assistant", "tool_calls": calls[:1]}]}
    assert "weather" in trained(encoder, row)[1], "one call is written"
    row["messages"][1]["tool_calls"] = calls
    with pytest.raises(ConfigurationError, match=f"does not write item {dropped} of 'tool_calls' of message 2"):
        trained(encoder, row)
    row = {"messages": [CONVERSATION[0], {"role": "assistant", "content": "b"}], "tools": tools}
    with pytest.raises(ConfigurationError, match=f"does not write item {dropped} of 'tools'"):
        trained(encoder_of(AS_JSON.replace("tools |", f"tools{part} |")), row)


MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
SYSTEM = {"role": "system", "content": "s"}
CALLED = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]}
LAYOUTS = {
    "openai": ({"messages": MESSAGES}, MESSAGES),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "chatgpt", "value": "b"}], "system": "s"},
        [SYSTEM, *MESSAGES],
    ),
    "sharegpt with tools": (
        {
            "conversations": [
                {"from": "human", "value": "a"},
                {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                {"from": "observation", "value": "2"},
                {"from": "gpt", "value": "b"},
            ],
            "tools": json.dumps(TOOLS),
        },
        [MESSAGES[0], {**CALLED, "content": ""}, {"role": "tool", "content": "2"}, MESSAGES[1]],
    ),
    "openai with functions": (
        {
            "messages": [
                MESSAGES[0],
                {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x": 1}'}},
                {"role": "function", "name": "f", "content": "2"},
                MESSAGES[1],
            ]
        },
        [MESSAGES[0], {**CALLED, "content": ""}, {"role": "tool", "name": "f", "content": "2"}, MESSAGES[1]],
    ),
    "alpaca": ({"instruction": "a", "input": "x", "output": "b"}, [{**MESSAGES[0], "content": "a\n\n### Input:\nx"}]),
    "dolly": (
        {"instruction": "a", "context": "x", "response": "b"},
        [{**MESSAGES[0], "content": "a\n\n### Input:\nx"}],
    ),
    "alpaca without input": ({"instruction": "a", "input": "", "output": "b"}, MESSAGES),
    "completion": ({"prompt": "a", "completion": "b", "id": 3, "source": "web"}, MESSAGES),
    "completion of messages": ({"prompt": MESSAGES + MESSAGES[:1], "completion": MESSAGES[1:]}, MESSAGES * 2),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_of_rows(name):
    row, messages = LAYOUTS[name]
    example = parse_row(row, "row", Columns())
    assert list(example.messages)[: len(messages)] == messages
    assert example.untrained == ({1} if name == "completion of messages" else set())
    assert len(example.tools) == (name == "sharegpt with tools")


@pytest.mark.parametrize("pair", [("instruction", "output"), ("prompt", "response"), ("question", "answer")])
def test_keys_of_a_conversation_that_are_not_used_are_refused_by_name(pair):
    names = {} if pair[0] == "instruction" else {"prompt": pair[0], "response": pair[1]}
    row, inputs = dict(zip(pair, "ab", strict=True)), ("instruction", "input", "context") if names else ()
    for key in ("functions", "history", "chat_template_kwargs", *inputs):
        assert key in keys_of_rows(Columns(**names)), "a file's other columns are not read"
        with pytest.raises(ConfigurationError, match=f"^row: '{key}' is not used; .* name it in ignored_keys"):
            parse_row({**row, key: [["c", "d"]]}, "row", Columns(**names))
        ignored = parse_row({**row, key: "c"}, "row", Columns(**names, ignored=(key,)))
        empty = parse_row({**row, key: "  "}, "row", Columns(**names))
        assert ignored.messages == empty.messages == tuple(MESSAGES)
    assert parse_row({**row, "id": 5}, "row", Columns(**names)).turns == [1], "some other column"


def test_the_context_of_a_named_pair_is_not_lost():
    columns = Columns(prompt="instruction", response="response")
    assert "x" in parse_row(LAYOUTS["dolly"][0], "row", columns).messages[0]["content"]
    assert parse_row({"context": "a", "response": "b"}, "row", Columns("context")).messages == tuple(MESSAGES)
    chat = {"messages": MESSAGES, "context": "x", "history": []}
    assert parse_row(chat, "row", Columns()).messages == tuple(MESSAGES), "messages say all"


@pytest.fixture
def make_data(tmp_path):
    train_tokenizer(["the fox"], 260).save_pretrained(tmp_path / "tokenizer")

    def make(rows, **options):
        (tmp_path / "rows.json").write_text(json.dumps(rows))
        return InstructionData(
            str(tmp_path / "tokenizer"), str(tmp_path / "rows.json"), val_fraction=0.0, batch_size=1, **options
        )

    return make


def test_empty_answers_are_left_out_and_counted(make_data, caplog):
    rows = [{"instruction": "a", "input": "", "output": output} for output in ("b", "", " \n", None)]
    data = make_data(rows)
    with caplog.at_level(logging.INFO):
        data.setup("fit")
    assert (data.rows_used, data.rows_dropped) == (1, 3)
    assert "1 rows used, 3 dropped" in caplog.text and "3 left out as they have an empty answer" in caplog.text


def test_the_first_ten_rows_with_faults_and_their_number_are_said(make_data):
    bad = [{"prompt": " ", "response": "b"}, {"prompt": "a", "response": 3}]
    with pytest.raises(ConfigurationError) as caught:
        make_data([{"prompt": "a", "response": "b"}, *bad * 6]).setup("fit")
    listed = ", ".join(f"row {number}" for number in range(2, 12))
    assert "rows.json, row 2, 'prompt': is empty" in str(caught.value)
    assert str(caught.value).endswith(f"(12 rows cannot be used: {listed} and 2 more)")


def test_objects_of_parquet_have_no_keys_of_other_objects(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet

    calls = [{"function": {"name": "f", "arguments": {key: 1}}} for key in ("x", "y")]
    rows = [[MESSAGES[0], {"role": "assistant", "content": None, "tool_calls": [call]}] for call in calls]
    pyarrow.parquet.write_table(pa.table({"messages": rows}), tmp_path / "rows.parquet")
    for example, call in zip(read_examples(str(tmp_path / "rows.parquet"), Columns()), calls, strict=True):
        assert example.messages[1]["tool_calls"] == [call]
