"""Documents of all formats, or one line that names the file and the position of the fault."""

import gzip
import json

import pytest

from orthotrain.data.corpus import documents
from orthotrain.data.corpus.sources import open_corpus
from orthotrain.errors import ConfigurationError

ROWS = ["first text", "zweiter Text: ß", "third\nwith a line"]


def texts(source, **options):
    return [document.text for document in open_corpus(source, **options).documents()]


def parquet(path, rows, column="text"):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({column: rows, "other": list(range(len(rows)))}), path)


def write_rows(path):
    lines = "\n\n".join(json.dumps({"text": text, "id": 1}) for text in ROWS).encode()
    if path.name.endswith(".jsonl"):
        path.write_bytes(lines)
    elif path.name.endswith(".jsonl.gz"):
        path.write_bytes(gzip.compress(lines))
    elif path.name.endswith(".parquet"):
        parquet(path, ROWS)
    else:
        content = json.dumps([{"text": text} for text in ROWS]).encode()
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.json", "x.json.gz", "x.parquet", "X.JSONL"])
def test_every_format_of_rows_gives_the_same_documents(tmp_path, name):
    path = write_rows(tmp_path / name.lower())
    path = path.rename(tmp_path / name)
    assert texts(str(path)) == ROWS


def test_another_text_column(tmp_path):
    parquet(tmp_path / "x.parquet", ROWS, "content")
    assert texts(str(tmp_path / "x.parquet"), text_column="content") == ROWS


def test_text_files_gzip_folders_and_globs(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "a.txt").write_text("A ß\r\n", newline="")
    (tmp_path / "b" / "c.md.gz").write_bytes(gzip.compress(b"C"))
    (tmp_path / "b" / "picture.png").write_bytes(b"\0\1")
    (tmp_path / "empty.txt").write_text("")
    assert texts(str(tmp_path)) == ["A ß\r\n", "C"]
    assert texts(str(tmp_path / "**" / "*.gz")) == ["C"]
    assert texts([str(tmp_path / "b"), str(tmp_path / "a.txt")]) == ["C", "A ß\r\n"]
    names = [document.name for document in open_corpus(str(tmp_path)).documents()]
    assert names == ["a.txt", "b/c.md.gz"]


def test_a_long_text_comes_in_pieces_that_make_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "PIECE_BYTES", 50)
    whole = "".join(f"línea número {number} ß\n" for number in range(40)) + "é" * 200
    (tmp_path / "x.txt").write_text(whole)
    pieces = list(open_corpus(str(tmp_path)).documents())
    assert "".join(piece.text for piece in pieces) == whole
    assert len(pieces) > 10 and [piece.complete for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert max(len(piece.text) for piece in pieces) <= 100
    limited = list(open_corpus(str(tmp_path), limit_bytes=10).documents())
    assert limited == pieces, "a document that was begun is finished"


def test_a_long_row_comes_in_pieces_of_one_split(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "PIECE_BYTES", 50)
    rows = ["x" * 50, "y" * 51, "z" * 150]
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps({"text": row}) for row in rows))
    pieces = list(open_corpus(str(tmp_path)).documents())
    assert [(len(piece.text), piece.complete) for piece in pieces] == [
        *[(50, True), (50, False), (1, True)],
        *[(50, False), (50, False), (50, True)],
    ]
    assert len({piece.key for piece in pieces}) == 3


def bad(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("x.txt", b"abc\0def", "binary file (a NUL byte at offset 3)"),
        ("x.py", b"abc\xff", "not UTF-8 text (byte 3"),
        ("x.txt", b"abc\xc3", "not UTF-8 text (byte 3: unexpected end"),
        ("x.jsonl", b'{"text": "a"}\n{"txt": "b", "n": 1}\n', "row 2: no column 'text'; its columns are ['n', 'txt']"),
        ("x.jsonl", b'{"text": "a"}\n{"text": \n', "row 2: not valid JSON"),
        ("x.jsonl", b"[" * 200_000, "JSON"),
        ("x.jsonl", b"\xff\xfe\n", "row 1: not valid JSON"),
        ("x.jsonl", b'{"text": 5}\n', "row 1, 'text': must be a string, found int"),
        ("x.jsonl", b"1\n", "row 1: expected an object with 'text', found int"),
        ("x.jsonl", b'{"text": "a\\ud800"}\n', "lone surrogate at character 1"),
        ("x.json", b"{", "not valid JSON"),
        ("x.json", b'[{"text": "a"}, {}]', "row 2: no column 'text'"),
        ("x.parquet", b"PAR1nonsense", "not a readable parquet file"),
        ("x.txt.gz", b"not gzip", "damaged gzip file"),
        ("x.txt.gz", gzip.compress(b"abc" * 999, mtime=0)[:-12], "damaged gzip file"),
        ("x.bin", b"abc", "unknown format '.bin'; known: .txt"),
        ("x.parquet.gz", b"abc", "unknown format"),
    ],
)
def test_bad_content_names_the_file_and_the_place(tmp_path, name, content, expected):
    path = bad(tmp_path, name, content)
    with pytest.raises(ConfigurationError) as caught:
        texts(path)
    assert expected in str(caught.value) and path in str(caught.value) and "\n" not in str(caught.value)


def test_a_mark_at_the_beginning_is_no_text(tmp_path):
    for name, content in {"a.txt": b"", "b.txt": b"\xef\xbb\xbf", "c.txt": b"\xef\xbb\xbfhello\n"}.items():
        (tmp_path / name).write_bytes(content)
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))
    assert texts(str(tmp_path)) == ["hello\n", "hello\n"]
    with pytest.raises(ConfigurationError, match="byte 4"):
        texts(bad(tmp_path, "d.txt", b"\xef\xbb\xbfa\xff"))


def test_rows_without_text_are_left_out_and_counted(tmp_path):
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [*ROWS, None, "", None]))
    parquet(tmp_path / "x.parquet", [None, *ROWS])
    places = []
    documents = open_corpus(str(tmp_path)).documents(places.append)
    assert [document.text for document in documents] == ROWS * 2
    assert places == [*(f"{tmp_path / 'x.jsonl'}, row {row}" for row in (4, 6)), f"{tmp_path / 'x.parquet'}, row 1"]


def test_a_parquet_file_without_the_column_lists_its_columns(tmp_path):
    parquet(tmp_path / "x.parquet", ROWS, "body")
    with pytest.raises(ConfigurationError, match=r"no column 'text'; its columns are \['body', 'other'\]"):
        texts(str(tmp_path / "x.parquet"))
