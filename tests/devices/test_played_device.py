"""Runs the tests on a played device, each file in its own process: PyTorch registers a device for the whole process."""

from pathlib import Path

import pytest

FILES = sorted((Path(__file__).parent / "on_played").glob("test_*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_on_a_played_device(file, run_in_own_process):
    run_in_own_process(file, ORTHOTRAIN_PLAYED_DEVICE="1")
