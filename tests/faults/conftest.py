"""The harness that records all faults. `make faults`, which injects all of them, keeps their counts."""

import json
import os
import runpy
import sysconfig
from pathlib import Path

import pytest

RESULTS = Path(__file__).parents[1] / "benchmarks/results/faults.json"
HARNESS = runpy.run_path(str(Path(__file__).parent / "harness.py"))


@pytest.fixture(scope="session")
def harness(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    corpus = folder / "corpus"
    corpus.mkdir()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-b]*.py")):
        (corpus / f"{path.stem}.txt").write_text(path.read_text(encoding="utf-8")[:8000], encoding="utf-8")
    harness = HARNESS["Harness"](folder, corpus)
    yield harness
    if "ORTHOTRAIN_FAULTS" in os.environ:
        RESULTS.write_text(json.dumps(harness.counts(), indent=1) + "\n")
