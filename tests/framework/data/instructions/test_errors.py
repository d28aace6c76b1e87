"""Bad input: one line that names the thing, the value and what would work."""

import gzip
import json

import pytest
import torch

from orthotrain.data import InstructionData
from orthotrain.data.tokenizers import train_tokenizer
from orthotrain.errors import ConfigurationError

TEXT = ["the quick brown fox jumps over the lazy dog"] * 2
GOOD = {"prompt": "the fox", "response": "jumps"}


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXT, 270).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("chat"), train_tokenizer(TEXT, 270)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def refusal(tmp_path):
    """The one line that setting data up with these rows, or arguments, ends with."""

    def refuse(tokenizer, rows=None, **arguments):
        if rows is not None:
            path = tmp_path / "rows.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            arguments["source"] = str(path)
        with pytest.raises(ConfigurationError) as caught:
            InstructionData(tokenizer, **{"val_fraction": 0.0, "batch_size": 1} | arguments).setup("fit")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return refuse


BAD_ROWS = {
    "keys": (
        {"question": "a", "answer": "b"},
        ["row 2: has neither 'prompt' with 'response'", "['answer', 'question']"],
    ),
    "one key": ({"prompt": "a"}, ["row 2: has neither", "['prompt']", "set prompt_column"]),
    "empty prompt": ({"prompt": "", "response": "b"}, ["row 2, 'prompt': is empty"]),
    "number": ({"prompt": "a", "response": 3}, ["row 2, 'response': must be a string, found int"]),
    "surrogate": ({"prompt": "a", "response": "b\ud800"}, ["row 2, 'response': holds a lone surrogate at character 1"]),
    "not an object": ([1], ["row 2: expected an object, found list"]),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows(name, tokenizer_folder, refusal):
    row, parts = BAD_ROWS[name]
    message = refusal(tokenizer_folder, [GOOD, row])
    assert "rows.jsonl, " in message
    for part in parts:
        assert part in message


USER, ASSISTANT = {"role": "user", "content": "the fox"}, {"role": "assistant", "content": "jumps"}
BAD_MESSAGES = {
    "role": ([{"role": "human", "content": "a"}, ASSISTANT], ["message 1: unknown role 'human'", "system, developer"]),
    "speaker": ([{"from": "me", "value": "a"}, ASSISTANT], ["message 1: unknown role 'me'", "human, gpt"]),
    "end": ([USER, ASSISTANT, USER], ["ends with role 'user'", "must be the assistant's; remove what follows it"]),
    "start": (
        [{"role": "system", "content": "a"}, ASSISTANT],
        ["the assistant speaks first", "remove the message or the row"],
    ),
    "empty": ([], ["must be a list of messages, found an empty list"]),
    "text": ("the fox", ["must be a list of messages, found str"]),
    "keys": ([{"speaker": "human"}], ["message 1: must be an object with 'role' and 'content'", "'speaker'"]),
    "weight": ([USER, ASSISTANT | {"weight": 0.5}], ["message 2: has weight 0.5; give 0"]),
    "weight of a question": ([USER | {"weight": 1}, ASSISTANT], ["message 1: has weight 1, but only the assistant's"]),
    "calls": ([USER, ASSISTANT | {"tool_calls": [{"id": "1"}]}], ["call 1: must have a function with 'name'"]),
    "part": (
        [{"role": "user", "content": [{"type": "image_url"}]}, ASSISTANT],
        ["message 1, 'content': has a part of type 'image_url'"],
    ),
    "name": ([USER | {"name": "Ann"}, ASSISTANT], ["does not write 'name' of message 1", "ignored_keys to [name]"]),
    "content": ([{"role": "user", "content": None}, ASSISTANT], ["message 1, 'content': must be a string", "NoneType"]),
}


@pytest.mark.parametrize("name", BAD_MESSAGES)
def test_bad_messages(name, chat_folder, refusal):
    messages, parts = BAD_MESSAGES[name]
    message = refusal(chat_folder, [{"messages": messages}])
    assert "rows.jsonl, row 1" in message
    for part in parts:
        assert part in message


def test_messages_without_a_chat_template(tokenizer_folder, refusal):
    message = refusal(tokenizer_folder, [{"messages": [USER, ASSISTANT]}])
    assert "row 1: has chat messages, but the tokenizer has no chat template" in message


def test_rows_that_are_all_too_long(tokenizer_folder, refusal):
    message = refusal(tokenizer_folder, [GOOD, GOOD], max_length=2)
    assert message.startswith("no row is left: 0 rows used, 2 dropped; the longest has")
    assert "2 dropped as too long for max_length 2; raise max_length" in message


def test_a_row_that_is_too_long_and_must_not_be(tokenizer_folder, refusal):
    message = refusal(tokenizer_folder, [GOOD], max_length=2, on_too_long="error")
    assert "row 1: " in message
    assert "longer than max_length 2" in message


BAD_ARGUMENTS = {
    "max_length": (1, "max_length 1: must be at least 2"),
    "batch_size": (0, "batch_size 0: must be at least 1"),
    "num_workers": (-1, "num_workers -1: must be at least 0"),
    "generation_samples": (0, "generation_samples 0: must be at least 1"),
    "val_fraction": (1.0, "val_fraction 1.0: must be at least 0 and below 1"),
    "on_too_long": ("cut", "on_too_long='cut': choose one of drop, truncate, error"),
    "prompt_template": ("Q:", "prompt_template 'Q:': has no place for the prompt"),
    "source": ([], "source is an empty list; give 'python-stdlib-docstrings'"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments(name, tokenizer_folder, refusal):
    value, message = BAD_ARGUMENTS[name]
    rows = None if name == "source" else [GOOD]
    assert message in refusal(tokenizer_folder, rows, **{name: value})


@pytest.mark.parametrize("name", [None, ""])
def test_no_tokenizer(name):
    with pytest.raises(
        ConfigurationError, match=r"^tokenizer .*: instruction data needs the tokenizer of the model; give its"
    ):
        InstructionData(name)


def test_tokenizers_that_cannot_be_loaded(tmp_path, refusal):
    assert "cannot be loaded" in refusal(str(tmp_path), [GOOD])
    assert "no file or folder" in refusal(str(tmp_path / "gone.ckpt"), [GOOD])
    torch.save({"state_dict": {}}, tmp_path / "model.ckpt")
    assert "the checkpoint holds no tokenizer" in refusal(str(tmp_path / "model.ckpt"), [GOOD])


def test_bad_sources(tmp_path, tokenizer_folder, refusal):
    (tmp_path / "rows.csv").write_text("prompt,response\n")
    (tmp_path / "nothing.jsonl").write_text("\n")
    (tmp_path / "nothing.json").write_text("")
    (tmp_path / "broken.jsonl").write_text(json.dumps(GOOD) + "\n{")
    (tmp_path / "broken.jsonl.gz").write_bytes(gzip.compress(b"{}")[:8])
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    (tmp_path / "empty").mkdir()
    expected = {
        "gone.jsonl": "no such file or folder",
        "*.tsv": "the glob matches no file",
        "rows.csv": "unknown format '.csv'; known: .jsonl .json .parquet",
        "empty": "the folder holds no file of a known format",
        "nothing.jsonl": "holds no row",
        "nothing.json": "holds no row",
        "broken.jsonl": "row 2: not valid JSON",
        "broken.jsonl.gz": "damaged gzip file",
        "broken.parquet": "not a readable parquet file",
    }
    for name, part in expected.items():
        message = refusal(tokenizer_folder, source=str(tmp_path / name))
        assert part in message
        assert name in message


def test_an_unreachable_dataset(tokenizer_folder, refusal, monkeypatch):
    import datasets

    def load_dataset(path, config, split, streaming):
        raise ConnectionError(f"no way to {path} {config} {split}\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = refusal(tokenizer_folder, source="org/name:main@test")
    assert "cannot be loaded as a Hugging Face dataset (no way to org/name main test)" in message


def test_splits_that_are_too_small(tokenizer_folder, refusal):
    assert "the train split has 1 rows, but 4 are needed: give more data or lower batch_size" in refusal(
        tokenizer_folder, [GOOD], batch_size=4
    )
    assert (
        "the val split has 0 rows, but 1 are needed: give more data or set another val_fraction or val_source"
        in refusal(tokenizer_folder, [GOOD], val_fraction=0.01)
    )


@pytest.mark.parametrize(
    ("stage", "part"),
    [
        ("test", "there is no test split; set test_source"),
        ("validate", "no val split; set val_source or val_fraction above 0"),
    ],
)
def test_splits_that_are_not_there(stage, part, tokenizer_folder):
    with pytest.raises(ConfigurationError, match=part):
        InstructionData(tokenizer_folder, val_fraction=0.0).setup(stage)
