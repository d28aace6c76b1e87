"""Files of columns: only the needed columns count, and what Python cannot hold is refused with its place."""

import random

import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest

from orthotrain.data import column_files
from orthotrain.data.corpus.sources import open_corpus
from orthotrain.data.instructions.examples import Columns
from orthotrain.data.instructions.sources import read_examples
from orthotrain.data.row_files import file_rows
from orthotrain.errors import ConfigurationError

NOT_UTF8 = pyarrow.Array.from_buffers(
    pyarrow.string(), 2, [None, pyarrow.py_buffer(b"\0\0\0\0\2\0\0\0\4\0\0\0"), pyarrow.py_buffer(b"ok\xff\xfe")]
)
UNUSED = {
    "far": pyarrow.array([2**60] * 2, pyarrow.timestamp("us")),
    "zone": pyarrow.array([1_700_000_000_000_000_001] * 2, pyarrow.timestamp("ns", tz="Mars/Base")),
    "day": pyarrow.array([400_000_000] * 2, pyarrow.int32()).cast(pyarrow.date32()),
    "bytes": pyarrow.array([b"\xff", None]),
    "broken": NOT_UTF8,
}
USED = {"text": ["one", "two"], "prompt": [b"p", b"q"], "response": pyarrow.array(["r", "s"], pyarrow.large_string())}


def texts(source):
    return [document.text for document in open_corpus(str(source)).documents()]


def pairs(source):
    return [example.key for example in read_examples(str(source), Columns())]


def write(path, columns, **options):
    table = pyarrow.table(columns)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        pyarrow.feather.write_feather(table, path, **{"compression": "uncompressed", **options})
    return path


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow"])
def test_columns_that_are_not_needed_are_not_read(tmp_path, name):
    (tmp_path / "plain.jsonl").write_text('{"prompt": "p", "response": "r"}\n{"prompt": "q", "response": "s"}\n')
    path = write(tmp_path / name, {**UNUSED, **USED})
    assert texts(path) == ["one", "two"]
    assert pairs(path) == pairs(tmp_path / "plain.jsonl")
    with pytest.raises(ConfigurationError, match=r"no column 'text'; its columns are \['answer', 'prompt'\]"):
        texts(write(tmp_path / f"b{name}", {"prompt": ["p"], "answer": ["r"]}))
    with pytest.raises(ConfigurationError, match=r"its keys are \['answer', 'prompt'\]"):
        pairs(tmp_path / f"b{name}")


@pytest.mark.parametrize("column", ["far", "zone", "day"])
def test_a_needed_value_that_python_cannot_hold_is_refused_with_its_place(tmp_path, column):
    path = write(tmp_path / "x.parquet", UNUSED)
    with pytest.raises(ConfigurationError, match=f"x.parquet, column '{column}', rows 1 to 2: has a value"):
        list(file_rows(path, [column]))


def test_text_that_is_not_utf8_is_refused_with_its_row(tmp_path):
    for column in (NOT_UTF8, NOT_UTF8.cast(pyarrow.binary())):
        with pytest.raises(ConfigurationError, match=r"row 2, 'text': is not UTF-8 text \(byte 0"):
            texts(write(tmp_path / "x.parquet", {"text": column}))


def test_a_folder_of_save_to_disk(tmp_path):
    import datasets

    rows = datasets.Dataset.from_dict({"text": [f"row {number}" for number in range(20)], **{"n": list(range(20))}})
    rows.shuffle(seed=1).save_to_disk(tmp_path / "one", num_shards=2)
    (tmp_path / "one" / "cache-1234.arrow").write_bytes(b"of a map, not of the dataset")
    assert texts(tmp_path / "one") == rows.shuffle(seed=1)["text"][:]
    datasets.DatasetDict(train=rows, test=rows.select([3])).save_to_disk(tmp_path / "several")
    assert texts(tmp_path / "several") == rows["text"][:]
    assert texts(tmp_path / "several" / "test") == ["row 3"]
    datasets.DatasetDict(test=rows, other=rows).save_to_disk(tmp_path / "none")
    with pytest.raises(ConfigurationError, match="has the splits test, other and no train; name one's folder"):
        texts(tmp_path / "none")
    (tmp_path / "one" / "state.json").write_text('{"_data_files": [{"filename": "../several/train/x.arrow"}]}')
    with pytest.raises(ConfigurationError, match="is damaged; save the dataset again"):
        texts(tmp_path / "one")


def test_arrow_files_that_are_damaged_compressed_or_share_values(tmp_path):
    with pytest.raises(ConfigurationError, match="a compressed Arrow file is not read; write it as Parquet"):
        texts(write(tmp_path / "z.arrow", USED, compression="zstd"))
    with pytest.raises(ConfigurationError, match="'text' has type dictionary"):
        texts(write(tmp_path / "d.arrow", {"text": pyarrow.array(["a", "a"]).dictionary_encode()}))
    preview = [[{"role": "user", "content": "a", "preview": 1}, {"role": "assistant", "content": "b", "preview": 1}]]
    assert len(pairs(write(tmp_path / "m.arrow", {"messages": preview}))) == 1
    whole, generator = write(tmp_path / "x.arrow", USED).read_bytes(), random.Random(0)
    for number in range(120):
        broken = bytearray(whole[: generator.randrange(len(whole))] if number % 2 else whole)
        for _ in range(3 if broken else 0):
            broken[generator.randrange(len(broken))] = generator.randrange(256)
        (tmp_path / "x.arrow").write_bytes(broken)
        try:
            texts(tmp_path / "x.arrow")
        except ConfigurationError as error:
            assert "x.arrow" in str(error)


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow"])
def test_rows_without_end_are_refused(tmp_path, monkeypatch, name):
    monkeypatch.setattr(column_files, "FREE_EXPANSION_BYTES", 1 << 10)
    monkeypatch.setattr(column_files, "MAX_EXPANSION", 5)
    path = write(tmp_path / name, {"text": pyarrow.nulls(4 << 20)})
    assert path.stat().st_size < 20_000
    with pytest.raises(ConfigurationError, match="expands to more than 5 times its size"):
        texts(path)
