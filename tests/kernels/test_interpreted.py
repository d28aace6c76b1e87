"""Runs the tests of the Triton kernels, interpreted on the CPU, each file in its own process."""

from pathlib import Path

import pytest

pytest.importorskip("triton")

FILES = sorted((Path(__file__).parent / "interpreted").glob("test_*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_interpreted(file, run_in_own_process):
    run_in_own_process(file, TRITON_INTERPRET="1")
