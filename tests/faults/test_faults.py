"""However a run dies, after a resume it reaches the weights and momenta of an undisturbed run.

``make test`` injects each fault once. ``make faults`` (ORTHOTRAIN_FAULTS=20) injects it that many times at random
moments, and keeps the counts of the table of the manual.
"""

import os
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from orthotrain.checkpoints.reading import check_checkpoint
from orthotrain.errors import ConfigurationError

HARNESS = runpy.run_path(str(Path(__file__).parent / "harness.py"))
STEPS, TIMES, LONG = HARNESS["STEPS"], HARNESS["TIMES"], HARNESS["LONG"]


MOMENTS = [("POET", number) for number in range(TIMES)]
if LONG:
    MOMENTS += [(r, number) for r in ("STEPWISE", "ADAPTER", "STEPWISE_SHARDED") for number in range(TIMES // 2)]


@pytest.mark.parametrize(("recipe", "number"), MOMENTS)
def test_killed_at_a_random_moment(harness, recipe, number):
    """The whole run, or one rank of two, after which the other rank ends too."""
    harness.undisturbed(recipe)
    step, seconds = HARNESS["random_moment"](f"kill {number}")
    run = harness.new_run(recipe)
    run.kill_after(step, seconds, victim=number % run.recipe.ranks)
    harness.recover("SIGKILL at a random moment", run, note=f"{seconds:.2f} s after step {step}")


@pytest.mark.parametrize("save", [1, 5] if not LONG else range(1, 13))
def test_killed_while_a_checkpoint_is_written(harness, save):
    run = harness.new_run()
    assert run.fit(fault=["save", save]) == [-9]
    assert list(run.folder.glob(".*.partial")), "the half-written file has another name than a checkpoint"
    harness.recover("SIGKILL while a checkpoint is written", run)


MERGES = [("POET", 9), ("STEPWISE", 39)]  # seven layers a merge: in the middle of the second and the sixth
if LONG:
    MERGES = [("POET", call) for call in range(1, 22)] + [("STEPWISE", call) for call in range(3, 85, 8)]


@pytest.mark.parametrize(("recipe", "layer"), MERGES)
def test_killed_while_a_merge_runs(harness, recipe, layer):
    run = harness.new_run(recipe)
    assert run.fit(fault=["merge", layer]) == [-9]
    harness.recover("SIGKILL while a merge runs", run)


@pytest.mark.parametrize("step", [5] if not LONG else range(1, STEPS))
def test_one_rank_of_two_is_killed(harness, step):
    run = harness.new_run("DDP")
    processes = run.start(fault=["kill", step, step % 2])
    processes[step % 2].join(90)
    assert processes[step % 2].exitcode == -9
    codes = HARNESS["RANKS"]["wait"](processes)  # the other rank ends because of it, and for no other reason
    assert all(codes), codes
    harness.recover("SIGKILL of one rank of two", run)


TERMINATED = [("POET", 4), ("DDP", 7)]
if LONG:
    TERMINATED = [(recipe, step) for recipe in ("POET", "DDP") for step in range(1, 11)]
    TERMINATED += [(recipe, step) for recipe in ("ADAPTER", "STEPWISE_SHARDED") for step in (3, 4, 9)]


@pytest.mark.parametrize(("recipe", "step"), TERMINATED)
def test_terminated(harness, recipe, step):
    """SIGTERM reaches one rank in the middle of a step: the step is finished and saved, and nothing is lost."""
    run = harness.new_run(recipe)
    ranks = run.recipe.ranks
    codes = run.fit(fault=["terminate", step, ranks - 1])
    assert codes == [143] * ranks, run.log()
    assert f"SIGTERM: step {step + 1} is saved as" in run.log()
    assert run.steps()[-1] == step + 1
    harness.recover("SIGTERM, to one rank of one or two", run, at_most=0)


def test_a_full_disk(harness):
    size = harness.undisturbed().stat().st_size
    run = harness.new_run()
    mounted = HARNESS["small_disk"](run.folder, int(3.5 * size))  # the two best, the last, half of the next
    try:
        codes = run.fit(**({} if mounted else {"fault": ["limit", size // 2]}))
        assert codes == [2]
        reason = "No space left on device" if mounted else "File too large"
        assert f"cannot be written ({reason}); the older ones are intact" in run.log()
        run.check_files()
        if mounted:
            subprocess.run(["mount", "-o", f"remount,size={9 * size}", str(run.folder)], check=True)
        harness.recover("disk full while saving (a small tmpfs)", run, note="tmpfs" if mounted else "RLIMIT_FSIZE")
    finally:
        if mounted:
            subprocess.run(["umount", str(run.folder)], check=True)


FLIP, TRUNCATE, EMPTY = (HARNESS[name] for name in ("flip", "truncate", "empty"))
DAMAGES = [("POET", FLIP), ("POET", TRUNCATE)]
if LONG:
    DAMAGES = [(recipe, damage) for recipe in ("POET", "STEPWISE") for damage in (FLIP, TRUNCATE, EMPTY)]


@pytest.mark.parametrize(("recipe", "damage"), DAMAGES)
def test_the_newest_checkpoint_is_damaged(harness, recipe, damage):
    run = harness.new_run(recipe)
    assert run.fit(fault=["kill", 7]) == [-9]
    earlier, *newest = run.checkpoints()[-3:]  # the last checkpoint, and its copy under the name of its step
    for path in newest:
        damage(path)
        with pytest.raises(ConfigurationError, match="cannot be read"):
            check_checkpoint(path)
    harness.recover("the two newest checkpoints damaged (a bit flipped, truncated, empty)", run, at_most=7 - 4)
    for path in newest:
        assert f"skipped: checkpoint '{path}' cannot be read" in run.log().replace("\n", " ")
    assert f"--ckpt_path last is {earlier}" in run.log()


def test_all_checkpoints_are_damaged(harness):
    run = harness.new_run()
    for name in ("step=2.ckpt", "last.ckpt"):
        (run.folder / name).write_bytes(b"PK\x03\x04 not much")
    assert run.fit(resume=True) == [2]
    assert "no checkpoint can be resumed" in run.log() and "step=2.ckpt" in run.log()


def test_a_source_file_disappears(harness):
    """Training continues from the cache; a resumed run without its text says so, and continues once it is back."""
    corpus = harness.folder / "other" / "corpus"
    shutil.copytree(harness.corpus, corpus)
    run = harness.new_run(corpus=corpus)
    assert run.fit(fault=["vanish", 5], vanish=[str(corpus), str(corpus.parent / "cache")]) == [-9]
    assert run.fit(resume=True) == [2]
    assert f"orthotrain: error: source '{corpus}': no such file or folder" in run.log()
    os.rename(f"{corpus}.gone", corpus)  # the cache stays deleted, and is built again
    harness.recover("data files disappear", run)


BATCHES = [("POET", 17), ("POET", 18)]  # the two batches of the ninth step, which ends with a merge
if LONG:
    BATCHES = [("POET", batch) for batch in range(1, 25) if (batch - 1) % 4 < 2]  # both batches of every second step
    BATCHES += [("STEPWISE", batch) for batch in (7, 14, 19, 24)] + [("DDP", batch) for batch in (2, 7, 9)]


@pytest.mark.parametrize(("recipe", "batch"), BATCHES)
def test_a_nan_in_a_batch(harness, recipe, batch):
    """The embedding of one token of one row becomes NaN, on the last rank; nothing else changes."""
    run = harness.new_run(recipe)
    codes = run.fit(fault=["nan", batch, run.recipe.ranks - 1])
    step = batch * run.recipe.ranks // 2
    assert codes == [1] * run.recipe.ranks and f"training diverged at optimizer step {step} " in run.log(), run.log()
    for path in run.checkpoints():
        tensors = HARNESS["trained"](path)[1].items()
        assert all(torch.isfinite(tensor).all() for _, tensor in tensors if tensor.is_floating_point())
    harness.recover("NaN in a batch", run)


LATER = ["POET"] if not LONG else ["POET", "STEPWISE", "ADAPTER", "STEPWISE_SHARDED"]


@pytest.mark.parametrize("recipe", LATER)
def test_an_earlier_checkpoint_has_a_later_time(harness, recipe):
    """A copy of the folder has other file times: the step that is stored in each file decides."""
    run = harness.new_run(recipe)
    codes = run.fit(fault=["kill", 7, run.recipe.ranks - 1])
    assert codes[-1] == -9, run.log()
    earlier = next(path for path in run.checkpoints() if HARNESS["trained"](path)[0] == 4)
    times = earlier.stat()
    os.utime(earlier, ns=(times.st_atime_ns + 10**12, times.st_mtime_ns + 10**12))
    harness.recover("an earlier checkpoint has a later time", run, at_most=7 - 6)
    assert f"--ckpt_path last is {earlier}" not in run.log()


@pytest.mark.parametrize("recipe", ["POET"] if not LONG else ["POET", "ADAPTER"])
def test_stored_paths_lead_elsewhere(harness, recipe):
    """The paths that callbacks store in a checkpoint were changed: nothing outside the run's folder is removed."""
    run = harness.new_run(recipe)
    assert run.fit(fault=["kill", 7]) == [-9]
    elsewhere = harness.folder / f"{run.folder.name} elsewhere"
    elsewhere.mkdir()
    (elsewhere / "other.ckpt").write_text("mine")
    for path in run.checkpoints():
        checkpoint = torch.load(path, weights_only=True)
        for state in checkpoint["callbacks"].values():
            state.update({name: f"local://{elsewhere}" for name in state if name.endswith("model_path")})
            if "best_k_models" in state:
                state["best_k_models"] = {str(elsewhere / "other.ckpt"): torch.tensor(0.0)}
            if "saved" in state:
                state["saved"] = [f"../{elsewhere.name}", "step-000004"]
        torch.save(checkpoint, path)
    harness.recover("stored paths lead elsewhere", run)
    assert (elsewhere / "other.ckpt").read_text() == "mine"
