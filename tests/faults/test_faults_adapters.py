"""Faults of finetuning runs that save their trained parameters alone."""

import runpy
from pathlib import Path

import pytest

from orthotrain.checkpoints.reading import check_checkpoint
from orthotrain.errors import ConfigurationError

HARNESS = runpy.run_path(str(Path(__file__).parent / "harness.py"))
LONG = HARNESS["LONG"]

# Fault while writing the checkpoint, or the weights; before renaming the folder; while removing an older folder.
WRITING = [("weights", 3), ("drop", 2)]
if LONG:
    WRITING = [(stage, save) for stage in ("save", "weights", "publish") for save in range(1, 7)]
    WRITING += [("drop", number) for number in range(1, 5)]


@pytest.mark.parametrize(("stage", "number"), WRITING)
def test_killed_while_an_adapter_is_written(harness, stage, number):
    run = harness.new_run("ADAPTER")
    assert run.fit(fault=[stage, number]) == [-9]
    assert list(run.folder.glob(".*.partial")), "the half-written folder has another name than a checkpoint"
    harness.recover("SIGKILL while a checkpoint is written or an older one removed", run)


DAMAGES = [HARNESS["flip"]] if not LONG else [HARNESS[name] for name in ("flip", "truncate", "empty", "remove")]


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_newest_adapter_is_damaged(harness, damage):
    run = harness.new_run("ADAPTER")
    assert run.fit(fault=["kill", 7]) == [-9]
    earlier, newest = run.checkpoints()[-2:]
    damage(newest)
    if newest.exists():
        with pytest.raises(ConfigurationError, match="cannot be read"):
            check_checkpoint(newest)
    harness.recover("the newest checkpoint damaged or missing", run, at_most=7 - 4)
    assert not newest.exists() or f"skipped: checkpoint '{newest}' cannot be read" in run.log().replace("\n", " ")
    assert f"--ckpt_path last is {earlier}" in run.log()
