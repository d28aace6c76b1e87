"""Tokenizers of files that would compute without end, multiply a text or panic: one line for each."""

import json

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from orthotrain.data import tokenizer_checks, tokenizer_from_state
from orthotrain.data.corpus.documents import Document
from orthotrain.data.corpus.tokenizing import encode_documents
from orthotrain.data.instructions.causal import CausalEncoder
from orthotrain.data.instructions.examples import Example
from orthotrain.data.instructions.seq2seq import Seq2SeqEncoder
from orthotrain.data.tokenizer_state import tokenizer_state
from orthotrain.data.tokenizers import END_OF_TEXT, load_tokenizer, train_tokenizer
from orthotrain.errors import ConfigurationError

TEXTS = ["the theme of the thesis is there\n" * 5, "def other(this):\n    return this.then\n" * 5]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 280)


def altered(tokenizer, change):
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    change(content)
    return content


HOSTILE = {
    "token of 2^31": lambda c: c["model"]["vocab"].update(beyond=2**31),
    "added token of 2^31": lambda c: c["added_tokens"][0].update(id=2**31),
    "added token of 2^70": lambda c: c["added_tokens"][0].update(id=2**70),
    "no vocabulary": lambda c: c["model"].update(vocab=5),
    "no model": lambda c: c.pop("model"),
    "unknown model": lambda c: c["model"].update(type="Evil"),
    "doubling": lambda c: c.update(
        normalizer={
            "type": "Sequence",
            "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 40,
        }
    ),
    "long replacement": lambda c: c.update(
        normalizer={"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10**6}
    ),
}


def replacing(pattern, times):
    replace = {"type": "Replace", "pattern": {"Regex": pattern}, "content": "x"}
    return lambda c: c.update(normalizer={"type": "Sequence", "normalizers": [replace] * times})


def beginning(tokens, times):
    """Returns a change that lets a text begin with ``tokens`` special tokens, ``times`` times."""
    special = {"id": "<|endoftext|>", "ids": [0] * tokens, "tokens": ["<|endoftext|>"] * tokens}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    return lambda c: c.update(
        post_processor={
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}] * times + [text],
            "pair": [text, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<|endoftext|>": special},
        }
    )


def splitting(pattern):
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return lambda c: c.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [split, c["pre_tokenizer"]]})


ENDLESS = {
    "empty pattern": replacing("", 34),
    "pattern that matches nothing too": replacing("q*", 40),
    "look-behind": replacing("(?<=x)", 34),
    "10^8 special tokens": beginning(1000, 100_000),
    "65 special tokens": beginning(65, 1),
    "backtracking": splitting(r"(\w+\s?)+#"),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_tokenizers_that_multiply_any_text_are_one_line(tokenizer, tmp_path, bounded, capfd, monkeypatch, name):
    monkeypatch.setattr(tokenizer_checks, "_SECONDS", 0.5)
    content = altered(tokenizer, ENDLESS[name])
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    said = bounded(lambda: load_tokenizer(str(path), 1 << 31), memory=4 << 30)
    assert str(said).startswith(f"ConfigurationError: tokenizer {str(path)!r}: ") and "\n" not in said
    assert capfd.readouterr().err == "", "the libraries' own words stay in the process that tries"


def test_a_checkpoint_with_such_a_tokenizer_is_one_line(tokenizer, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(altered(tokenizer, beginning(65, 1))))
    loaded = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), eos_token=END_OF_TEXT)
    with pytest.raises(ConfigurationError, match="^tokenizer of the checkpoint: makes 65 tokens from a text of 0 char"):
        tokenizer_from_state(tokenizer_state(loaded))


def test_special_tokens_of_usual_number_pass(tokenizer, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(altered(tokenizer, beginning(2, 2))))
    assert load_tokenizer(str(tmp_path / "tokenizer.json"), 300).encode("") == [0] * 4


def test_a_vocabulary_for_few_texts_is_loaded_and_named_at_a_text_that_it_cannot_encode(tmp_path):
    words = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="none"))
    words.save(str(tmp_path / "words.json"))
    loaded = load_tokenizer(str(tmp_path / "words.json"), 300)
    ((_, tokens, _),) = encode_documents([Document("x", "a")], loaded)
    assert tokens == [0, 1]
    with pytest.raises(ConfigurationError, match=r"^tokenizer.*: cannot encode a text \(.*UNK"):
        list(encode_documents([Document("x", "b")], loaded))


@pytest.fixture
def backtracking(tokenizer, tmp_path):
    """A tokenizer that panics at a long run of one rare letter."""
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(altered(tokenizer, splitting(r"(ж+\s?)+#"))))
    return load_tokenizer(str(path), 300)


def test_a_panic_is_one_line_wherever_texts_are_encoded(backtracking):
    text, panics = "ж" * 60 + "!#", pytest.raises(ConfigurationError, match=r"^tokenizer.*: cannot encode a text \(")
    with panics:
        list(encode_documents([Document("x", text)] * 3, backtracking))
    row = Example("row 1", ({"role": "user", "content": text}, {"role": "assistant", "content": "a"}), is_chat=False)
    for encoder in (CausalEncoder(backtracking), Seq2SeqEncoder(backtracking)):
        with panics:
            encoder(row)


def test_a_panic_at_a_prompt_is_one_line(make_data, backtracking, tmp_path):
    data = make_data(tokenizer=str(tmp_path / "tokenizer.json"), vocab_size=300, predict_prompts=["ж" * 60 + "!#"])
    data.prepare_data()
    data.setup("predict")
    with pytest.raises(ConfigurationError, match=r"^tokenizer.*: cannot encode a text \("):
        data.predict_dataloader()


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_tokenizers_are_one_line(tokenizer, tmp_path, bounded, name):
    tokenizer.save_pretrained(tmp_path)
    content = altered(tokenizer, HOSTILE[name])
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        said = bounded(lambda path=path: load_tokenizer(str(path), 1 << 31))
        assert str(said).startswith("ConfigurationError: tokenizer") and "\n" not in said
    state = {**tokenizer_state(tokenizer), "tokenizer": json.dumps(content)}
    said = bounded(lambda: tokenizer_from_state(state))
    assert str(said).startswith("ConfigurationError: the checkpoint's data state holds no readable tokenizer")


@pytest.mark.parametrize("content", ["5", "[]", '"x"', "[" * 100_000, "", "\0", "null"])
def test_what_is_no_tokenizer_is_one_line(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(ConfigurationError, match="tokenizer"):
        load_tokenizer(str(path), 300)


def test_numbers_in_the_settings_that_count_tokens_are_bounded(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "extra_ids": 10**9, "model_max_length": 10**30}))
    with pytest.raises(ConfigurationError, match=r"extra_ids is 1000000000, more than"):
        load_tokenizer(str(tmp_path), 300)
