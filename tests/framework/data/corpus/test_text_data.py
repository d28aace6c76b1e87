import json
import os

import jsonargparse
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import orthotrain.data.corpus.cache_folder
from orthotrain.data import CorruptCacheError, TextData, tokenizer_from_state
from orthotrain.data.corpus import tokenizing as building
from orthotrain.data.corpus.sources import open_corpus
from orthotrain.errors import ConfigurationError


def test_batches_have_static_shapes_and_shifted_labels(make_data):
    data = make_data()
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert len(batches) == len(data.train_dataloader()) > 5
    for batch in batches:
        assert batch.keys() == {"input_ids", "labels"}
        assert batch["input_ids"].shape == batch["labels"].shape == (4, 64)
        assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
        assert torch.equal(batch["input_ids"][:, 1:], batch["labels"][:, :-1])


def test_validation_and_test_see_every_window_once(make_data):
    data = make_data()
    data.setup()
    for split, loader in (("val", data.val_dataloader()), ("test", data.test_dataloader())):
        windows = torch.cat([batch["labels"] for batch in loader])
        tokens = data._cache(split).tokens
        expected = tokens[1 : 1 + windows.numel()].reshape(-1, 64).tolist()
        assert sorted(windows.tolist()) == sorted(expected) and len(tokens) - windows.numel() <= 64


def test_the_splits_are_the_whole_corpus_without_overlap(make_data, corpus):
    data = make_data()
    data.setup()
    found = []
    for split in ("train", "val", "test"):
        text = data.tokenizer.decode(data._cache(split).tokens)
        documents = text.split("<|endoftext|>")
        assert documents.pop() == "" and documents
        found += documents
    assert sorted(found) == sorted(path.read_text() for path in corpus.rglob("*.txt"))


@pytest.fixture
def single_file(tmp_path, corpus):
    path = tmp_path / "input.txt"
    path.write_text("".join(path.read_text() for path in sorted(corpus.rglob("*.txt"))))
    return path


def split_texts(data):
    return {
        split: data.tokenizer.decode(data._cache(split).tokens, skip_special_tokens=True)
        for split in ("train", "val", "test")
    }


@pytest.mark.parametrize("streaming", [False, True])
def test_one_file_is_pretrained_on_with_the_default_splits(tmp_path, single_file, streaming):
    settings = {"vocab_size": 300, "sequence_length": 16, "cache_dir": str(tmp_path / "cache"), "streaming": streaming}
    data = TextData(str(single_file), batch_size=2, **settings)
    data.setup()
    texts, whole = split_texts(data), single_file.read_text()
    assert "".join(texts.values()) == whole, "train, val and test are contiguous parts"
    assert all(abs(len(texts[split]) / len(whole) - 0.05) < 0.03 for split in ("val", "test"))
    assert data._cache("train").tokens[-1] == data.tokenizer.eos_token_id
    assert next(iter(data.train_dataloader()))["labels"].shape == (2, 16) and len(data.val_dataloader()) > 1
    limited = TextData(str(single_file), limit_bytes=8000, batch_size=2, **settings)
    limited.setup()
    parts = split_texts(limited)
    assert whole.startswith("".join(parts.values())) and 7000 < len("".join(parts.values())) <= 8000
    assert min(map(len, parts.values())) > 200, "all splits are alive"


def test_a_stream_trains_on_the_train_split_alone(make_data):
    data = make_data(streaming=True)
    data.setup()
    tokens = torch.cat([batch["input_ids"].flatten() for batch in data.train_dataloader()]).tolist()
    assert tokens == data._cache("train").tokens[: len(tokens)].tolist()
    assert len(data._cache("train").tokens) - len(tokens) <= 4 * 64 and min(map(len, split_texts(data).values())) > 200


def test_held_out_text_may_have_sources_of_its_own(tmp_path, make_data, single_file, corpus):
    settings = {"cache_dir": str(tmp_path / "cache"), "val_fraction": 0.9, "test_fraction": 0.9}
    given = {"val_source": str(corpus / "a"), "test_source": [str(corpus / "b")]}
    data = make_data(source=str(single_file), **settings, **given)
    data.setup()
    texts = split_texts(data)
    assert texts["train"] == single_file.read_text()
    for split, folder in (("val", "a"), ("test", "b")):
        assert texts[split] == "".join(path.read_text() for path in sorted((corpus / folder).glob("*.txt")))
    assert data.cache_folder != make_data(source=str(single_file), **settings | {"test_fraction": 0.05}).cache_folder
    before, own = data._fingerprint().content, tmp_path / "own.txt"
    own.write_text("held out " * 200)
    other = make_data(source=str(single_file), **settings, **given | {"val_source": str(own)})
    other.setup()
    assert other._fingerprint().content == before, "the training data is the same"
    own.write_text("changed " * 200)
    changed = make_data(source=str(single_file), **settings, **given | {"val_source": str(own)})
    changed.setup()
    assert split_texts(changed)["val"] == own.read_text()
    single_file.write_text(single_file.read_text().replace("ka", "to", 1))
    changed = make_data(source=str(single_file), **settings, **given)
    changed.setup()
    assert changed._fingerprint().content != before


def test_the_bytes_of_the_tokens_are_those_of_the_text(make_data, corpus):
    data = make_data()
    data.setup()
    metadata = [data._cache(split).metadata for split in ("train", "val", "test")]
    assert sum(header.text_bytes for header in metadata) == sum(path.stat().st_size for path in corpus.rglob("*.txt"))
    for split, header in zip(("train", "val", "test"), metadata, strict=True):
        tokens = torch.from_numpy(data._cache(split).tokens.astype("int64"))
        assert data.text_bytes(tokens, split) == header.text_bytes
    beginning = tokens[:100]
    assert data.text_bytes(beginning, "test") == len(
        data.tokenizer.decode(beginning, skip_special_tokens=True).encode()
    )
    assert data.text_bytes(torch.full((2, 3), -100), "test") == 0


def test_bytes_that_a_tokenizer_leaves_out_are_those_of_the_same_split(make_data, tmp_path):
    backend = Tokenizer(models.WordLevel({"</s>": 0, "<unk>": 1, "word": 2, "a": 3}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>").save_pretrained(tmp_path)
    spaces = {"source": 1, "val_source": 4, "test_source": 9}
    texts = {name: (" " * count).join(["word a", "a", "word"] * 99) for name, count in spaces.items()}
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_text(text)
    sources = {name: str(tmp_path / f"{name}.txt") for name in texts}
    data = make_data(tokenizer=str(tmp_path), cache_dir=str(tmp_path / "cache"), **sources)
    data.setup()
    for split, text in zip(("train", "val", "test"), texts.values(), strict=True):
        tokens = torch.from_numpy(data._cache(split).tokens.astype("int64"))
        assert data.text_bytes(tokens, split) == pytest.approx(len(text))
        assert data.text_bytes(tokens[:40], split) == pytest.approx(len(text) / 10, rel=0.1)


def test_the_tokenizer_can_be_saved_for_export(make_data, tmp_path):
    data = make_data()
    with pytest.raises(RuntimeError, match="no tokenizer yet"):
        _ = data.tokenizer
    data.setup("fit")
    assert isinstance(data.tokenizer, PreTrainedTokenizerFast) and data.vocab_size == len(data.tokenizer) == 300
    data.tokenizer.save_pretrained(tmp_path)
    other = make_data(tokenizer=str(tmp_path), vocab_size=320)
    other.setup("fit")
    assert other.tokenizer_fingerprint == data.tokenizer_fingerprint and other.vocab_size == 320


def test_state_is_plain_self_contained_and_compared(make_data, tmp_path):
    data = make_data()
    data.setup("fit")
    torch.save(data.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert json.loads(json.dumps(state)) == state
    assert tokenizer_from_state(state).encode("kato") == data.tokenizer.encode("kato")
    make_data().load_state_dict(state)
    other = make_data(vocab_size=290)
    other.load_state_dict(state)  # before the tokenizer is known: compared at setup
    with pytest.raises(ConfigurationError, match=r"this run \(vocab 290, .*checkpoint's \(vocab 300, "):
        other.setup("fit")
    with pytest.raises(ConfigurationError, match="differs"):
        other.load_state_dict(state)


def test_prompts_come_from_the_user_or_from_held_out_documents(make_data):
    data = make_data(predict_prompts=["kato rimu", "ß"])
    data.setup("predict")
    prompts = [batch["input_ids"] for batch in data.predict_dataloader()]
    assert [data.tokenizer.decode(prompt[0]) for prompt in prompts] == ["kato rimu", "ß"]
    held_out = make_data()
    held_out.setup("predict")
    starts = [data.tokenizer.decode(batch["input_ids"][0]) for batch in held_out.predict_dataloader()]
    text = data.tokenizer.decode(held_out._cache("test").tokens)
    assert starts and all(text.startswith(start) or f"<|endoftext|>{start}" in text for start in starts)
    empty = make_data(predict_prompts=["a", ""])
    empty.setup("predict")
    with pytest.raises(ConfigurationError, match="prompt 2 is empty"):
        empty.predict_dataloader()


def test_an_unchanged_source_is_not_built_again_and_a_changed_one_is(make_data, tmp_path, corpus, monkeypatch):
    folder = tmp_path / "source"
    folder.mkdir()
    for path in corpus.rglob("*.txt"):
        (folder / path.name).write_text(path.read_text())
    settings = {"source": str(folder), "cache_dir": str(tmp_path / "cache")}
    first = make_data(**settings)
    first.setup()
    builds = []
    build = orthotrain.data.corpus.cache_folder.build_caches
    monkeypatch.setattr(
        orthotrain.data.corpus.cache_folder, "build_caches", lambda *given: builds.append(1) or build(*given)
    )
    make_data(**settings).setup()
    assert not builds
    (folder / "00.txt").write_text("changed " * 50)
    changed = make_data(**settings)
    changed.setup()
    assert builds and changed.cache_folder == first.cache_folder
    texts = [
        data.tokenizer.decode(data._cache(split).tokens) for data in (changed,) for split in ("train", "val", "test")
    ]
    assert sum(text.count("changed changed") for text in texts) == 25


def test_a_cache_inside_its_own_source_is_not_read(make_data, tmp_path, corpus):
    (tmp_path / "a.txt").write_text("\n".join(path.read_text() for path in corpus.rglob("*.txt")))
    settings = {"cache_dir": str(tmp_path / "cache"), "val_fraction": 0.0, "test_fraction": 0.0}
    first = make_data(source=str(tmp_path), **settings)
    first.setup("fit")
    again = make_data(source=str(tmp_path), **settings)
    again.setup("fit")
    assert again._cache("train").metadata.tokens == first._cache("train").metadata.tokens
    with pytest.raises(ConfigurationError, match="the glob matches no file"):
        make_data(source=str(tmp_path / "**" / "*.json"), **settings).setup("fit")


def test_the_tokenizer_learns_from_a_bounded_sample_spread_over_the_corpus(corpus, monkeypatch):
    asked = []
    monkeypatch.setattr(building, "train_tokenizer", lambda texts, size: asked.extend(texts))
    monkeypatch.setattr(building, "TOKENIZER_SAMPLE_BYTES", 20_000)
    source = open_corpus(str(corpus))
    building.learn_tokenizer(source, building.Splitter(0, 0.0, 0.0), 300)
    texts = [document.text for document in source.documents()]
    places = [texts.index(text) for text in asked]
    assert places == sorted(set(places)) and places[0] < 5 and places[-1] > 50
    assert 15_000 < sum(map(len, asked)) < 22_000


def test_settings_that_decide_the_content_have_folders_of_their_own(make_data):
    folders = [
        make_data(**change).cache_folder for change in ({}, {"seed": 1}, {"vocab_size": 290}, {"limit_bytes": 9})
    ]
    assert len(set(folders)) == 4
    assert make_data(batch_size=9, sequence_length=7, num_workers=1).cache_folder == folders[0]


def test_the_cache_is_found_through_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("ORTHOTRAIN_CACHE", str(tmp_path))
    assert TextData().cache_folder.parent == tmp_path
    assert TextData(cache_dir="~/x").cache_folder.parent == type(tmp_path).home() / "x"


@pytest.mark.parametrize("name", ["train.tokens", "val.tokens", "tokenizer.json"])
def test_a_truncated_cache_is_one_clear_line_and_deleting_it_rebuilds(make_data, tmp_path, name):
    data = make_data(cache_dir=str(tmp_path))
    data.prepare_data()
    path = data.cache_folder / name
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorruptCacheError) as caught:
        make_data(cache_dir=str(tmp_path)).setup("fit")
    message = str(caught.value)
    assert str(path) in message and "delete it and it will be rebuilt" in message and "\n" not in message
    path.unlink()
    make_data(cache_dir=str(tmp_path)).setup("fit")
    assert path.read_bytes() == whole


def test_altered_tokens_are_found(make_data, tmp_path):
    data = make_data(cache_dir=str(tmp_path))
    data.prepare_data()
    path = data.cache_folder / "train.tokens"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptCacheError, match="checksum"):
        make_data(cache_dir=str(tmp_path)).setup("fit")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"val_fraction": 1.0}, "val_fraction 1.0: must be at least 0 and below 1"),
        ({"test_fraction": -0.1}, "test_fraction -0.1"),
        ({"val_fraction": float("nan")}, "val_fraction nan"),
        ({"val_fraction": 0.5, "test_fraction": 0.5}, "their sum must be below 1"),
        ({"vocab_size": 100}, "vocab_size 100: a byte-level BPE needs at least 259"),
        ({"sequence_length": 0}, "sequence_length 0: must be at least 1"),
        ({"batch_size": 0}, "batch_size 0: must be at least 1"),
        ({"num_workers": -1}, "num_workers -1"),
        ({"limit_bytes": 0}, "limit_bytes 0"),
        ({"streaming": True, "num_workers": 2}, "num_workers 2: one process reads a streamed source"),
    ],
)
def test_arguments_that_cannot_work(make_data, changes, expected):
    with pytest.raises(ConfigurationError, match=expected):
        make_data(**changes)


def test_splits_that_are_too_short_or_missing(make_data):
    with pytest.raises(
        ConfigurationError, match=r"train split has \d+ tokens, enough for \d+ sequences .*but 900 are needed"
    ):
        make_data(batch_size=900).setup("fit")
    with pytest.raises(ConfigurationError, match=r"the val split has \d+ tokens, enough for 0 .*sequence_length 9000"):
        make_data(sequence_length=9000).setup("validate")
    with pytest.raises(ConfigurationError, match="validate: there is no val split; set val_source or val_fraction"):
        make_data(val_fraction=0.0).setup("validate")
    data = make_data(val_fraction=0.0)
    data.setup("fit")
    assert data.val_dataloader() == []


def test_sources_that_hold_nothing(make_data, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ConfigurationError, match=r"empty.txt': no text in it"):
        make_data(source=str(tmp_path / "empty.txt")).setup("fit")
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(ConfigurationError, match="vocab_size 300: the train text only yields"):
        make_data(source=str(tmp_path / "short.txt")).setup("fit")
    with pytest.raises(ConfigurationError, match="train split holds no document"):
        make_data(source=str(tmp_path / "short.txt"), val_fraction=0.99, test_fraction=0.0).setup("fit")


@pytest.mark.skipif(os.name == "nt", reason="POSIX")
def test_a_cache_folder_that_cannot_be_made(make_data, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigurationError, match=r"no finished token caches .* cannot be written .*--data.cache_dir"):
        make_data(cache_dir=str(tmp_path / "file")).setup("fit")


def test_arguments_and_their_help_reach_the_command_line(corpus):
    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(TextData, "data")
    text = parser.format_help()
    for name in ("source", "vocab_size", "predict_prompts", "limit_bytes"):
        assert f"--data.{name}" in text
    assert "Tokens of one training sequence" in text
    given = parser.parse_args([f'--data.source=["{corpus}"]', "--data.limit_bytes=3", '--data.predict_prompts=["a"]'])
    data = parser.instantiate_classes(given).data
    assert data.hparams.source == [str(corpus)] and data.hparams.limit_bytes == 3


def test_the_standard_library_itself(tmp_path):
    data = TextData(cache_dir=str(tmp_path), limit_bytes=400_000, vocab_size=1024, batch_size=2, val_fraction=0.2)
    data.setup("fit")
    metadata = data._cache("train").metadata
    assert 2 < metadata.text_bytes / metadata.tokens < 5 and metadata.tokens > 30_000
    batch = next(iter(data.train_dataloader()))
    assert batch["input_ids"].shape == (2, 256) and int(batch["labels"].max()) < 1024


def test_a_cache_folder_that_no_path_can_name(make_data):
    with pytest.raises(ConfigurationError, match=r"^cache_dir 'a\\x00b': has a NUL character"):
        make_data(cache_dir="a\0b").prepare_data()
