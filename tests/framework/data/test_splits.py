"""Splits: decided by the key and the seed alone."""

import random

import pytest

from orthotrain.data.corpus.documents import Document
from orthotrain.data.splits import ALWAYS_TRAIN, PositionSplitter, Splitter, fitting_splitter


def test_splits_depend_on_the_name_and_the_seed_and_have_the_asked_sizes():
    documents = [f"dir/{number}.py" for number in range(4000)]
    splits = [Splitter(0, 0.1, 0.2)(document) for document in documents]
    assert splits == [Splitter(0, 0.1, 0.2)(document) for document in documents]
    assert abs(splits.count("val") / 4000 - 0.1) < 0.02 and abs(splits.count("test") / 4000 - 0.2) < 0.02
    assert splits != [Splitter(1, 0.1, 0.2)(document) for document in documents]


def test_splits_are_the_same_on_every_machine():
    splits = [Splitter(0, 0.3, 0.3)(f"dir/{number}.py") for number in range(8)]
    assert splits == ["train", "train", "train", "val", "test", "val", "test", "val"]


def test_equal_rows_share_a_split():
    split = Splitter(0, 0.4, 0.4)
    assert {split("same") for _ in range(5)} == {split("same")}


@pytest.mark.parametrize("piece", [7, 100, 100_000])
@pytest.mark.parametrize("fractions", [(0.1, 0.1), (0.2, 0.0), (0.0, 0.5)])
def test_one_document_is_cut_into_contiguous_parts_at_line_ends(piece, fractions):
    generator = random.Random(piece)
    text = "\n".join("word " * generator.randint(1, 20) for _ in range(300))
    pieces = [text[start : start + piece] for start in range(0, len(text), piece)]
    documents = [Document("x", held, complete=held is pieces[-1]) for held in pieces]
    splitter = fitting_splitter(documents, Splitter(0, *fractions))
    found = list(splitter.split(documents))
    assert "".join(document.text for _, document in found) == text, "in order, nothing twice"
    expected = {"train": 1 - sum(fractions), "val": fractions[0], "test": fractions[1]}
    for split, share in expected.items():
        part = [document for name, document in found if name == split]
        assert bool(part) == bool(share)
        assert [document.complete for document in part] == [False] * (len(part) - 1) + [True] * bool(part)
        whole = "".join(document.text for document in part)
        assert len(whole) == pytest.approx(share * len(text), abs=110)
        assert piece < len(text) or share == 0 or whole.endswith("\n") or text.endswith(whole)


def test_documents_are_cut_only_if_a_split_would_have_none():
    several = [Document(f"{number}.txt", "line\n" * 50) for number in range(40)]
    splitter = Splitter(0, 0.2, 0.2)
    assert fitting_splitter(several, splitter) is splitter
    assert fitting_splitter(several[:1], Splitter(0, 0.0, 0.0)) == Splitter(0, 0.0, 0.0)
    few = fitting_splitter(several[:2], splitter)
    assert few == PositionSplitter((300, 400, 500))
    assert [split for split, _ in few.split(several[:2])] == ["train", "train", "val", "test"]
    # the third document is the first of the test split
    assert fitting_splitter(several, splitter, limit_bytes=501) is splitter
    assert fitting_splitter(several, splitter, limit_bytes=500) == few
    # a limit divides the beginning of the text; the rest is left out, or is train text of a stream
    assert fitting_splitter(several[:1], splitter, limit_bytes=100) == PositionSplitter((60, 80, 100))
    streamed = fitting_splitter(several[:1], splitter, limit_bytes=100, rest="train")
    assert [(split, len(part.text)) for split, part in streamed.split(several[:1])] == [
        ("train", 60), ("val", 20), ("test", 20), ("train", 150)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("size", "line_end", "cut"),
    [
        (100, 95, 96),
        (100, 90, 91),
        (100, 89, 100),  # before the last tenth
        (20_000, 19_000, 19_001),
        (20_000, 18_999, 20_000),  # before the last 1,000 characters
    ],
)
def test_a_part_ends_at_a_line_end_in_its_last_tenth(size, line_end, cut):
    text = "a" * line_end + "\n" + "b" * size
    found = list(PositionSplitter((size, size, size), rest="train").split([Document("x", text)]))
    assert [len(document.text) for _, document in found] == [cut, len(text) - cut]
    two = list(PositionSplitter((cut, cut + size, cut + size)).split([Document("x", "a" * cut + text)]))
    assert [(split, len(document.text)) for split, document in two] == [("train", cut), ("val", cut)]


def test_no_split_holds_out_what_is_always_trained_on():
    assert {Splitter(seed, 0.5, 0.49)(ALWAYS_TRAIN) for seed in range(9)} == {"train"}
    assert Document("a.py", "text").key == "a.py" and Document(None, "text").key == "text"
    assert Document("a.py", "text", group=ALWAYS_TRAIN).key == ALWAYS_TRAIN
