"""The table of docs/pages/lightning.md is what runs give; each feature is tried on one module, refusals on all."""

import importlib.util
import re
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location("features", Path(__file__).with_name("lightning_features.py"))
features = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(features)

TEXT = features.PLACE.search(features.PAGE.read_text(encoding="utf-8"))[0]
CELLS = {line[0]: line[1:] for line in re.findall(r"^\| (.+) \| (.+) \| (.+) \| (.+) \|$", TEXT, re.MULTILINE)[1:]}
MESSAGES = dict(re.findall(r"^(\d+)\. (.+)$", TEXT, re.MULTILINE))
FEATURES = features.FLAGS | {f"`{name}`": feature for name, feature in features.CALLBACKS.items()}


def test_the_table_has_every_feature_and_every_callback_of_lightning():
    assert list(CELLS) == list(FEATURES)
    bases = {"BaseFinetuning", "BasePredictionWriter", "Callback", "Checkpoint", "LambdaCallback", "ProgressBar"}
    assert set(features.given.__all__) - bases == set(features.CALLBACKS)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("number", range(len(FEATURES)), ids=list(FEATURES))
def test_a_row_is_what_runs_give(number):
    name, feature = list(FEATURES.items())[number]
    for place, (module, cell) in enumerate(zip(features.MODULES, CELLS[name], strict=True)):
        # a refusal takes no time
        if cell != "works" or place == number % len(features.MODULES):
            result = features.attempt(module, feature)
            assert result == "works" if cell == "works" else result == f"refused: {MESSAGES[cell[9:-1]]}"
