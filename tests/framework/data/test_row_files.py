"""Files of rows of any size and any content: read one row at a time, in bounded memory, or refused in one line."""

import gzip
import io
import json
import os
import signal
import socket
import zlib

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orthotrain.data import json_rows as scanner
from orthotrain.data import row_files
from orthotrain.data.corpus.sources import open_corpus
from orthotrain.data.instructions.examples import Columns
from orthotrain.data.instructions.sources import read_examples
from orthotrain.data.json_rows import json_rows
from orthotrain.data.row_files import file_rows
from orthotrain.errors import ConfigurationError

MEMORY_BYTES = 1_900 << 20

ROWS = [{"text": f"page {number} ß \\ [,]", "n": [number, {"a": None}]} for number in range(40)]
FORMS = {
    "lines": "\n".join(map(json.dumps, ROWS)),
    "lines with a mark and blank ones": "\ufeff\n" + "\r\n\n".join(map(json.dumps, ROWS)) + "\n\n",
    "array": json.dumps(ROWS),
    "indented array": json.dumps(ROWS, indent=3, ensure_ascii=False),
    "indented rows": "\n".join(json.dumps(row, indent=1) for row in ROWS),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("block", [1, 7, 1 << 20])
@pytest.mark.parametrize("name", ["x.json", "x.json.gz"])
def test_json_may_hold_an_array_or_lines(tmp_path, monkeypatch, form, block, name):
    monkeypatch.setattr(scanner, "_BLOCK_BYTES", block)
    content = FORMS[form].encode()
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    assert list(file_rows(path)) == list(enumerate(ROWS, start=1))
    assert [document.text for document in open_corpus(str(path)).documents()] == [row["text"] for row in ROWS]
    columns = Columns("text", "text")
    assert [example.where for example in read_examples(str(path), columns)][-1] == f"{path}, row {len(ROWS)}"


def test_one_object_is_one_row(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({"text": "a"}, indent=2))
    assert list(file_rows(tmp_path / "x.json")) == [(1, {"text": "a"})]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@settings(deadline=None, max_examples=100)
@given(st.lists(VALUES, max_size=5), st.integers(1, 40), st.booleans())
def test_rows_are_what_json_says_wherever_a_block_ends(rows, block, escaped):
    content = json.dumps(rows, ensure_ascii=escaped)
    before, scanner._BLOCK_BYTES = scanner._BLOCK_BYTES, block
    try:
        assert [row for _, row in json_rows(io.BytesIO(content.encode("utf-8", "surrogatepass")), "x")] == rows
    except ConfigurationError as error:  # a lone surrogate
        assert "not UTF-8" in str(error) and not escaped
    finally:
        scanner._BLOCK_BYTES = before


BAD = {
    '{"a": 1': "row 1: not valid JSON",
    '[{"a": 1}': "row 1: not valid JSON (',' or ']' is missing after it)",
    '[{"a": 1} {"a": 2}]': "row 1: not valid JSON",
    '[{"a": 1},]': "row 2: not valid JSON",
    '[{"a": 1}]{}': "row 1: not valid JSON (text follows the array)",
    '{"a": 1}]': "row 2: not valid JSON",
    '{"a": "\t"}' + " " * 100: "row 1: not valid JSON (Invalid control character",
    "[" * 200_000: "not valid JSON (nested too deeply)",
    '{"a": ' + "9" * 5000 + "}": "row 1: not valid JSON (it has a number of more than 4,300 digits)",
    b'{"a": "\xff"}': "not UTF-8",
}


@pytest.mark.parametrize("number", range(len(BAD)))
def test_bad_json_is_one_line(tmp_path, number):
    content, said = list(BAD.items())[number]
    path = tmp_path / "x.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigurationError) as caught:
        list(file_rows(path))
    assert said in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('[{"a": 1}]', "row 1: begins with '[', as a JSON array does"),
        ('\ufeff [\n{"a": 1}\n]', "row 1: begins with '['"),
        ('\n[{"a": 1}]', "row 2: begins with '['"),
        ('{"a": ' + "9" * 5000 + "}", "row 1: not valid JSON (it has a number of more than 4,300 digits)"),
        ('{"a": 1', "row 1: not valid JSON"),
    ],
)
def test_bad_json_lines_are_one_line(tmp_path, content, said):
    path = tmp_path / "x.jsonl"
    path.write_text(content)
    with pytest.raises(ConfigurationError) as caught:
        list(file_rows(path))
    assert f"{path}, {said}" in str(caught.value)


def bomb(path, beginning=b"", size=3 << 30, filling=b"a" * (1 << 20)):
    """A gzip file of a few MB."""
    packer = zlib.compressobj(6, wbits=31)
    with path.open("wb") as file:
        file.write(packer.compress(beginning))
        block = packer.compress(filling * 4) or packer.compress(filling * 4)
        while size > 0:
            file.write(block)
            block, size = packer.compress(filling * 4), size - 4 * len(filling)
        file.write(packer.flush())
    return path


ROW = json.dumps({"text": "a b", "prompt": "a", "response": "b"}).encode()
BOMBS = {
    "x.txt.gz": {},
    "x.jsonl.gz": {"filling": (ROW + b"\n") * 20_000},
    "x.json.gz": {"beginning": b"[" + ROW, "filling": (b"," + ROW) * 20_000},
    "y.json.gz": {"beginning": b'{"text": "'},
    "z.json.gz": {"filling": b" " * (1 << 20)},
    "w.json.gz": {"beginning": b'{"text": [', "filling": b"[]," * 300_000},
}


@pytest.fixture(scope="module")
def bombs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bombs")
    return {name: bomb(folder / name, size=12 << 20, **how) for name, how in BOMBS.items()}


@pytest.mark.parametrize("name", BOMBS)
def test_gzip_bombs_are_refused_in_bounded_memory(bombs, bounded, monkeypatch, name):
    monkeypatch.setattr(row_files, "FREE_EXPANSION_BYTES", 1 << 20)
    path, memory = bombs[name], MEMORY_BYTES if name == "w.json.gz" else 300 << 20
    said = bounded(lambda: sum(len(document.text) for document in open_corpus(str(path)).documents()), memory)
    assert str(said).startswith("ConfigurationError") and "expands to more than 100 times its size" in said
    if name in ("x.jsonl.gz", "x.json.gz"):
        said = bounded(lambda: sum(1 for _ in read_examples(str(path), Columns())), memory)
        assert "expands to more than" in said


def test_a_long_array_is_read_in_bounded_memory(tmp_path, bounded):
    path, row = tmp_path / "x.json", ROW + b" " * 1000
    with path.open("wb") as file:
        file.write(b"[" + row)
        for _ in range(120):
            file.write((b"," + row) * 1000)
        file.write(b"]")
    assert path.stat().st_size > 119 << 20
    assert bounded(lambda: sum(1 for _ in read_examples(str(path), Columns())), 80 << 20) == 120_001


@pytest.mark.parametrize("content", [b'{"text": "' + b"a" * (3 << 19) + b'"}', b'{"text": [' + b"[]," * (1 << 19)])
@pytest.mark.parametrize("name", ["x.json", "x.jsonl"])
def test_a_row_that_is_too_long_is_refused_in_bounded_memory(tmp_path, bounded, monkeypatch, name, content):
    monkeypatch.setattr(row_files, "MAX_ROW_BYTES", 1 << 20)
    monkeypatch.setattr(scanner, "MAX_ROW_BYTES", 1 << 20)
    path = tmp_path / name
    path.write_bytes(content)
    said = bounded(lambda: list(file_rows(path)), MEMORY_BYTES // 16)  # with a limit of a 32nd
    assert said == f"ConfigurationError: {path}, row 1: longer than 1,048,576 bytes; give shorter rows"


def test_parquet_bombs_are_refused_by_name(tmp_path, bounded):
    path = tmp_path / "x.parquet"
    table = pyarrow.table({"text": ["a" * (64 << 20)], "other": [1]})
    pyarrow.parquet.write_table(table, path, compression="zstd", use_dictionary=False)
    said = bounded(lambda: list(open_corpus(str(path)).documents()), 60 << 20)
    assert f"{path}, row group 1: column 'text' expands to more than 100 times its size" in said
    assert "column 'text'" in bounded(lambda: list(read_examples(str(path), Columns())), 60 << 20)


def test_a_long_value_that_a_dictionary_repeats_is_refused(tmp_path, bounded):
    path = tmp_path / "x.parquet"
    text = os.urandom(1 << 15).hex()
    pyarrow.parquet.write_table(pyarrow.table({"text": [text] * 1000}), path)
    assert path.stat().st_size < 1 << 20
    assert "expands to more than 100 times its size" in bounded(lambda: sum(1 for _ in file_rows(path, ["text"])))


def test_a_row_group_of_any_size_is_read_page_by_page(tmp_path, bounded):
    path = tmp_path / "x.parquet"
    texts = [os.urandom(500).hex() for _ in range(300)]
    table = pyarrow.table({"text": texts * 600})
    pyarrow.parquet.write_table(table, path, use_dictionary=False, compression=None)
    assert path.stat().st_size > 150 << 20
    assert bounded(lambda: sum(1 for _ in file_rows(path, ["text"])), 120 << 20) == 180_000


@pytest.fixture
def ends():
    """Ends the test after 20 seconds: reading a device, and opening a fifo, does not end."""

    def end(*_):
        raise TimeoutError

    usual = signal.signal(signal.SIGALRM, end)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, usual)


NO_FILES = {
    "fifo": lambda path: os.mkfifo(path),
    "device": lambda path: path.symlink_to("/dev/zero"),
    "socket": lambda path: socket.socket(socket.AF_UNIX).bind(str(path)),
}


@pytest.mark.parametrize("kind", NO_FILES)
@pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "x.json.gz", "x.parquet"])
@pytest.mark.parametrize("way", ["file", "folder", "glob"])
def test_what_is_no_regular_file_is_never_opened(tmp_path, ends, kind, name, way):
    path = tmp_path / name
    NO_FILES[kind](path)
    source = {"file": str(path), "folder": str(tmp_path), "glob": str(tmp_path / "x.*")}[way]
    said = f"source {str(path)!r} is a {kind}, not a regular file: name a file"
    with pytest.raises(ConfigurationError) as caught:
        list(open_corpus(source).documents())
    assert str(caught.value) == said
    if not name.endswith("txt"):
        with pytest.raises(ConfigurationError) as caught:
            list(read_examples(source, Columns()))
        assert str(caught.value) == said


def test_a_folder_with_the_name_of_a_file_is_a_folder(tmp_path):
    (tmp_path / "data.jsonl").mkdir()
    (tmp_path / "data.jsonl" / "x.jsonl").write_bytes(ROW)
    for source in (tmp_path, tmp_path / "data.jsonl", f"{tmp_path}/**/*.jsonl"):
        assert [document.text for document in open_corpus(str(source)).documents()] == ["a b"]
        assert len(list(read_examples(str(source), Columns()))) == 1


def test_links_that_lead_in_a_circle_end(tmp_path, bounded):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.jsonl").write_bytes(ROW)
    for name in ("b/one", "b/two", "three"):
        (tmp_path / name).symlink_to(tmp_path)
    for read in (lambda source: list(open_corpus(source).documents()), lambda s: list(read_examples(s, Columns()))):
        assert len(bounded(lambda read=read: read(str(tmp_path)), seconds=20)) == 1
        said = bounded(lambda read=read: read(f"{tmp_path}/**/*.jsonl"), seconds=20)
        assert "leads back to a folder above it; name the folders without '**'" in said


def test_names_that_are_not_utf8_are_read_and_cached(tmp_path, make_data):
    name = os.fsdecode(b"caf\xe9 \xff.jsonl")
    lines = "".join(json.dumps({"text": f"row {number} of the file " * 20}) + "\n" for number in range(60))
    (tmp_path / name).write_text(lines)
    for source in (str(tmp_path / name), f"{tmp_path}/*.jsonl", str(tmp_path)):
        assert len(list(open_corpus(source).documents())) == 60
    data = make_data(source=str(tmp_path / name), cache_dir=str(tmp_path / "cache"))
    data.setup("fit")
    assert data.cache_folder.is_dir() and len(data.train_dataloader())


@pytest.mark.parametrize("source", ["a\0b", "x\0.jsonl", "a\ud800.txt", "~nobody-of-this-name/x.jsonl", "**/a\0"])
def test_names_that_no_file_can_have_are_one_line(source):
    for read in (lambda: open_corpus(source), lambda: list(read_examples(source, Columns()))):
        with pytest.raises(ConfigurationError, match=r"^source .*(no path can have|no such user)"):
            read()
