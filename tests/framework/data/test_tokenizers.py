import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from orthotrain.data import tokenizer_from_state
from orthotrain.data.corpus.readers import Document
from orthotrain.data.corpus.tokenizing import encode
from orthotrain.data.instructions.chat import ExampleEncoder
from orthotrain.data.instructions.rows import Example
from orthotrain.data.instructions.seq2seq import Seq2SeqEncoder
from orthotrain.data.tokenizers import (
    END_OF_TEXT,
    PADDING,
    SMALLEST_VOCABULARY,
    fingerprint,
    load_tokenizer,
    tokenizer_difference,
    tokenizer_state,
    train_tokenizer,
)
from orthotrain.errors import ConfigurationError

TEXTS = ["the theme of the thesis is there\n" * 5, "def other(this):\n    return this.then\n" * 5]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 280)


def test_training_is_repeatable_and_lossless(tokenizer):
    assert len(tokenizer) == 280
    assert fingerprint(tokenizer) == fingerprint(train_tokenizer(TEXTS, 280))
    for text in ("the ", "\tß 漢字 🎉\r\n\x01", "<|endoftext|>"):
        assert tokenizer.decode(tokenizer.encode(text), clean_up_tokenization_spaces=False) == text
    assert (tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token) == (END_OF_TEXT, END_OF_TEXT, PADDING)


def test_the_fingerprint_does_not_see_what_calls_leave_behind(tokenizer):
    before = fingerprint(tokenizer)
    tokenizer(["a", "bcd"], padding=True, truncation=True, max_length=2)
    assert fingerprint(tokenizer) == before


def test_the_end_of_text_written_in_a_document_is_text(tokenizer):
    ((_, tokens, size),) = encode([Document("x", "a<|endoftext|>b")], tokenizer)
    assert tokens.count(tokenizer.eos_token_id) == 1 and tokens[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(tokens[:-1]) == "a<|endoftext|>b" and size == 15
    assert tokenizer.encode("<|endoftext|>") == [tokenizer.eos_token_id], "as before outside of documents"


def test_vocabularies_that_cannot_be_trained():
    with pytest.raises(ConfigurationError, match=f"vocab_size 258: .* at least {SMALLEST_VOCABULARY}"):
        train_tokenizer(TEXTS, 258)
    with pytest.raises(ConfigurationError, match=r"vocab_size 5000: the train text only yields (\d+) tokens") as caught:
        train_tokenizer(TEXTS, 5000)
    attainable = int(str(caught.value).split("yields ")[1].split()[0])
    assert len(train_tokenizer(TEXTS, attainable)) == attainable


def test_a_checkpoint_carries_the_tokenizer_as_plain_values(tokenizer):
    tokenizer.chat_template = "{{ messages }}"
    state = json.loads(json.dumps(tokenizer_state(tokenizer)))
    again = tokenizer_from_state(state)
    tokenizer.chat_template = None
    assert isinstance(again, PreTrainedTokenizerFast) and again.chat_template == "{{ messages }}"
    assert again("the thesis")["input_ids"] == tokenizer("the thesis")["input_ids"]
    assert (again.eos_token_id, again.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    for broken in ({}, state | {"tokenizer": "{}"}, state | {"tokenizer_fingerprint": "0" * 64}):
        with pytest.raises(ConfigurationError, match="tokenizer"):
            tokenizer_from_state(broken)


def test_another_tokenizer_names_both(tokenizer):
    state = tokenizer_state(tokenizer) | {
        "vocab_size": 280,
        "settings": {"source": "here", "vocab_size": 280, "seed": 0},
    }
    assert tokenizer_difference(state, tokenizer, 280) is None
    other = train_tokenizer(TEXTS, 270)
    message = tokenizer_difference(state, other, 270)
    assert all(
        part in message for part in ("vocab 270", "vocab 280", fingerprint(other)[:12], fingerprint(tokenizer)[:12])
    )
    assert "source 'here'" in message


def test_loading_a_folder_a_file_and_what_does_not_fit(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "folder")
    for name in (tmp_path / "folder", tmp_path / "folder" / "tokenizer.json"):
        loaded = load_tokenizer(str(name), 300)
        assert fingerprint(loaded) == fingerprint(tokenizer) and loaded.eos_token_id == tokenizer.eos_token_id
    with pytest.raises(
        ConfigurationError, match="280 tokens do not fit vocab_size 256; set vocab_size to at least 280"
    ):
        load_tokenizer(str(tmp_path / "folder"), 256)


def test_tokenizers_that_cannot_be_used(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "tokenizer.json").write_text("{}")
    for name in (str(tmp_path / "tokenizer.json"), str(tmp_path), str(tmp_path / "missing")):
        with pytest.raises(ConfigurationError, match="cannot be loaded|no file or folder"):
            load_tokenizer(name, 300)
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "words.json"))
    with pytest.raises(ConfigurationError, match="no end-of-text token"):
        load_tokenizer(str(tmp_path / "words.json"), 300)


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
def test_tokenizers_that_multiply_any_text_are_one_line(tokenizer, tmp_path, bounded, capfd, name):
    content = altered(tokenizer, ENDLESS[name])
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    said = bounded(lambda: load_tokenizer(str(path), 1 << 31), memory=4 << 30)
    assert str(said).startswith(f"ConfigurationError: tokenizer {str(path)!r}: ") and "\n" not in said
    assert capfd.readouterr().err == "", "the libraries' own words stay in the process that tries"


def test_a_checkpoint_with_such_a_tokenizer_is_one_line(tokenizer, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(altered(tokenizer, beginning(65, 1))))
    loaded = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), eos_token=END_OF_TEXT)
    with pytest.raises(ConfigurationError, match="^tokenizer of the checkpoint: makes 65 tokens of a text of 0 char"):
        tokenizer_from_state(tokenizer_state(loaded))


def test_special_tokens_of_usual_number_pass(tokenizer, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(altered(tokenizer, beginning(2, 2))))
    assert load_tokenizer(str(tmp_path / "tokenizer.json"), 300).encode("") == [0] * 4


def test_a_vocabulary_for_few_texts_is_loaded_and_named_at_a_text_that_it_cannot_encode(tmp_path):
    words = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="none"))
    words.save(str(tmp_path / "words.json"))
    loaded = load_tokenizer(str(tmp_path / "words.json"), 300)
    ((_, tokens, _),) = encode([Document("x", "a")], loaded)
    assert tokens == [0, 1]
    with pytest.raises(ConfigurationError, match=r"^tokenizer.*: cannot encode a text \(.*UNK"):
        list(encode([Document("x", "b")], loaded))


@pytest.fixture
def backtracking(tokenizer, tmp_path):
    """A tokenizer that panics at a long run of one rare letter."""
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(altered(tokenizer, splitting(r"(ж+\s?)+#"))))
    return load_tokenizer(str(path), 300)


def test_a_panic_is_one_line_wherever_texts_are_encoded(backtracking):
    text, panics = "ж" * 60 + "!#", pytest.raises(ConfigurationError, match=r"^tokenizer.*: cannot encode a text \(")
    with panics:
        list(encode([Document("x", text)] * 3, backtracking))
    row = Example(messages=(("user", text), ("assistant", "a")), is_chat=False, where="row 1")
    for encoder in (ExampleEncoder(backtracking), Seq2SeqEncoder(backtracking)):
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


@pytest.mark.parametrize("state", [5, None, [], {}, {"tokenizer": 5}, {"tokenizer": "{}", "special_tokens": {}}])
def test_a_state_that_holds_no_tokenizer_is_one_line(state):
    with pytest.raises(ConfigurationError, match="the checkpoint's data state holds no readable tokenizer"):
        tokenizer_from_state(state)


@pytest.mark.parametrize("special", [{"tokenizer_file": "/etc/passwd"}, {"eos_token": "new"}, {"eos_token": 5}])
def test_a_state_names_only_special_tokens_of_its_own(tokenizer, special):
    with pytest.raises(ConfigurationError, match="is none of its own"):
        tokenizer_from_state({**tokenizer_state(tokenizer), "special_tokens": special})


@pytest.mark.parametrize("size", [(1 << 22) + 1, 2**31, 2**70])
def test_sizes_of_a_vocabulary_that_training_would_reserve_memory_for(size):
    with pytest.raises(ConfigurationError, match=f"^vocab_size {size}: "):
        train_tokenizer(["a"], size)


@pytest.mark.parametrize("name", ["a\0b", "~nobody-of-this-name", "x\ud800"])
def test_names_that_no_tokenizer_has(name):
    with pytest.raises(ConfigurationError, match=r"(no path can hold|no such user)"):
        load_tokenizer(name, 300)


@pytest.mark.parametrize(
    "sizes", [{"batch_size": 10**12}, {"sequence_length": 10**12}, {"num_workers": 10**6}, {"batch_size": 2**70}]
)
def test_sizes_that_no_machine_can_hold(make_data, sizes):
    with pytest.raises(ConfigurationError, match=f"^{'num_workers' if 'num_workers' in sizes else 'batch_size'} "):
        make_data(**sizes)


def test_a_cache_folder_that_no_path_can_name(make_data):
    with pytest.raises(ConfigurationError, match=r"^cache_dir 'a\\x00b': has a NUL character"):
        make_data(cache_dir="a\0b").prepare_data()
