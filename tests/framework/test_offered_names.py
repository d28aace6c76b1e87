"""The names that ``import orthotrain`` offers: imported at their first use, and known to type checkers."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import orthotrain

NAMES = {(room, name) for room, names in orthotrain._NAMES.items() for name in names}


@pytest.mark.parametrize(("room", "name"), sorted(NAMES))
def test_each_name_is_that_of_its_room(room, name):
    value = getattr(orthotrain, name)
    assert value is getattr(importlib.import_module(f"orthotrain.{room}"), name)
    assert name in orthotrain.__all__ and name in dir(orthotrain)


def test_type_checkers_see_the_same_names():
    tree = ast.parse(Path(orthotrain.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {(node.module.removeprefix("orthotrain."), alias.asname) for node in block.body for alias in node.names}
    assert seen == NAMES


def test_an_unknown_name_is_an_error():
    with pytest.raises(AttributeError, match="module 'orthotrain' has no attribute 'PoetModul'"):
        _ = orthotrain.PoetModul


@pytest.mark.parametrize("line", ["import orthotrain", "from orthotrain.cli.main import main; main(['--version'])"])
def test_torch_is_not_imported(line):
    code = f"{line}\nimport sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0
