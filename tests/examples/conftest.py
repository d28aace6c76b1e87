"""Loading an example's program as its README's command does: its own folder first on the path."""

import importlib.util
import logging
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(monkeypatch):
    """Return a function that imports a file of ``examples``, forgetting it afterwards."""
    before = set(sys.modules)
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level

    def load(path):
        file = EXAMPLES / path
        monkeypatch.syspath_prepend(file.parent)
        spec = importlib.util.spec_from_file_location(f"example_{file.parent.name}_{file.stem}", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield load
    logger.setLevel(level)  # the programs silence it
    for name in set(sys.modules) - before:
        if str(EXAMPLES) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
