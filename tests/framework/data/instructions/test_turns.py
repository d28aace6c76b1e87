"""Responses in templates whose generation prompt is no prefix of the finished conversation, or that change history."""

import pytest

from orthotrain.data.instructions.causal import CausalEncoder
from orthotrain.data.instructions.examples import Columns, parse_row
from orthotrain.data.instructions.layouts import CausalLayout
from orthotrain.data.instructions.tokenizing import tokenize_rows
from orthotrain.data.tokenizers import train_tokenizer
from orthotrain.errors import ConfigurationError

SPECIAL = ["<|user|>", "<|assistant|>", "<|end|>", "<|return|>", "<think>", "</think>"]
LOOP = "{% for m in messages %}<|{{ m.role }}|>"
PROMPT = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
THINKING = "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
LAST_THOUGHT = THINKING.replace("if m.reasoning_content", "if m.reasoning_content and loop.last")

TEMPLATES = {
    # the generation prompt opens a thought, which finished conversations do not have
    "open thought": LOOP + "{{ m.content }}<|end|>{% endfor %}" + PROMPT.replace("t|>{%", "t|><think>\n{%"),
    # only the last turn ends with the token that ends a text
    "end of the last turn": LOOP + "\n{{ m.content }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n"
    "{% else %}{{ eos_token }}{% endif %}",
    # another token ends the last turn
    "return": LOOP + "{{ m.content }}{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}"
    "{% endfor %}" + PROMPT,
    # thoughts of earlier turns are removed
    "thoughts of the last turn": LOOP + LAST_THOUGHT + "{{ m.content }}<|end|>{% endfor %}" + PROMPT,
    "generation": LOOP + "{% if m.role == 'assistant' %}{% generation %}" + THINKING + "{{ m.content }}<|end|>"
    "{% endgeneration %}{% else %}{{ m.content }}<|end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>{% endif %}",
}
EXPECTED = {
    "open thought": [["one<|end|>", "two<|end|><|endoftext|>"]],
    "end of the last turn": [["one<|end|>\n", "two<|end|>\n<|endoftext|>"]],
    "return": [["one<|return|><|endoftext|>"], ["two<|return|><|endoftext|>"]],
    "thoughts of the last turn": [[f"<think>{t}<|end|><|endoftext|>"] for t in ("A</think>one", "B</think>two")],
    "generation": [["<think>A</think>one<|end|>", "<think>B</think>two<|end|>"]],
}


@pytest.fixture(scope="module")
def make_tokenizer():
    def make(template):
        tokenizer = train_tokenizer(["one two what and why"] * 2, 260)
        tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
        tokenizer.chat_template = template
        return tokenizer

    return make


def example_of(thoughts):
    said = [("user", "what"), ("assistant", "one"), ("user", "why"), ("assistant", "two")]
    messages = [{"role": role, "content": content} for role, content in said]
    for index, thought in zip((1, 3), thoughts, strict=False):
        messages[index]["reasoning_content"] = thought
    return parse_row({"messages": messages}, "row", Columns())


def counted_texts(tokenizer, row):
    """The runs of tokens in the loss, each decoded."""
    runs, before = [], False
    for token, counts in zip(row.tokens, row.targets, strict=True):
        if counts:
            runs = [*runs, [token]] if not before else [*runs[:-1], [*runs[-1], token]]
        before = counts
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("name", TEMPLATES)
def test_both_responses_and_their_ends_count(name, make_tokenizer):
    tokenizer, thinks = make_tokenizer(TEMPLATES[name]), "reasoning" in TEMPLATES[name]
    rows = CausalEncoder(tokenizer)(example_of("AB" if thinks else ""))
    assert [counted_texts(tokenizer, row) for row in rows] == EXPECTED[name]
    for row, turn in zip(rows, (2, 4)[-len(rows) :], strict=True):
        messages = list(example_of("AB" if thinks else "").messages)
        whole = tokenizer.apply_chat_template(messages[:turn], tokenize=False)
        assert whole.startswith(tokenizer.decode(row.tokens).removesuffix("<|endoftext|>"))
        assert not row.targets[row.prompt_length - 1] and row.targets[row.prompt_length]


def test_a_generation_prompt_that_rows_do_not_have_is_said_once(make_tokenizer):
    encoder = CausalEncoder(make_tokenizer(TEMPLATES["open thought"]))
    with pytest.warns(UserWarning, match=r"ends a prompt for generation by '<think>\\n'") as said:
        encoder(example_of(""))
    assert len(said) == 1


def test_the_mask_of_generation_blocks_is_that_of_transformers(make_tokenizer):
    tokenizer, example = make_tokenizer(TEMPLATES["generation"]), example_of("AB")
    (row,) = CausalEncoder(tokenizer)(example)
    theirs = tokenizer.apply_chat_template(list(example.messages), return_assistant_tokens_mask=True, return_dict=True)
    length = len(row.tokens)
    assert theirs["input_ids"][:length] == row.tokens
    assert theirs["assistant_masks"] == [*map(int, row.targets), *[0] * (len(theirs["input_ids"]) - length)]


def test_conversations_that_become_several_rows_are_counted(make_tokenizer):
    encoder = CausalEncoder(make_tokenizer(TEMPLATES["return"]))
    rows, counts = tokenize_rows([example_of("")], encoder, lambda _: "train", CausalLayout(64), "error")
    assert (counts.used, counts.split, rows["train"].references) == (2, 1, ["one", "two"])
    assert "1 conversations became several rows, as the chat template changes earlier messages" in counts.summary()


CAPITALS = LOOP + "{{ m.content if loop.last else m.content | upper }}<|end|>{% endfor %}"


def test_a_response_moves_behind_the_prompt_that_inference_gives(make_tokenizer):
    tokenizer = make_tokenizer(CAPITALS + PROMPT)
    rows = CausalEncoder(tokenizer)(example_of(""))
    assert [tokenizer.decode(row.tokens) for row in rows] == [
        "<|user|>what<|end|><|assistant|>one<|end|><|endoftext|>",
        "<|user|>WHAT<|end|><|assistant|>ONE<|end|><|user|>why<|end|><|assistant|>two<|end|><|endoftext|>",
    ]
    assert [counted_texts(tokenizer, row) for row in rows] == [["one<|end|><|endoftext|>"], ["two<|end|><|endoftext|>"]]


def test_a_response_that_cannot_be_found_is_refused(make_tokenizer):
    encoder = CausalEncoder(make_tokenizer(CAPITALS + PROMPT.replace("t|>{%", "t|><think>{%")))
    with pytest.raises(ConfigurationError, match=r"^row: the chat template cannot be split before message 2, because"):
        encoder(example_of(""))
