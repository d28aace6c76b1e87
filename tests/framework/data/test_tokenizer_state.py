"""A tokenizer inside a checkpoint: rebuilt from plain values, compared, or refused."""

import json

import pytest
from transformers import PreTrainedTokenizerFast

from orthotrain.data import tokenizer_from_state
from orthotrain.data.tokenizer_state import tokenizer_difference, tokenizer_state
from orthotrain.data.tokenizers import fingerprint, load_tokenizer, train_tokenizer
from orthotrain.errors import ConfigurationError
from orthotrain.export.folder import _save_tokenizer

TEXTS = ["the theme of the thesis is there\n" * 5, "def other(this):\n    return this.then\n" * 5]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 280)


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
        "settings": {"source": "here", "vocab_size": 280, "seed": 0, "val_fraction": 0.1, "val_source": None},
    }
    assert tokenizer_difference(state, tokenizer, {"vocab_size": 280}) is None
    other = train_tokenizer(TEXTS, 270)
    message = tokenizer_difference(state, other, state["settings"] | {"vocab_size": 270})
    assert all(
        part in message for part in ("vocab 270", "vocab 280", fingerprint(other)[:12], fingerprint(tokenizer)[:12])
    )
    assert message.endswith("the same inputs: source 'here', vocab_size 280 (changed: vocab_size is 270 here)")
    split = tokenizer_difference(state, other, state["settings"] | {"val_fraction": 0.2, "val_source": "there"})
    assert split.endswith("val_fraction 0.1 (changed: val_source is 'there' here, val_fraction is 0.2 here)")
    given = {"source": "here", "tokenizer": "folder"}
    assert tokenizer_difference(state | {"settings": given}, other, given).endswith("exported with the checkpoint")


@pytest.mark.parametrize("state", [5, None, [], {}, {"tokenizer": 5}, {"tokenizer": "{}", "special_tokens": {}}])
def test_a_state_that_holds_no_tokenizer_is_one_line(state):
    with pytest.raises(ConfigurationError, match="the checkpoint's data state holds no readable tokenizer"):
        tokenizer_from_state(state)


@pytest.mark.parametrize("special", [{"tokenizer_file": "/etc/passwd"}, {"eos_token": "new"}, {"eos_token": 5}])
def test_a_state_names_only_special_tokens_of_its_own(tokenizer, special):
    with pytest.raises(ConfigurationError, match="is not in its vocabulary"):
        tokenizer_from_state({**tokenizer_state(tokenizer), "special_tokens": special})


@pytest.fixture(scope="module")
def rich_folder(tokenizer, tmp_path_factory):
    """A tokenizer with all special tokens, settings and named templates that a folder can hold, left of its padding."""
    rich = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        **{f"{name}_token": f"<{name}>" for name in ("eos", "bos", "unk", "sep", "cls", "mask", "image")},
        **{"extra_special_tokens": ["<extra>"], "model_max_length": 128, "padding_side": "left"},
        **{"model_input_names": ["input_ids"], "clean_up_tokenization_spaces": True},
    )
    rich.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    folder = tmp_path_factory.mktemp("rich") / "base"
    rich.save_pretrained(folder)
    return folder


def test_an_exported_tokenizer_is_that_of_the_base(rich_folder):
    loaded = load_tokenizer(str(rich_folder))
    state = json.loads(json.dumps(tokenizer_state(loaded)))
    again = tokenizer_from_state(state)
    assert (again.pad_token, again.has_own_padding) == ("<eos>", False), "the run pads, the base has no such token"
    _save_tokenizer(again, rich_folder.parent / "export")
    for name in ("tokenizer_config.json", "chat_template.jinja", "additional_chat_templates/tool_use.jinja"):
        assert (rich_folder.parent / "export" / name).read_text() == (rich_folder / name).read_text()
    assert fingerprint(load_tokenizer(str(rich_folder.parent / "export"))) == fingerprint(loaded)


@pytest.mark.parametrize(
    "change",
    [
        {"special_tokens": {"add_bos_token": "<extra>"}},
        {"extra_special_tokens": ["new"]},
        {"tokenizer_settings": {"tokenizer_file": "/etc/passwd"}},
        {"tokenizer_settings": {"padding_side": "top"}},
        {"tokenizer_settings": {"model_max_length": 0}},
        {"chat_template": {"default": 5}},
        {"chat_template": 5},
    ],
)
def test_a_state_with_other_settings_is_refused(rich_folder, change):
    with pytest.raises(ConfigurationError, match="no readable tokenizer"):
        tokenizer_from_state({**tokenizer_state(load_tokenizer(str(rich_folder))), **change})


def test_another_tokenizer_of_the_same_settings_comes_from_other_text():
    tokenizer = train_tokenizer(["a text to learn from"] * 3, 262)
    settings = {"source": "x.txt", "seed": 0, "tokenizer": None}
    state = {"tokenizer_fingerprint": "other", "vocab_size": 262, "settings": settings}
    same = tokenizer_difference(state, tokenizer, settings)
    assert "source 'x.txt' (these have not changed, but the text of the source or its split has)" in same
    changed = tokenizer_difference(state, tokenizer, settings | {"seed": 1})
    assert "source 'x.txt', seed 0 (changed: seed is 1 here)" in changed and "not changed" not in changed
    given = tokenizer_difference({**state, "settings": {**settings, "tokenizer": "folder"}}, tokenizer, settings)
    assert given.endswith("set tokenizer to the one exported with the checkpoint")
