"""Texts that share most of their lines are in one group, and no others are."""

import random

import pytest

from orthotrain.data.near_duplicates import COMMON, FEWEST_LINES, LINE_BYTES, groups


def code(start, count, name="value"):
    return [f"{name}_{number} = compute({number})" for number in range(start, start + count)]


def text(*parts):
    return "\n".join(line for part in parts for line in part)


def test_copies_and_nearly_copies_are_in_one_group():
    original = code(0, 20)
    shuffled = random.Random(0).sample(original, 20)
    texts = [
        text(code(0, 20, "other")),
        text(original),
        text(["    " + line + " " for line in original], [""]),
        text(shuffled),
        text(original[:10], code(0, 90, "more")),  # a small part of a long text is half of the short text
        text(original[:9], code(0, 11, "unlike")),
        text(original[10:], code(0, 10, "second")),  # shares nothing with the short one, and much with the original
    ]
    assert groups(texts) == [0, 1, 1, 1, 1, 5, 1]
    assert groups(reversed(texts)) == [0, 1, 0, 0, 0, 0, 6]
    assert groups([]) == [] and groups(["\n"]) == [0]


@pytest.mark.parametrize(("shared", "alike"), [(9, False), (10, True)])
def test_half_of_the_different_lines_of_the_smaller_text_make_a_copy(shared, alike):
    small = text(code(0, shared), code(0, 20 - shared, "small"), code(0, 5) * 3)
    large = text(code(0, shared), code(0, 300, "large"))
    assert (groups([small, large]) == [0, 0]) is alike
    assert (groups([large, small]) == [0, 0]) is alike


def test_short_texts_are_copies_only_if_they_are_equal_but_for_white_space():
    few = code(0, FEWEST_LINES - 1)
    assert groups([text(few), text(few, ["x"]), text(["", *few]), "", "a", " a\n", "\n", "a a"]) == [
        0, 1, 0, 3, 4, 4, 3, 7
    ]  # fmt: skip
    assert groups([text(few, ["one = more()"]), text(few, ["one = more()", "x"])]) == [0, 0]
    short = ["y" * (LINE_BYTES - 1 - number) for number in range(9)]
    assert groups([text(short), text(short, ["x"])]) == [0, 1], "short lines count in no comparison"


@pytest.mark.parametrize("copies", [COMMON, COMMON + 1])
def test_lines_of_many_texts_are_boilerplate_unless_the_texts_are_copies(copies):
    license_lines = code(0, 9, "license")
    texts = [text(license_lines, code(0, FEWEST_LINES, f"own_{number}")) for number in range(copies)]
    assert groups(texts) == ([0] * copies if copies <= COMMON else list(range(copies)))
    assert groups([text(license_lines), *texts[:5], *[text(code(0, 9))] * copies]) == [0] * 6 + [6] * copies


def test_copies_count_once_as_texts_of_a_line():
    fewest = code(0, FEWEST_LINES)
    assert groups([text(fewest)] * (COMMON + 1) + [text(fewest, ["and = another(line)"])]) == [0] * (COMMON + 2)
    assert groups([text(fewest), text(fewest, code(0, 9, "more"))]) == [0, 0]
    assert groups([text(fewest[1:]), text(fewest, code(0, 9, "more"))]) == [0, 1]


def test_the_limits_are_part_of_the_splits_of_built_in_sources():
    assert (LINE_BYTES, COMMON, FEWEST_LINES) == (12, 100, 5), "with others, raise _READING of the cache folder"


def test_lone_surrogates_are_text():
    assert groups(["\ud800", "\ud800 ", "\ud801"]) == [0, 0, 2]
