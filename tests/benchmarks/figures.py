"""Figures in running text: which sentences of pages have figures of results, and which numbers are no results at all.

figures.yaml lists both. ``tables.py --write`` puts the figures of the results into the sentences, and
tests/docs/test_tables.py fails for a number that looks measured and is neither in a table, nor in such a sentence, nor
among the constants.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

REGISTRY: dict[str, dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("figures.yaml").read_text())
FIELD = re.compile(r"(\{[^{}]+\})")
# marked tables, blocks but printed text, formulas, code, targets of links
NO_PROSE = re.compile(
    r"<!-- table: .+? -->.*?<!-- end of table -->|^ *```(?!text\n)\w+\n.*?^ *```$|\$\$.*?\$\$|\$[^$]+?\$|`[^`\n]+`|\]\([^)]*\)",
    re.DOTALL | re.MULTILINE,
)
UNIT = (
    r"(?:%|[munµ]?s|seconds?|minutes?|hours?|[KMG]i?B|tokens/s|[TG]?FLOP\S*|(?:x|times) (?:as|the|slower|faster))(?!\w)"
)
WORD = "two|three|four|five|six|seven|eight|nine|ten|twelve|fifteen|twenty|thirty"
MEASURED = re.compile(
    rf"(?<![\w.:/-])(?:(?:[\d,]+(?:\.\d+)?(?:e[-+]?\d+)?|{WORD})[ \n]{UNIT}|\d+%"
    r"|[\d,]*\d\.\d+(?:e[-+]?\d+)?[BMK]?|\d+e[-+]?\d+|\d+(?:,\d{3})+)(?![\w-])(?!\.\d)"
)


def sentences(page: str) -> list[str]:
    """Return the sentences of a page that have figures of results, as templates."""
    return REGISTRY["sentences"].get(page, [])


def pattern(sentence: str) -> re.Pattern[str]:
    """Return what finds a sentence in a page, whatever its figures and line ends: texts and figures in turn."""
    parts = FIELD.split(sentence)
    texts = [re.sub(r"(?:\\\s)+", r"\\s+", re.escape(part)) for part in parts[::2]]
    return re.compile("(.+?)".join(f"({text})" for text in texts), re.DOTALL)


def with_figures(text: str, sentence: str, results: Mapping[str, Any]) -> str:
    """Return a page whose sentence has the figures of the results.

    Raises:
        LookupError: If the page has no such sentence, or more than one.
    """
    values = [field.format_map(results) for field in FIELD.findall(sentence)]
    found = list(pattern(sentence).finditer(text))
    if len(found) != 1:
        raise LookupError(f"the page has this sentence {len(found)} times: {sentence}")
    groups = list(found[0].groups())
    groups[1::2] = values
    return text[: found[0].start()] + "".join(groups) + text[found[0].end() :]


def unexplained(page: str, text: str) -> list[str]:
    """Return the numbers of a page that look measured and of which nothing says where they come from."""

    def blank(match: re.Match[str]) -> str:
        return re.sub(r"[^\n]", " ", match[0])

    for sentence in sentences(page):
        text = pattern(sentence).sub(blank, text)
    text = NO_PROSE.sub(blank, text)
    constants = {**REGISTRY["constants"]["everywhere"], **REGISTRY["constants"].get(page, {})}
    found = [re.sub(r"\s+", " ", number) for number in MEASURED.findall(text)]
    return [number for number in found if number not in constants]
