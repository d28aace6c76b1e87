"""Tokenizers: trained, loaded, told apart, or refused."""

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from orthotrain.data.corpus.documents import Document
from orthotrain.data.corpus.tokenizing import encode_documents
from orthotrain.data.tokenizers import (
    END_OF_TEXT,
    MIN_VOCABULARY,
    PADDING,
    fingerprint,
    load_tokenizer,
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
    ((_, tokens, size),) = encode_documents([Document("x", "a<|endoftext|>b")], tokenizer)
    assert tokens.count(tokenizer.eos_token_id) == 1 and tokens[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(tokens[:-1]) == "a<|endoftext|>b" and size == 15
    assert tokenizer.encode("<|endoftext|>") == [tokenizer.eos_token_id], "as before outside of documents"


def test_vocabularies_that_cannot_be_trained():
    with pytest.raises(ConfigurationError, match=f"vocab_size 258: .* at least {MIN_VOCABULARY}"):
        train_tokenizer(TEXTS, 258)
    with pytest.raises(ConfigurationError, match=r"vocab_size 5000: the train text only yields (\d+) tokens") as caught:
        train_tokenizer(TEXTS, 5000)
    attainable = int(str(caught.value).split("yields ")[1].split()[0])
    assert len(train_tokenizer(TEXTS, attainable)) == attainable


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


@pytest.mark.parametrize("size", [(1 << 22) + 1, 2**31, 2**70])
def test_sizes_of_a_vocabulary_that_training_would_reserve_memory_for(size):
    with pytest.raises(ConfigurationError, match=f"^vocab_size {size}: "):
        train_tokenizer(["a"], size)


@pytest.mark.parametrize("name", ["a\0b", "~nobody-of-this-name", "x\ud800"])
def test_names_that_no_tokenizer_has(name):
    with pytest.raises(ConfigurationError, match=r"(no path can have|no such user)"):
        load_tokenizer(name, 300)


@pytest.mark.parametrize(
    "tokenizer_class", ["LlamaTokenizerFast", "GPT2Tokenizer", "Qwen2Tokenizer", "GemmaTokenizerFast"]
)
def test_a_folder_makes_the_tokens_of_its_file_whatever_class_it_names(tmp_path, tokenizer_class):
    splitting = Tokenizer.from_str(train_tokenizer(TEXTS, 280).backend_tokenizer.to_str())
    digits = pre_tokenizers.Digits(individual_digits=True)
    splitting.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(False, use_regex=False)])
    PreTrainedTokenizerFast(tokenizer_object=splitting, eos_token=END_OF_TEXT).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": tokenizer_class}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    text, expected = "the thesis of 2023", splitting.encode("the thesis of 2023").ids
    for name in (tmp_path, tmp_path / "tokenizer.json"):
        assert load_tokenizer(str(name)).encode(text) == expected


def test_a_folder_of_a_vocabulary_and_merges_is_converted(tokenizer, tmp_path):
    tokenizer.backend_tokenizer.model.save(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    assert load_tokenizer(str(tmp_path)).encode("the thesis") == tokenizer.encode("the thesis")


def test_settings_that_change_the_tokens_of_the_file_are_refused(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    added = {"300": {"content": "quick", "special": False}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"added_tokens_decoder": added}))
    with pytest.raises(ConfigurationError, match=r"the settings in its tokenizer_config.json change the tokens"):
        load_tokenizer(str(tmp_path))
