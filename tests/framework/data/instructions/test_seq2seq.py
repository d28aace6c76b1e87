"""Rows for encoder-decoders: what the encoder reads, what the decoder predicts, and what is too long for either."""

import json
import logging
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import BartConfig, BartForConditionalGeneration, DataCollatorForSeq2Seq, PreTrainedTokenizerFast

from orthotrain.data import InstructionData
from orthotrain.data.instructions.examples import Columns, parse_row
from orthotrain.data.instructions.layouts import Seq2SeqLayout
from orthotrain.data.instructions.padding import PaddedRows, generation_batch
from orthotrain.data.instructions.tokenizing import tokenize_rows
from orthotrain.data.tokenizers import train_tokenizer
from orthotrain.errors import ConfigurationError

ROWS = [{"prompt": f"what follows {n}?" + " please" * (n % 9), "response": f"{n + 1}" * (1 + n % 3)} for n in range(80)]
TEXTS = [f"{row['prompt']} {row['response']}" for row in ROWS]
CHARACTERS = st.characters(exclude_categories=["C", "Z"], exclude_characters="<|") | st.just(" ")
PAIRS = st.lists(
    st.tuples(*2 * [st.text(CHARACTERS, min_size=1, max_size=20).filter(str.strip)]), min_size=1, max_size=5
)


def bart_tokenizer():
    """A small tokenizer that writes ``<s> text </s>``, as BART's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=8
    )


TOKENIZERS = {"bart": bart_tokenizer(), "bare": train_tokenizer(TEXTS, 300)}


def encoded(pairs, tokenizer, layout=None, on_too_long="error"):
    examples = [parse_row({"prompt": p, "response": r}, f"row {n}", Columns()) for n, (p, r) in enumerate(pairs)]
    layout = layout or Seq2SeqLayout(10_000, 10_000)
    return tokenize_rows(examples, layout.encoder(tokenizer, None), lambda _: "train", layout, on_too_long)


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=40, deadline=None)
@given(pairs=PAIRS)
def test_the_encoder_reads_the_prompt_and_the_labels_are_the_response(kind, pairs):
    tokenizer = TOKENIZERS[kind]
    rows, counts = encoded(pairs, tokenizer)
    assert counts.used == len(pairs)
    batch = PaddedRows(rows["train"], tokenizer.pad_token_id)[list(range(len(pairs)))]
    for (prompt, response), tokens, mask, labels in zip(
        pairs, batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True
    ):
        read, written = tokens[mask.bool()], labels[labels >= 0]
        assert tokenizer.decode(read, skip_special_tokens=True) == prompt
        assert tokenizer.decode(written, skip_special_tokens=True) == response
        for part in (read, written):
            assert (part == tokenizer.eos_token_id).nonzero().flatten().tolist() == [len(part) - 1]
        assert mask.diff().max() <= 0, "padding comes last"
        assert (tokens[len(read) :] == tokenizer.pad_token_id).all()
        assert (labels[len(written) :] == -100).all()


def test_batches_are_those_of_transformers():
    tokenizer = TOKENIZERS["bart"]
    pairs = [(row["prompt"], row["response"]) for row in ROWS[:7]]
    collate = DataCollatorForSeq2Seq(tokenizer)
    theirs = collate([dict(tokenizer(p, text_target=r, return_token_type_ids=False)) for p, r in pairs])
    ours = PaddedRows(encoded(pairs, tokenizer)[0]["train"], tokenizer.pad_token_id)[list(range(7))]
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name])


def tiny_bart():
    torch.manual_seed(0)
    return BartForConditionalGeneration(
        BartConfig(
            d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=24, decoder_ffn_dim=24, vocab_size=300,
            encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=64, init_std=0.5,
        )
    ).eval()  # fmt: skip


def test_the_network_sees_a_padded_row_as_if_it_were_alone():
    tokenizer, model = TOKENIZERS["bart"], tiny_bart()
    rows = encoded([(row["prompt"], row["response"]) for row in ROWS[3:8]], tokenizer)[0]["train"]
    dataset = PaddedRows(rows, tokenizer.pad_token_id)
    batch = dataset[[0, 1, 2, 3, 4]]
    with torch.no_grad():
        together = model(**batch)
        losses, counts = [], []
        for row in range(5):
            single = model(**dataset[[row]])
            counts.append(int((batch["labels"][row] >= 0).sum()))
            losses.append(single.loss * counts[-1])
            torch.testing.assert_close(together.logits[row, : counts[-1]], single.logits[0], rtol=1e-5, atol=1e-5)
    assert len(set(counts)) > 1
    torch.testing.assert_close(together.loss, sum(losses) / sum(counts), rtol=1e-5, atol=1e-5)


def test_prompts_to_answer_are_padded_for_the_encoder():
    tokenizer = TOKENIZERS["bart"]
    rows = encoded([("a", "b"), ("a longer prompt", "c")], tokenizer)[0]["train"]
    batch = generation_batch(rows, [0, 1], tokenizer.pad_token_id)
    assert batch["references"] == ["b", "c"]
    assert batch["input_ids"][0].tolist()[:4] == [*rows.prompt(0), tokenizer.pad_token_id]
    assert batch["attention_mask"].sum(1).tolist() == [len(rows.prompt(0)), len(rows.prompt(1))]


LONG = [("a", "b"), ("q" * 20, "b"), ("a", "z" * 20), ("q" * 20, "z" * 20)]


def test_prompts_and_responses_are_truncated_and_counted_apart():
    tokenizer = TOKENIZERS["bart"]
    rows, counts = encoded(LONG, tokenizer, Seq2SeqLayout(10, 6), "truncate")
    assert (counts.used, counts.dropped, counts.longest) == (4, 0, (22, 22))
    assert counts.truncated == {"max_length": 2, "max_response_length": 2}
    assert counts.summary() == (
        "4 rows used, 0 dropped; the longest has 22 prompt tokens and 22 response tokens; 2 truncated to max_length "
        "10; 2 truncated to max_response_length 6"
    )
    for row, (prompt, response) in enumerate(LONG):
        inputs, labels = rows["train"].inputs_and_labels(row)
        whole, answer = tokenizer(prompt)["input_ids"], tokenizer(response)["input_ids"]
        assert inputs.tolist() == (whole if len(prompt) == 1 else [*whole[:9], tokenizer.eos_token_id])
        assert labels.tolist() == answer[:6], "a response that is cut does not end"
        assert rows["train"].prompt(row) == inputs.tolist()


def test_rows_that_exceed_either_limit_are_dropped_or_an_error():
    tokenizer = TOKENIZERS["bart"]
    rows, counts = encoded(LONG, tokenizer, Seq2SeqLayout(10, 6), "drop")
    assert (counts.used, counts.dropped, len(rows["train"])) == (1, 3, 1)
    assert "3 dropped as too long for max_length 10 or max_response_length 6" in counts.summary()
    with pytest.raises(ConfigurationError, match=r"^row 1: 22 prompt tokens, longer than max_length 10; raise max_len"):
        encoded(LONG, tokenizer, Seq2SeqLayout(10, 6), "error")
    message = r"^row 1: 22 response tokens, longer than max_response_length 6; raise max_response_length"
    with pytest.raises(ConfigurationError, match=message):
        encoded(LONG[::2], tokenizer, Seq2SeqLayout(10, 6), "error")
    assert encoded(LONG, tokenizer, Seq2SeqLayout(22, 22), "error")[1].used == 4


@pytest.fixture
def make_data(tmp_path):
    TOKENIZERS["bart"].save_pretrained(tmp_path / "tokenizer")

    def make(rows=ROWS, **changes):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        options = {"layout": "seq2seq", "batch_size": 4, "val_fraction": 0.2, "max_length": 64}
        return InstructionData(str(tmp_path / "tokenizer"), str(tmp_path / "rows.jsonl"), **{**options, **changes})

    return make


def test_batches_group_rows_by_length_and_hold_each_once(make_data, caplog):
    data = make_data(max_response_length=16)
    with caplog.at_level(logging.INFO):
        data.setup("fit")
    assert "80 rows used, 0 dropped; the longest has" in caplog.text
    train, val = list(data.train_dataloader()), list(data.val_dataloader())
    texts = [
        data.tokenizer.decode(row[row >= 0], skip_special_tokens=True)
        for batch in train + val
        for row in batch["labels"]
    ]
    assert 0 <= data.rows_used - len(texts) < 4, "only what fills no batch is left out"
    assert Counter(texts) <= Counter(row["response"] for row in ROWS)
    read = sum(int(batch["attention_mask"].sum()) for batch in train)
    assert read / sum(batch["input_ids"].numel() for batch in train) > 0.85
    assert [b["input_ids"].tolist() for b in data.train_dataloader()] == [b["input_ids"].tolist() for b in train]


def test_the_prompt_template_surrounds_the_prompt(make_data):
    data = make_data(prompt_template="summarize: {prompt} =>", val_fraction=0.0, batch_size=80)
    data.setup("fit")
    (batch,) = data.train_dataloader()
    texts = data.tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
    assert sorted(texts) == sorted(f"summarize: {row['prompt']} =>" for row in ROWS)


REFUSED = {
    "layout": ({"layout": "prefix"}, "layout='prefix': choose one of causal, seq2seq"),
    "packing": ({"packing": True}, "packing True: layout 'seq2seq' has no packing"),
    "causal": ({"layout": "causal", "max_response_length": 9}, "max_response_length 9: layout 'causal' limits prompt"),
    "length": ({"max_response_length": 1}, "max_response_length 1: must be at least 2"),
    "template": ({"prompt_template": "Q:"}, "prompt_template 'Q:': has no place for the prompt"),
    "empty": ({"rows": [{"prompt": "a", "response": " "}]}, "no row is left: 0 rows used, 1 dropped"),
    "system": ({"rows": [{"system": "s", **ROWS[0]}]}, "row 1: layout 'seq2seq' does not write 'system'"),
    "keys": ({"rows": [{"prompt": "a"}]}, "row 1: has neither 'prompt' with 'response' nor 'messages'"),
    "chat": (
        {"rows": [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]},
        "row 1: has chat messages, but layout 'seq2seq' takes one prompt and one response",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused(name, make_data):
    arguments, message = REFUSED[name]
    with pytest.raises(ConfigurationError) as caught:
        make_data(**arguments).setup("fit")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
