"""Which tokens count: the responses and the token that ends them, whatever the text and the template."""

import functools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from orthotrain.data.instructions.causal import CausalEncoder
from orthotrain.data.instructions.examples import Columns, parse_row
from orthotrain.data.instructions.layouts import CausalLayout
from orthotrain.data.instructions.token_rows import TokenRows
from orthotrain.data.instructions.tokenizing import tokenize_rows
from orthotrain.data.tokenizers import train_tokenizer
from orthotrain.errors import ConfigurationError

CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>\n{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)
NO_END_TEMPLATE = CHAT_TEMPLATE.replace("{{ eos_token }}", "")
CHARACTERS = st.characters(exclude_categories=["C", "Z"], exclude_characters="|") | st.just(" ")
TEXTS = st.text(CHARACTERS, min_size=1, max_size=30).filter(str.strip)


def make_tokenizer(template=None):
    texts = ["the quick brown fox\n\njumps over <user>\n<assistant>\n the lazy dog, the end of the story"] * 2
    tokenizer = train_tokenizer(texts, 280)
    tokenizer.chat_template = template
    return tokenizer


TOKENIZERS = {
    name: make_tokenizer(t) for name, t in (("plain", None), ("chat", CHAT_TEMPLATE), ("open", NO_END_TEMPLATE))
}


@functools.cache
def encoder_of(kind):
    """One encoder for all examples: its rendering process starts once."""
    return CausalEncoder(TOKENIZERS[kind])


def pair(prompt, response):
    return parse_row({"prompt": prompt, "response": response}, "row", Columns())


def chat(*contents, system=None):
    messages = [{"role": "system", "content": system}] if system else []
    roles = ("user", "assistant")
    messages += [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    return parse_row({"messages": messages}, "row", Columns())


def batch_row(encoder, example):
    rows, _ = tokenize_rows([example], encoder, lambda _: "train", CausalLayout(10_000), "error")
    return rows["train"].inputs_and_labels(0)


def counted_texts(tokenizer, labels):
    """The runs of labels that count, each decoded."""
    runs, run = [], []
    for label in [*labels.tolist(), -100]:
        if label >= 0:
            run.append(label)
        elif run:
            runs.append(tokenizer.decode(run))
            run = []
    return runs


@pytest.mark.parametrize("kind", sorted(TOKENIZERS))
@settings(max_examples=60, deadline=None)
@given(prompt=TEXTS, response=TEXTS)
def test_exactly_the_response_and_its_end_count(kind, prompt, response):
    tokenizer = TOKENIZERS[kind]
    inputs, labels = batch_row(encoder_of(kind), pair(prompt, response))
    after = "\n" if kind == "open" else ""  # the template closes a turn by a line break, which counts without an end
    assert counted_texts(tokenizer, labels) == [response + after + tokenizer.eos_token]
    assert labels[-1] == tokenizer.eos_token_id
    counts = labels >= 0
    assert (labels[:-1][counts[:-1]] == inputs[1:][counts[:-1]]).all()
    assert counts[counts.argmax() :].all()


@settings(max_examples=40, deadline=None)
@given(turns=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3), system=TEXTS)
def test_every_assistant_turn_counts(turns, system):
    contents = [text for turn in turns for text in turn]
    tokenizer = TOKENIZERS["chat"]
    inputs, labels = batch_row(encoder_of("chat"), chat(*contents, system=system))
    assert counted_texts(tokenizer, labels) == [text + tokenizer.eos_token for text in contents[1::2]]
    counts = labels[:-1] >= 0
    assert (labels[:-1][counts] == inputs[1:][counts]).all()
    whole = tokenizer.apply_chat_template(
        [{"role": "system", "content": system}]
        + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)],
        tokenize=False,
    )
    assert tokenizer.decode([*inputs.tolist(), labels[-1]]) + "\n" == whole


@settings(max_examples=40, deadline=None)
@given(prompt=TEXTS, response=TEXTS)
def test_the_prompt_is_tokenized_as_inference_does(prompt, response):
    tokenizer = TOKENIZERS["chat"]
    (row,) = encoder_of("chat")(pair(prompt, response))
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert row.tokens[: row.prompt_length] == tokenizer.encode(text, add_special_tokens=False)


def test_a_merge_across_the_seam_is_cut():
    tokenizer = train_tokenizer(["a\n\n\nb"] * 3, 259)
    assert len(tokenizer.encode("\n\n\nb")) == 3, "two of the three line breaks are one token"
    (row,) = CausalEncoder(tokenizer)(pair("the fox", "\n\nb"))
    assert tokenizer.decode(row.tokens[: row.prompt_length]) == "the fox\n"
    assert tokenizer.decode(row.tokens[row.prompt_length :]) == "\n\nb" + tokenizer.eos_token


def test_a_given_prompt_template_wins_over_the_chat_template():
    tokenizer = TOKENIZERS["chat"]
    (row,) = CausalEncoder(tokenizer, "Q: {prompt} {x}\nA:")(pair("why {prompt}?", " so"))
    assert tokenizer.decode(row.tokens[: row.prompt_length]) == "Q: why {prompt}? {x}\nA:"


def test_a_tokenizer_that_begins_texts_begins_plain_rows_too():
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|padding|> $A", special_tokens=[("<|padding|>", tokenizer.pad_token_id)]
    )
    tokenizer.bos_token = "<|padding|>"
    (row,) = CausalEncoder(tokenizer)(pair("the fox", "jumps"))
    assert row.tokens[0] == tokenizer.bos_token_id
    assert row.tokens.count(tokenizer.bos_token_id) == 1
    assert not row.targets[0]


def test_a_template_that_cannot_be_split_in_tokens_is_refused():
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=["</s>"], show_progress=False)
    backend.train_from_iterator(["the fox|jumps"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    with pytest.raises(ConfigurationError, match=r"cannot be split before 'jumps'.*newline or a special token"):
        CausalEncoder(tokenizer, "{prompt}|")(pair("the fox", "jumps"))


def test_a_template_that_raises_is_one_line():
    encoder = CausalEncoder(make_tokenizer("{{ raise_exception('roles must\nalternate') }}"))
    with pytest.raises(ConfigurationError, match=r"^row: the chat template refuses the messages \(roles must\)"):
        encoder(chat("one", "two"))


def test_text_that_spells_a_special_token_is_dropped_and_counted():
    encoder = CausalEncoder(TOKENIZERS["plain"])
    examples = [pair("what ends a text?", "<|endoftext|> does"), pair("the fox", "jumps")]
    rows, counts = tokenize_rows(examples, encoder, lambda _: "train", CausalLayout(100), "error")
    assert (len(rows["train"]), counts.used, counts.dropped, counts.special) == (1, 1, 1, 1)
    assert re.search(r"1 dropped as their text contains a special token \('<\|endoftext\|>' in row\)", counts.summary())


@pytest.mark.parametrize(("policy", "used", "dropped", "truncated"), [("drop", 1, 2, 0), ("truncate", 2, 1, 1)])
def test_long_rows_are_counted(policy, used, dropped, truncated):
    encoder = CausalEncoder(TOKENIZERS["plain"])
    examples = [pair("a", "b"), pair("a", "z" * 50), pair("q" * 50, "b")]
    rows, counts = tokenize_rows(examples, encoder, lambda _: "train", CausalLayout(20), policy)
    assert (counts.used, counts.dropped, counts.truncated["max_length"]) == (used, dropped, truncated)
    assert counts.longest == (52,)
    assert rows["train"].lengths.max() == (20 if policy == "truncate" else 3)
    assert "the longest has 52 tokens" in counts.summary()
    for row in range(used):
        inputs, labels = rows["train"].inputs_and_labels(row)
        assert (labels >= 0).any()
        assert len(inputs) == len(labels) <= 20


def test_truncation_inside_the_last_prompt_keeps_earlier_turns_but_asks_nothing():
    encoder = CausalEncoder(TOKENIZERS["chat"])
    rows, counts = tokenize_rows(
        [chat("a", "b", "q" * 100, "d")], encoder, lambda _: "train", CausalLayout(60), "truncate"
    )
    _, labels = rows["train"].inputs_and_labels(0)
    assert counted_texts(TOKENIZERS["chat"], labels) == ["b<|endoftext|>"]
    assert rows["train"].prompt(0) == []
    assert counts.truncated == {"max_length": 1}


def test_a_row_exactly_as_long_as_allowed_stays():
    encoder, example = CausalEncoder(TOKENIZERS["plain"]), pair("ab", "cd")
    length = len(encoder(example)[0].tokens) - 1
    assert tokenize_rows([example], encoder, lambda _: "train", CausalLayout(length), "error")[1].used == 1
    with pytest.raises(ConfigurationError, match=rf"^row: {length} tokens, longer than max_length {length - 1}"):
        tokenize_rows([example], encoder, lambda _: "train", CausalLayout(length - 1), "error")


def test_rows_keep_their_references():
    rows = TokenRows()
    encoder = CausalEncoder(TOKENIZERS["plain"])
    rows.append(*encoder(pair("ab", "cd")), "cd")
    assert (len(rows), rows.references) == (1, ["cd"])
    assert TOKENIZERS["plain"].decode(rows.prompt(0)) == "ab\n"
