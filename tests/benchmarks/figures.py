"""The figures of README.md, the manual and the pages of examples are those of the committed results.

    .venv/bin/python tests/benchmarks/figures.py --check    # fails for a figure of another origin (make results)
    .venv/bin/python tests/benchmarks/figures.py --write    # puts the figures of the results into the pages

A page marks the place of a table of tables.py by ``<!-- table: NAME -->`` and ``<!-- end of table -->``. figures.yaml
lists the sentences that have figures of results, and the numbers that look measured and are not. A number that looks
measured and is in no table, no such sentence and not among these constants is a fault.
"""

import argparse
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE))  # at the end: no name there comes before that of a package

from tables import PENDING, TABLES, built, results  # noqa: E402

ROOT = HERE.parents[1]
PLACES = ("README.md", "docs/pages/**/*.md", "examples/*/README.md", "kernels/*/README.md")
PAGES = [page for place in PLACES for page in sorted(ROOT.glob(place))]
PLACE = re.compile(r"(<!-- table: (.+?) -->\n).*?(<!-- end of table -->)", re.DOTALL)
REGISTRY: dict[str, dict[str, Any]] = yaml.safe_load((HERE / "figures.yaml").read_text())
FIELD = re.compile(r"(\{[^{}]+\})")
# marked tables, blocks but printed text, formulas, code, targets of links
NO_PROSE = re.compile(
    r"<!-- table: .+? -->.*?<!-- end of table -->|^ *```(?!text\n)\w+\n.*?^ *```$|"
    r"\$\$.*?\$\$|\$[^$]+?\$|`[^`\n]+`|\]\([^)]*\)",
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


class Results(dict[str, Any]):
    """The results of all benchmarks by their names, for the sentences of figures.yaml."""

    def __missing__(self, name: str) -> Any:
        return results(name)


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
    """Return the numbers of a page that look measured and of which nothing says where they come from.

    The pages of kernels are derivations, whose numbers are computed on the page.
    """
    if page.startswith("kernels/"):
        return []

    def blank(match: re.Match[str]) -> str:
        return re.sub(r"[^\n]", " ", match[0])

    for sentence in sentences(page):
        text = pattern(sentence).sub(blank, text)
    text = NO_PROSE.sub(blank, text)
    constants = {**REGISTRY["constants"]["everywhere"], **REGISTRY["constants"].get(page, {})}
    found = [re.sub(r"\s+", " ", number) for number in MEASURED.findall(text)]
    return [number for number in found if number not in constants]


def filled(page: Path) -> str:
    """Return the text of a page with every marked table and every listed sentence as the results are now."""

    def table_of(place: re.Match[str]) -> str:
        return f"{place[1]}{built(place[2])}\n{place[3]}" if place[2] in TABLES else place[0]  # another test makes it

    text = PLACE.sub(table_of, page.read_text(encoding="utf-8"))
    for sentence in sentences(str(page.relative_to(ROOT))):
        text = with_figures(text, sentence, Results())
    return text


def faults(page: Path) -> list[str]:
    """Return what is wrong with the figures of a page: they differ from the results, or nothing says where from."""
    name, text = str(page.relative_to(ROOT)), page.read_text(encoding="utf-8")
    old = [] if filled(page) == text else [f"{name} differs from the committed results: run figures.py --write"]
    return old + [f"{name}: {number} is in no table and not in figures.yaml" for number in unexplained(name, text)]


def main() -> None:
    """Write the figures into the pages, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--write", action="store_true", help="put the figures of the results into the pages")
    chosen.add_argument("--check", action="store_true", help="fail for a figure that is not of the results")
    if parser.parse_args().write:
        for page in PAGES:
            page.write_text(filled(page), encoding="utf-8")
        return
    pending = [name for name in TABLES if built(name) == PENDING]
    print(f"to be measured again: {', '.join(pending) or 'nothing'}")
    sys.exit("\n".join(fault for page in PAGES for fault in faults(page)) or None)


if __name__ == "__main__":
    main()
