"""The harness that records all faults; its table is printed at the end (``pytest -s``)."""

import runpy
import sysconfig
from pathlib import Path

import pytest

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
    print("\n" + harness.table())
