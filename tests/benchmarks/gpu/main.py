"""One stage of gpu.sh in this process: `python -P tests/benchmarks/gpu/main.py --stage N --results FILE`."""

import argparse
import gc
import importlib
import sys
import time
import traceback
from pathlib import Path
from typing import Any

START = time.monotonic()
sys.path.append(str(Path(__file__).parents[1]))  # at the end: no name there comes before that of a package

from gpu.record import Record, append_line, described  # noqa: E402  (what follows the path, and takes no time)

STAGES = {1: "machine", 2: "correctness", 3: "layers", 4: "operations", 5: "speed", 6: "large", 7: "fit"}
NEEDED_TO_END = 2.0
"""Seconds of a stage's limit in which no case is begun."""


def stage_cases(stage: int, machine: Any) -> list[Any]:
    """Return the cases of a stage in the order of their importance."""
    return list(importlib.import_module(f"gpu.{STAGES[stage]}").cases(machine))


def main() -> None:
    """Run the cases of a stage, or every n-th of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", type=int, choices=STAGES, required=True)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True, help="time that this process has")
    parser.add_argument("--part", type=int, default=0)
    parser.add_argument("--parts", type=int, default=1, help="processes that share the cases")
    parser.add_argument("--only", default="", help="text that the names of cases contain")
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    try:
        from gpu.device import Gpu, Rehearsal

        machine = Rehearsal() if options.rehearse else Gpu()
        cases = stage_cases(options.stage, machine)[options.part :: options.parts]
        common = {"card": machine.name()} | ({"rehearsal": True} if machine.rehearsal else {})
    except Exception as error:  # it would be the same in a new process: the stage ends as one that is done
        traceback.print_exc()
        line = {"stage": options.stage, "case": f"beginning of part {options.part}", "error": described(error)}
        append_line(options.results, line | ({"rehearsal": True} if options.rehearse else {}))
        return
    left = options.seconds - (time.monotonic() - START) - NEEDED_TO_END
    gc.collect()
    gc.freeze()  # what is imported is left out of later collections, of which each capture of a graph may begin one
    Record(options.results, options.stage, left, common, options.only, machine.release, machine.is_lost).take(cases)


if __name__ == "__main__":
    main()
