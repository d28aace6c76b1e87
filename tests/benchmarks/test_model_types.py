"""A few model types do what the committed results of all say; the full run is a command (model_types.py)."""

import importlib.util
import json
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location("model_types", Path(__file__).parent / "model_types.py")
model_types = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(model_types)
COMMITTED = json.loads(model_types.RESULTS.read_text())["results"]


def without_numbers(found):
    return {key: value for key, value in found.items() if key != "off"}


@pytest.mark.parametrize("method", ["POET", "OFT"])
@pytest.mark.parametrize("name", ["llama", "roberta", "clip", "resnet"])
def test_a_model_type_does_what_the_table_says(name, method):
    with model_types.quiet():
        found = model_types.tried(name, method)
    assert without_numbers(found) == without_numbers(COMMITTED[name][method])


def test_the_table_has_all_types_and_no_failure():
    assert list(COMMITTED) == list(model_types.TYPES)
    assert {row["result"] for methods in COMMITTED.values() for row in methods.values()} <= {"passes", "refused"}
