"""The tables of a run of gpu.sh, and its results as one file.

    python tests/benchmarks/gpu_table.py OUT/results.jsonl [--out FOLDER]

Prints Markdown. The file is gpu_<card>.json in tests/benchmarks/results, or in FOLDER; a rehearsal is only written
to a FOLDER that is named, so that nobody takes its figures for those of a GPU.
The exit code is 1 if a case failed or is wrong.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.append(str(HERE))  # at the end: no name there comes before that of a package

from gpu import tables  # noqa: E402
from gpu.record import read_lines  # noqa: E402

Line = dict[str, Any]
STAGES = 7


def ended(lines: list[Line]) -> list[Line]:
    """Return the lines with a result, and an error for each case that was begun and has none."""
    found = [line for line in lines if "begun" not in line]
    known = {(line["stage"], line["case"]) for line in found}
    lost = [line for line in lines if "begun" in line and (line["stage"], line["case"]) not in known]
    return found + [{**line, "error": "it was begun and did not end"} for line in lost]


def card_of(lines: list[Line]) -> tuple[str, bool]:
    """Return the card of all lines, and whether they are those of a rehearsal.

    Raises:
        ValueError: There is no card, or more than one.
    """
    cards = {line["card"] for line in lines if "card" in line}
    if len(cards) != 1:
        raise ValueError(f"the results name {len(cards)} cards ({', '.join(sorted(cards))}): give those of one run")
    return cards.pop(), any(line.get("rehearsal") for line in lines)


def document(lines: list[Line]) -> dict[str, Any]:
    """Return everything that was found, by stage and case."""
    card, rehearsal = card_of(lines)
    results: dict[str, dict[str, Any]] = {}
    for line in ended(lines):
        values = {key: value for key, value in line.items() if key not in ("stage", "case", "card", "rehearsal")}
        results.setdefault(str(line["stage"]), {})[line["case"]] = values
    machine = results.get("1", {}).get("machine", {})
    about = {"device": card, "versions": machine.get("versions"), "commit": machine.get("commit")}
    return {**about, **({"rehearsal": True} if rehearsal else {}), "results": results}


def file_name(card: str) -> str:
    """Return the name of the file of a card: ``NVIDIA H100 80GB HBM3`` -> ``gpu_nvidia_h100_80gb_hbm3.json``."""
    return f"gpu_{re.sub(r'[^a-z0-9]+', '_', card.lower()).strip('_')}.json"


def written(found: dict[str, Any], folder: Path | None) -> Path | None:
    """Write the file and return where; None for a rehearsal without a folder of its own."""
    own = HERE / "results"
    if found.get("rehearsal") and (folder is None or folder.resolve() == own.resolve()):
        return None
    path = (folder or own) / file_name(found["device"])
    if folder is None and len(found["results"]) < STAGES and path.exists():
        raise ValueError(
            f"these are results of {len(found['results'])} stages, and {path} has more: name a --out FOLDER"
        )
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return path


def main() -> int:
    """Print the tables and write the file; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path, help="folder of the file; by default tests/benchmarks/results")
    options = parser.parse_args()
    try:
        found = document(read_lines(options.results))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    for table in tables.ALL:
        text = table(found["results"])
        if text:
            print(text, end="\n\n")
    try:
        path = written(found, options.out)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"wrote {path}" if path else "a rehearsal: no file was written; --out FOLDER writes one")
    return 1 if tables.failed(found["results"]) else 0


if __name__ == "__main__":
    sys.exit(main())
