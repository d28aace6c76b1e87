"""The played device, registered with PyTorch once for each process."""

import importlib.util
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def played():
    """The module ``played.py``; a device cannot be registered twice."""
    if "played_device" not in sys.modules:
        spec = importlib.util.spec_from_file_location("played_device", Path(__file__).with_name("played.py"))
        sys.modules["played_device"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["played_device"])
    return sys.modules["played_device"]
