import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from orthotrain.data import tokenizer_from_state
from orthotrain.data.building import encode
from orthotrain.data.readers import Document
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
