"""Runs the tests of the Triton kernels, interpreted on the CPU, each file in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

FILES = sorted((Path(__file__).parent / "interpreted").glob("test_*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_interpreted(file):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-m", "pytest", "-p", "no:xdist", "-W", "ignore", file]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=file.parents[3])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
