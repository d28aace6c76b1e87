"""Faults of runs on FSDP2 whose checkpoints are folders with a part of every rank."""

import runpy
from pathlib import Path

import pytest

from orthotrain.checkpoints.reading import check_checkpoint
from orthotrain.errors import ConfigurationError

HARNESS = runpy.run_path(str(Path(__file__).parent / "harness.py"))
LONG = HARNESS["LONG"]
RECIPES = ["SHARDED", "STEPWISE_SHARDED"]

# Fault while writing a part; before writing the checksums; before renaming the folder; after moving the old folder of
# that name away; while removing an older folder. Some runs resume from a step at which permutations were just drawn.
WRITING = [("STEPWISE_SHARDED", "shard", 11, 1)]
if LONG:
    WRITING = [("STEPWISE_SHARDED", "shard", save, save % 2) for save in range(1, 13)]
    WRITING += [("SHARDED", "shard", save, save % 2) for save in (1, 4, 7, 8, 11, 12)]
    WRITING += [("STEPWISE_SHARDED", "sums", save, save % 2) for save in (1, 6, 12)]
    WRITING += [("STEPWISE_SHARDED", "publish", save, 0) for save in (1, 6, 12)]
    WRITING += [("STEPWISE_SHARDED", "rename", number, 0) for number in (1, 3, 5)]
    WRITING += [("STEPWISE_SHARDED", "drop", number, 0) for number in (1, 4, 9)]


@pytest.mark.parametrize(("recipe", "stage", "number", "rank"), WRITING)
def test_one_rank_is_killed_while_a_checkpoint_is_written(harness, recipe, stage, number, rank):
    run = harness.new_run(recipe)
    codes = run.fit(fault=[stage, number, rank])
    assert codes[rank] == -9 and codes[1 - rank] not in (0, -9), codes  # the other rank ends because of it
    hidden = [path for path in run.folder.glob(".*") if path.suffix in (".partial", ".old")]
    assert hidden, "the half-written or half-removed folder has another name than a checkpoint"
    harness.recover("SIGKILL of one rank while a checkpoint is written, replaced or removed", run)


FLIP, TRUNCATE, EMPTY, REMOVE = (HARNESS[name] for name in ("flip", "truncate", "empty", "remove"))
DAMAGES = [("STEPWISE_SHARDED", "__1_0.distcp", FLIP)]
if LONG:
    shards = [("__0_0.distcp", FLIP), ("__0_0.distcp", REMOVE), ("__1_0.distcp", TRUNCATE), ("__1_0.distcp", EMPTY)]
    rest = [(".metadata", FLIP), ("meta.pt", FLIP), ("meta.pt", REMOVE), ("checksums.json", TRUNCATE)]
    DAMAGES = [(recipe, *damage) for recipe in RECIPES for damage in shards]
    DAMAGES += [("STEPWISE_SHARDED", *damage) for damage in rest]


@pytest.mark.parametrize(("recipe", "file", "damage"), DAMAGES)
def test_a_file_of_the_newest_checkpoint_is_damaged(harness, recipe, file, damage):
    run = harness.new_run(recipe)
    assert run.fit(fault=["kill", 7, 1])[1] == -9
    earlier, *newest = run.checkpoints()[-3:]
    for path in newest:
        damage(path / file)
        with pytest.raises(ConfigurationError, match="cannot be read|is incomplete"):
            check_checkpoint(path)
    harness.recover("a file of the two newest checkpoints damaged or missing", run, at_most=7 - 4)
    for path in newest:
        assert f"skipped: checkpoint '{path}" in run.log()
    assert f"--ckpt_path last is {earlier}" in run.log()
