"""Runs the tests on a played device in a process of their own: PyTorch takes the device for every process it is in."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FILES = sorted((Path(__file__).parent / "on_played").glob("test_*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_on_a_played_device(file):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"ORTHOTRAIN_PLAYED_DEVICE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-m", "pytest", "-p", "no:xdist", "-W", "ignore", file]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=file.parents[3])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
