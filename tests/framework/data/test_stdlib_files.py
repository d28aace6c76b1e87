"""The built-in sources: no file, no near-duplicate and no answer is on two sides of a split, over all tasks."""

import re
from collections import defaultdict

import pytest
import torch
import yaml

from orthotrain.cli.config_files import shipped_configs
from orthotrain.data import InstructionData, LabeledData, TextData
from orthotrain.data.instructions.stdlib_docstrings import INSTRUCTION, docstring_examples, documented_functions
from orthotrain.data.labels.tables import PACKAGES
from orthotrain.data.splits import ALWAYS_TRAIN, Splitter
from orthotrain.data.stdlib_files import LARGE_GROUP, stdlib_files, stdlib_split_keys, stdlib_texts
from orthotrain.data.tokenizer_state import tokenizer_state
from orthotrain.data.tokenizers import load_tokenizer, train_tokenizer


def settings(name, *kept):
    """Return arguments of the data module of a config."""
    given = yaml.safe_load(shipped_configs()[name].read_text())["data"]["init_args"]
    return {
        argument: given[argument] for argument in ("val_fraction", "test_fraction", "seed", *kept) if argument in given
    }


@pytest.fixture(scope="module")
def sides():
    """Split -> relative name -> text, as the first pretraining splits the standard library."""
    data, found = TextData(**settings("pretrain/quickstart.yaml", "source")), defaultdict(lambda: defaultdict(str))
    for split, document in data._splitter.split(data._corpus(None).documents()):
        found[split][document.name] += document.text
    return {split: dict(texts) for split, texts in found.items()}


@pytest.fixture(scope="module")
def held_out(sides):
    return {**sides["val"], **sides["test"]}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory, sides):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(sides["val"].values(), 1024).save_pretrained(folder)
    return str(folder)


def words(text):
    return " ".join(re.findall(r"\w+", text.lower()))


def test_pretraining_reads_each_file_once_and_holds_some_out(sides):
    names = [name for texts in sides.values() for name in texts]
    assert sorted(names) == sorted(name for path, name in stdlib_files() if path.stat().st_size) and len(names) > 400
    whole = sum(len(text) for texts in sides.values() for text in texts.values())
    for split in ("val", "test"):
        assert 0.02 < sum(map(len, sides[split].values())) / whole < 0.08


def test_no_held_out_file_shares_half_of_its_lines_with_a_training_file(sides, held_out):
    def lines(texts):
        return {
            name: {line.strip() for line in text.split("\n") if len(line.strip()) >= 16} for name, text in texts.items()
        }

    train, held = lines(sides["train"]), lines(held_out)
    for name, own in held.items():
        for other, seen in train.items():
            smaller = min(len(own), len(seen))
            assert smaller < 8 or len(own & seen) < 0.55 * smaller, (name, other)


def test_families_of_copies_have_one_key_and_large_families_are_never_held_out():
    keys = stdlib_split_keys()
    texts = dict(stdlib_texts())
    tables = [name for name in texts if re.fullmatch(r"encodings/(cp1\d+|iso8859_\d+|palmos)\.py", name)]
    assert len(tables) > 20 and {keys[name] for name in tables} == {ALWAYS_TRAIN}
    assert {Splitter(seed, 0.5, 0.49)(keys[tables[0]]) for seed in range(9)} == {"train"}
    assert keys["profile.py"] == keys["cProfile.py"] == "cProfile.py" and keys["ast.py"] == "ast.py"
    share = sum(len(text) for name, text in texts.items() if keys[name] == ALWAYS_TRAIN) / sum(map(len, texts.values()))
    assert LARGE_GROUP < share < 0.3


def test_held_out_pairs_come_from_files_that_pretraining_holds_out(sides, held_out, tokenizer):
    given = settings("finetune/quickstart.yaml", "source")
    data = InstructionData(tokenizer, max_length=4096, **given)
    data.setup("fit")
    files = defaultdict(set)
    for function in documented_functions():
        files[function.answer].add(function.file)
    answers = {split: set(data._split_rows(split).references) for split in ("train", "val")}
    assert 100 < len(answers["val"]) < len(answers["train"]) / 8 and data.rows_used > 3000
    assert not set(map(words, answers["val"])) & set(map(words, answers["train"]))
    assert {file for answer in answers["val"] for file in files[answer]} <= held_out.keys()
    trained_on = "\n".join(f" {words(text)} " for text in sides["train"].values())
    assert not [answer for answer in answers["val"] if f" {words(answer)} " in trained_on]


def test_held_out_labeled_functions_come_from_files_that_pretraining_holds_out(held_out, tokenizer):
    data = LabeledData(tokenizer, max_length=4096)  # the docs give this source to finetune/classification.yaml
    data.setup("fit")
    assert set(data.label_names) == set(PACKAGES)
    files = {" ".join(function.source.split()): function.file for function in documented_functions()}
    found = defaultdict(set)
    for split in ("train", "val"):
        rows = data._split_rows(split)
        for number in range(len(rows)):
            source = data.tokenizer.decode(rows.row(number)[0], skip_special_tokens=True)
            found[split].add(files[" ".join(source.split())])
    assert found["val"] and found["val"] <= held_out.keys() and not found["val"] & found["train"]


def test_pairs_are_distinct_and_prefixed():
    examples, functions = list(docstring_examples()), documented_functions()
    assert len(examples) == len(functions) > 3000
    assert len({(function.source, function.answer) for function in functions}) == len(functions)
    assert all(example.messages[0]["content"].startswith(INSTRUCTION) for example in examples)
    for text in (lambda function: words(function.source), lambda function: words(function.answer)):
        groups = defaultdict(set)
        for function in functions:
            groups[text(function)].add(function.group)
        assert {len(found) for found in groups.values()} == {1}


@pytest.mark.parametrize(
    ("before", "here", "seen"),
    [
        ({}, {}, False),
        ({}, {"val_fraction": 0.11}, True),
        ({"val_fraction": 0.01, "test_fraction": 0.02}, {"val_fraction": 0.03}, False),
        ({"test_fraction": 0.0}, {"val_fraction": 0.06}, True),
        ({"test_source": "my.txt"}, {"val_fraction": 0.06}, True),
        ({"seed": 3}, {}, True),
        ({"seed": 3}, {"seed": 3}, False),
        ({"seed": 3}, {"val_fraction": 0.0}, False),
        ({"seed": 3, "source": "my.txt"}, {}, False),
        ({"seed": 3, "source": ["my.txt", "python-stdlib"]}, {}, True),
        ({"seed": 3}, {"source": "rows.jsonl"}, False),
        ({"seed": 3}, {"val_source": "rows.jsonl"}, False),
    ],
)
@pytest.mark.parametrize("kind", [InstructionData, LabeledData])
def test_validation_rows_of_files_that_the_model_was_pretrained_on_are_named(
    kind, before, here, seen, tokenizer, tmp_path, recwarn, monkeypatch
):
    state = tokenizer_state(load_tokenizer(tokenizer)) | {"settings": dict(TextData(**before).hparams)}
    torch.save({"TextData": state}, tmp_path / "last.ckpt")
    data = kind(str(tmp_path / "last.ckpt"), **here)
    data._tokenizer = data._load_tokenizer()
    monkeypatch.setattr(kind, "_read", lambda self, source, splits: self._rows.update(dict.fromkeys(splits)))
    data._split_rows("train")
    told = [str(warning.message) for warning in recwarn if "pretrained on files" in str(warning.message)]
    assert len(told) == seen
    if seen:
        assert data.built_in in told[0] and f"set seed {before.get('seed', 0)} and a val_fraction of at most" in told[0]
