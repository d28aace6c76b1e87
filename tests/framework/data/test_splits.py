"""Splits: decided by the key and the seed alone."""

from orthotrain.data.splits import Splitter


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
