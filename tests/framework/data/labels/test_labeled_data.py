"""Labeled rows of every kind of file: classes, words and their tokens, numbers, and bad rows in one line."""

import functools
import gzip
import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch

from orthotrain.data import LabeledData
from orthotrain.errors import ConfigurationError

ROWS = [{"text": f"a {word} film", "label": word} for word in ("good", "bad", "so-so") * 8]


def write(folder, name, rows):
    """Write rows in the format of a file's name."""
    path = folder / name
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif ".csv" in name or ".tsv" in name:
        separator = "," if ".csv" in name else "\t"
        lines = [separator.join(rows[0]), *(separator.join(map(str, row.values())) for row in rows)]
        data = ("\ufeff" + "\r\n".join(lines) + "\r\n").encode()
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.fixture
def make(tiny_bert, tmp_path):
    """Make data that is set up, from rows or from a source."""

    def build(rows=ROWS, name="rows.jsonl", stage="fit", **options):
        source = write(tmp_path, name, rows) if isinstance(rows, list) and not isinstance(rows[0], str) else rows
        given = {"max_length": 16, "batch_size": 4, "val_fraction": 0.0, **options}
        data = LabeledData(str(tiny_bert), source, **given)
        data.setup(stage)
        return data

    return build


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.tsv", "rows.csv.gz", "rows.parquet"])
def test_every_format_gives_the_same_rows(make, name):
    data = make(name=name)
    assert data.label_names == ["bad", "good", "so-so"] and data.amounts()["train"]["rows"] == 24
    batch = data._dataset("train")[[0, 1, 2]]
    assert batch["labels"].tolist() == [1, 0, 2] and batch["labels"].dtype == torch.int64
    assert batch["attention_mask"].sum(1).tolist() == [5, 5, 9] and batch["input_ids"].shape == (3, 9)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert batch["input_ids"][0, 5:].tolist() == [data.tokenizer.pad_token_id] * 4
    assert data.label_options["label2id"] == {"bad": 0, "good": 1, "so-so": 2}


def test_integers_are_sorted_by_value_and_names_may_be_declared(make):
    stars = [{"text": "a film", "label": label} for label in (10, 2, 9.0, 2, 10, 9)]
    for name in ("rows.jsonl", "rows.csv"):
        data = make([{**row, "label": int(row["label"])} for row in stars], name)
        assert data.label_names == ["2", "9", "10"] and data._dataset("train")[[0, 1, 2]]["labels"].tolist() == [
            2,
            0,
            1,
        ]
    assert make(stars).label_names == ["2", "9", "10"]
    both = [{"text": "a film", "label": label} for label in (1, "bad", 0, " good ")]
    data = make(both, labels=["bad", "good", "never seen"])
    assert data._dataset("train")[[0, 1, 2, 3]]["labels"].tolist() == [1, 0, 0, 1]
    assert data.label_options["num_labels"] == 3


def test_classes_of_a_dataset_have_its_names(make, monkeypatch):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    rows = datasets.Dataset.from_list([{"text": "a film", "label": n % 2} for n in range(8)], features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *given, **options: rows)
    assert make("org/name").label_names == ["neg", "pos"]


def test_the_second_text_has_its_own_token_type(make):
    rows = [{"a": "good", "b": "films", "label": n % 2} for n in range(8)]
    batch = make(rows, text_column="a", pair_column="b")._dataset("train")[[0]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 1, 1, 1]]


def test_numbers_of_a_regression(make):
    for name in ("rows.jsonl", "rows.csv"):
        data = make([{"text": "a film", "label": n / 4} for n in range(8)], name, task="regression")
        batch = data._dataset("train")[[1, 2]]
        assert batch["labels"].tolist() == [0.25, 0.5] and batch["labels"].dtype == torch.float32
        assert data.label_options["num_labels"] == 1 and data.label_options["problem_type"] == "regression"


def test_the_first_token_of_a_word_has_its_label(make):
    words = ["films", "in", "Rome", "\u200b", "."]
    rows = [{"words": words, "tags": ["O", "O", "PLACE", "ODD", "O"]}, {"words": "good Bad", "tags": "O PLACE"}]
    data = make(rows, task="token_classification", batch_size=2, text_column="words", label_column="tags")
    assert data.label_names == ["O", "PLACE"]  # the label of a word without a token is lost, and counted
    batch = data._dataset("train")[[0, 1]]
    pieces = data.tokenizer.convert_ids_to_tokens(batch["input_ids"][0].tolist())
    assert pieces == ["[CLS]", "film", "##s", "i", "##n", "r", "##o", "##m", "##e", ".", "[SEP]"]
    assert batch["labels"][0].tolist() == [-100, 0, -100, 0, -100, 1, -100, -100, -100, 0, -100]
    assert batch["labels"][1, :4].tolist() == [-100, 0, 1, -100] and (batch["labels"][1, 4:] == -100).all()


def test_long_rows_are_truncated_dropped_or_refused(make, caplog):
    rows = [*ROWS, {"text": "good " * 40, "label": "good"}]
    data = make(rows, max_length=9)
    assert data._dataset("train")[[24]]["input_ids"].shape == (1, 9) and "1 of them truncated" in caplog.text
    assert make(rows, max_length=9, on_too_long="drop").amounts()["train"]["rows"] == 24
    with pytest.raises(ConfigurationError, match="row 25: longer than max_length 9 tokens"):
        make(rows, max_length=9, on_too_long="error")
    with pytest.raises(ConfigurationError, match="max_length 3: the tokenizer adds up to 3"):
        make(max_length=3)


def test_rows_for_validation_are_mixed_and_validation_alone_knows_the_classes(make, tmp_path):
    val = write(tmp_path, "val.jsonl", [{"text": "a film", "label": name} for name in ("bad",) * 8 + ("good",) * 8])
    data = make(val_source=val, stage="validate")
    labels = torch.cat([batch["labels"] for batch in data.val_dataloader()])
    assert sorted(labels.tolist()) == [0] * 8 + [1] * 8 and 0 < labels[:8].sum() < 8


def test_all_bad_rows_of_a_file_are_counted(make):
    rows = [*ROWS[:4], *({"text": "x", "label": None} for _ in range(12)), {"text": "x", "label": 0.5}]
    with pytest.raises(ConfigurationError, match=r"row 5, 'label': .*\(13 rows cannot be used: row 5, .* and 3 more\)"):
        make(rows)


BAD = {
    "a class in validation alone": (
        {"val": [{"text": "x", "label": "worse"}]},
        r"val.jsonl, row 1: the val split has the class 'worse', which no training row has \(their classes: bad, good",
    ),
    "one class": ({"rows": [{"text": "x", "label": "a"}] * 4}, "'label': all training rows have the class a; give"),
    "no text column": (
        {"text_column": "body"},
        r"row 1: no column 'body'; it has \['label', 'text'\]; set text_column",
    ),
    "no label column": ({"label_column": "y"}, "row 1: no column 'y'; .*; set label_column"),
    "no pair column": ({"pair_column": "y"}, "row 1: no column 'y'; .*; set pair_column"),
    "null label": ({"rows": [{"text": "x", "label": None}]}, "row 1, 'label': a class must be text or a whole number"),
    "empty label": ({"rows": [{"text": "x", "label": " "}]}, "row 1, 'label': a class must be text"),
    "fraction as class": ({"rows": [{"text": "x", "label": 0.5}]}, "found 0.5; numbers of any size need task: regr"),
    "text as number": ({"task": "regression"}, "row 1, 'label': must be a finite number, found 'good'"),
    "NaN": ({"rows": [{"text": "x", "label": "nan"}], "task": "regression"}, "must be a finite number, found 'nan'"),
    "unknown name": ({"labels": ["a", "b"]}, "the class 'good' is none of a, b, nor a number from 0 to 1"),
    "number beyond": ({"rows": [{"text": "x", "label": 2}], "labels": ["a", "b"]}, "the class '2' is none of a, b"),
    "words without labels": (
        {"rows": [{"text": ["a", "b"], "label": ["O"]}], "task": "token_classification"},
        "row 1: 2 words in 'text' and 1 labels in 'label'",
    ),
    "no words": ({"rows": [{"text": [], "label": []}], "task": "token_classification"}, "'text': must be a list, or"),
    "no object": ({"rows": [3]}, "row 1: must be an object with columns, found int"),
    "same names": ({"labels": ["a", "a"]}, "give two or more different names"),
    "unknown task": ({"task": "tagging"}, "task='tagging': choose one of sequence_classification, token_class"),
    "words and pairs": ({"task": "token_classification", "pair_column": "b"}, "labels the words of one text"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_rows_and_options_are_refused_in_one_line(make, tmp_path, case):
    options, message = BAD[case]
    options = dict(options)
    if "val" in options:
        options["val_source"] = write(tmp_path, "val.jsonl", options.pop("val"))
    with pytest.raises(ConfigurationError, match=message):
        make(**options)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"text,label\na film\n", r"a.csv, row 1 \(line 2\): does not have 2 values"),
        ("a.csv", b"text,label\na,film,good\n", r"row 1 \(line 2\): does not have 2 values"),
        ("a.csv", b'text,label\n"a film,good\n', "line 2: not valid csv"),
        ("a.csv", b"text,label\n\xff,good\n", "line 2: not UTF-8 text"),
        ("a.csv", b"", "a.csv: holds no row"),
        ("a.csv", b"text,label,label\na,1,x\n", "a.csv: two columns have the name 'label'; rename or remove one"),
        ("a.tsv", b'text\tlabel\n"a\nfilm"\tgood\n', r"row 1 \(line 2\): does not have 2 values, .* knows no quotes"),
        ("a.xml", b"x", r"unknown format '.xml'; known: .csv .tsv"),
    ],
)
def test_broken_tables_are_refused_in_one_line(make, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigurationError, match=message):
        make(str(tmp_path / name))


def test_what_labels_cannot_do(make):
    with pytest.raises(ConfigurationError, match="labeled data needs the tokenizer of the model"):
        LabeledData(None, "rows.csv")
    with pytest.raises(ConfigurationError, match="predict continues texts, and labels are no texts"):
        make().predict_dataloader()
    first, other = make()._fingerprint(), make(labels=["good", "bad", "so-so"])._fingerprint()
    assert first.content != other.content, "other classes at the network's outputs are other data"


def classes(data, split="train"):
    return data._dataset(split)[list(range(data.amounts()[split]["rows"]))]["labels"].tolist()


def films(*labels):
    return [{"text": "a film", "label": label} for label in labels]


def test_numbers_of_rows_are_places_or_names_for_a_whole_column(make, tmp_path):
    one = functools.partial(make, batch_size=1)
    stars = ["1", "2", "3", "4", "5"]
    assert classes(one(films(0, 1, 2, 3, 4), labels=stars)) == [0, 1, 2, 3, 4]
    assert classes(one(films(1, 2, 5), labels=stars)) == [0, 1, 4]
    assert classes(one(films(1, 0, 1), labels=["1", "0"])) == [0, 1, 0]
    val = write(tmp_path, "val.jsonl", films(1, 2))  # as in the training rows, although they may be names alone
    data = one(films(0, 1, 2, 3, 4), labels=stars, val_source=val, stage="validate")
    assert sorted(classes(data, "val")) == [1, 2]
    with pytest.raises(ConfigurationError, match="classes 1, 2, 3, which may be names or places from 0; give"):
        one(films(1, 2, 3), labels=stars)
    with pytest.raises(ConfigurationError, match="classes 0, 5, which may be"):
        one(films(0, 5), labels=stars)
    with pytest.raises(ConfigurationError, match="row 1: the class '0' is none of 1, 2, .* the training rows have nam"):
        one(films(1, 5), labels=stars, val_source=write(tmp_path, "val.jsonl", films(0)))


def test_integers_of_a_dataset_are_places_of_its_names(make, monkeypatch):
    one = functools.partial(make, batch_size=1)
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["1", "2"])})
    rows = datasets.Dataset.from_list(films(0, 1, 0), features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *given, **options: rows)
    assert classes(one("org/name")) == [0, 1, 0]
    assert classes(one("org/name", labels=["2", "1"])) == [1, 0, 1], "the same names in another order"
    assert classes(one("org/name", labels=["bad", "good"])) == [0, 1, 0]


def test_whole_numbers_as_text_are_numbers_and_booleans_have_one_spelling(make, tmp_path):
    one = functools.partial(make, batch_size=1)
    table = write(tmp_path, "other.csv", films("1.0", "0.0"))
    assert one([table, write(tmp_path, "a.jsonl", films(1.0, 0, "2"))]).label_names == ["0", "1", "2"]
    assert classes(one(films("2.0", "1.0"), labels=["1.0", "2.0"])) == [1, 0]
    assert one(films(True, False, "True")).label_names == ["False", "True"]
    for other in ("true", 1):
        with pytest.raises(ConfigurationError, match=r"row 3: has the class '\w+', and .*, row 1 has 'True'; write"):
            one(films(True, False, other))


def test_quotes_of_a_tsv_are_text(make, tmp_path):
    (tmp_path / "glue.tsv").write_text('text\tlabel\n"an odd film\t1\na bad one\t0\nwith a quote"\t1\n"a" b\t0\n')
    data = make(str(tmp_path / "glue.tsv"), batch_size=1)
    assert classes(data) == [1, 0, 1, 0]


def test_lists_that_csv_holds_as_text(make, tmp_path):
    path = tmp_path / "lists.csv"
    options = {"task": "token_classification", "batch_size": 1}
    path.write_text('text,label\n"[\'a\', \'b\']","[\'PER\', \'O\']"\n"[""it\'s""]","[""LOC""]"\n[laughs] a,O O\n')
    data = make(str(path), **options)
    assert data.label_names == ["LOC", "O", "PER"] and data._dataset("train")[[0]]["labels"].tolist() == [
        [-100, 2, 1, -100]
    ]
    for words, labels, column in (("['a' 'b']", "O O", "text"), ("a b", "[0 1]", "label")):
        path.write_text(f"text,label\n{words},{labels}\n")
        with pytest.raises(ConfigurationError, match=f"row 1, '{column}': .* looks like a list, but is none"):
            make(str(path), **options)


def test_files_of_datasets_keep_the_names_of_classes(make, tmp_path):
    one = functools.partial(make, batch_size=1)

    def dataset(*names):
        features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
        return datasets.Dataset.from_list(films(*range(len(names))), features=features)

    first, second = str(tmp_path / "saved"), str(tmp_path / "b.parquet")
    dataset("neg", "pos").save_to_disk(first)
    dataset("pos", "neg").to_parquet(second)
    data = one([first, second])
    assert data.label_names == ["neg", "pos"] and classes(data) == [0, 1, 1, 0]
    dataset("neg", "neutral", "pos").to_parquet(second)
    with pytest.raises(ConfigurationError, match=r"neg, neutral, pos, not .*; set labels to all names"):
        one([first, second])
    words = datasets.Features({key: datasets.List(kind) for key, kind in dataset("O", "PER").features.items()})
    datasets.Dataset.from_list([{"text": ["a", "b"], "label": [0, 1]}], features=words).to_parquet(second)
    assert one(second, task="token_classification").label_names == ["O", "PER"]
