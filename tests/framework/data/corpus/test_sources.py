"""Sources of text: what a name means, and one line for a name that means nothing."""

import re

import pytest

from orthotrain.data.corpus.sources import open_corpus, source_location
from orthotrain.errors import ConfigurationError

ROWS = ["first text", "zweiter Text: ß", "third\nwith a line"]


def texts(source, **options):
    return [document.text for document in open_corpus(source, **options).documents()]


def test_limit_bytes_stops_between_documents(corpus):
    some = list(open_corpus(str(corpus), limit_bytes=3000).documents())
    size = sum(len(document.text.encode()) for document in some)
    assert 3000 <= size < 3000 + len(some[-1].text.encode())


def test_the_standard_library_is_sources_without_tests():
    files = open_corpus("python-stdlib").parts[0]
    names = [name for _, name in files.entries]
    assert len(set(names)) == len(names)
    assert "ast.py" in names and "json/decoder.py" in names and len(names) > 400
    assert not [name for name in names if "test" in name.split("/")[:-1] or "site-packages" in name]


def test_a_hugging_face_dataset_and_its_config(monkeypatch):
    import datasets

    asked = []

    def load_dataset(path, config, split, streaming):
        asked.append((path, config, split, streaming))
        rows = datasets.Dataset.from_list([{"body": text} for text in ROWS])
        return rows.to_iterable_dataset() if streaming else rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert texts("org/name:conf", text_column="body") == ROWS
    assert texts("org/name", text_column="body", streaming=True) == ROWS
    assert asked == [("org/name", "conf", "train", False), ("org/name", None, "train", True)]
    with pytest.raises(ConfigurationError, match=r"dataset 'org/name', row 1: no column 'text'.*\['body'\]"):
        texts("org/name")


def test_a_dataset_that_cannot_be_loaded(monkeypatch):
    import datasets

    def load_dataset(*arguments, **options):
        raise ConnectionError("cannot reach the hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        ConfigurationError, match=r"'no/where': there is no such file or folder, and.*cannot reach the hub"
    ):
        texts("no/where")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("missing.txt", "'missing.txt': no such file or folder"),
        ("missing/data.jsonl", "'missing/data.jsonl': no such file or folder"),
        ("no/such/deep/path", "'no/such/deep/path': no such file or folder"),
        ("missing/*.txt", "the glob matches no file"),
        ([], "empty list"),
    ],
)
def test_missing_sources(tmp_path, monkeypatch, source, expected):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError, match=re.escape(expected)):
        texts(source)


def test_a_folder_without_text(tmp_path):
    (tmp_path / "picture.png").write_bytes(b"x")
    with pytest.raises(ConfigurationError, match="holds no file of a known format"):
        texts(str(tmp_path))


def test_location_is_absolute_for_paths_only(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.txt").write_text("x")
    assert source_location("x.txt") == str(tmp_path / "x.txt")
    assert source_location("org/name") == "org/name"


def test_hidden_files_are_left_out_and_linked_folders_are_read_once(tmp_path, monkeypatch):
    root, other = tmp_path / "data", tmp_path / "other"
    for name in ("b/two.txt", "one.txt", ".ipynb_checkpoints/one.txt", "b/._two.txt", ".hidden.txt", "__MACOSX/x.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    (other / "deep").mkdir(parents=True)
    (other / "deep" / "three.txt").write_text("three")
    for link, target in {"a": root / "b", "linked": other, "again": other / "deep", "b/up": tmp_path}.items():
        (root / link).symlink_to(target)
    assert sorted(texts(str(root))) == ["b/two.txt", "one.txt", "three"]
    monkeypatch.setenv("HOME", str(tmp_path))
    for source in ("~/data", ["~/data"], "~/data/../data"):
        assert texts(source) == texts(str(root))
    assert texts("~/data/*.txt") == texts("~/data/one.txt") == ["one.txt"]
    assert source_location("~/data/*.txt") == str(root / "*.txt")
    assert texts(str(root / ".hidden.txt")) == [".hidden.txt"], "named by the user"
    (root / "moved").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigurationError, match=r"the link '.*moved' leads nowhere"):
        texts(str(root))
