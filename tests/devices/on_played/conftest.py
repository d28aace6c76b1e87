"""The played device; the files here are run by ../test_played_device.py in processes of their own."""

import importlib.util
import os
from pathlib import Path

import pytest

ON_PLAYED = os.environ.get("ORTHOTRAIN_PLAYED_DEVICE") == "1"
collect_ignore_glob = [] if ON_PLAYED else ["test_*.py"]


@pytest.fixture(scope="session")
def played():
    """The module ``played.py``, which registers the device; that cannot be done twice."""
    spec = importlib.util.spec_from_file_location("played_device", Path(__file__).with_name("played.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
